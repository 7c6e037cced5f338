"""Streams of token ids: the same as encoding the text, wherever they start and however often the text repeats."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.errors import DataError
from tasks.ruler.haystack import Haystack, NoiseHaystack, TextHaystack, load_haystack
from tasks.ruler.splice import Splicer, Stream
from tests.tasks.conftest import TRAINED


class Letters:
    """One token a character."""

    digest, name, vocab_size, bos_id, eos_id = "letters", "letters", 128, None, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Mute(Letters):
    """Makes no token of anything but its mark."""

    digest = "mute"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text if letter == "."]


def stream(haystack: Haystack, separator: str = " ") -> Stream:
    return Stream(haystack, Splicer(Letters(), separator))


def text_of(sentences: list[str]) -> TextHaystack:
    return TextHaystack("text", " ".join(sentences))


SENTENCES = st.lists(
    st.sampled_from(["Aa.", "Bb cc.", "Ddd!", "E f g h?", "Long and longer words."]), min_size=1, max_size=9
)


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES, start=st.integers(0, 30), count=st.integers(0, 40))
def test_take_is_the_repeated_text(sentences: list[str], start: int, count: int) -> None:
    made = stream(text_of(sentences))
    want = "".join(" " + sentences[i % len(sentences)] for i in range(start, start + count))
    runs = made.take(start, start + count)
    assert "".join(chr(i) for run in runs for i in run) == want
    assert all(run.dtype == np.int32 for run in runs)
    assert made.texts(start, start + count) == [sentences[i % len(sentences)] for i in range(start, start + count)]


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES, start=st.integers(0, 30), tokens=st.integers(-5, 400))
def test_fitting_is_the_most_that_fits(sentences: list[str], start: int, tokens: int) -> None:
    made = stream(text_of(sentences))
    count = made.fitting(start, tokens)

    def taken(n: int) -> int:
        return made.tokens_before(start + n) - made.tokens_before(start)

    assert count >= 0
    assert taken(count) <= max(tokens, 0) < taken(count + 1)


@settings(max_examples=60, deadline=None)
@given(sentences=SENTENCES, end=st.integers(0, 60))
def test_tokens_before_counts_the_text(sentences: list[str], end: int) -> None:
    want = sum(1 + len(sentences[i % len(sentences)]) for i in range(end))
    assert stream(text_of(sentences)).tokens_before(end) == want


def test_questions_in_any_order_get_the_same_answers() -> None:
    haystack = load_haystack("bundled")
    forward, backward = stream(haystack), stream(haystack)
    ends = [3, 700, 1500, 2100]
    assert [forward.tokens_before(end) for end in ends] == [backward.tokens_before(end) for end in ends[::-1]][::-1]
    for made in (forward, backward):
        assert np.concatenate(made.take(1490, 1510)).tolist() == [
            i for n in range(1490, 1510) for i in Letters().encode(" " + haystack.sentence(n))
        ]


def test_only_as_much_is_encoded_as_is_needed() -> None:
    made = stream(load_haystack("bundled"))
    made.fitting(0, 1000)
    first = len(made._texts)
    assert 0 < first <= 1024
    made.fitting(0, 2000)
    assert len(made._texts) == first


def test_lines_carry_the_separator_of_their_side(trained: Callable) -> None:
    for kind, lead, trail in (("plain", "\n", ""), ("newlines", "", "\n")):
        tokenizer = trained(kind)
        splicer = Splicer(tokenizer, "\n")
        assert (splicer.lead, splicer.trail) == (lead, trail)
        made = Stream(NoiseHaystack(), splicer)
        line = NoiseHaystack().sentence(0)
        whole = tokenizer.encode("Start.\n" + f"{line}\n" * 30 + "End")
        joined = [i for run in made.take(0, 30) for i in run]
        head, tail = tokenizer.encode("Start." + trail), splicer.piece(lead + "End")
        assert head + joined + tail == whole


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind != "greedy"])
def test_pieces_join_to_what_the_tokenizer_makes(trained: Callable, kind: str) -> None:
    tokenizer = trained(kind)
    splicer = Splicer(tokenizer, " ")
    assert splicer.safe
    haystack = load_haystack("bundled")
    sentences = [haystack.sentence(i) for i in range(200)]
    pieces = splicer.units(sentences[1:])
    joined = tokenizer.encode(sentences[0]) + [i for piece in pieces for i in piece]
    assert joined == tokenizer.encode(" ".join(sentences))


def test_a_piece_that_swallows_its_mark_is_unsafe(trained: Callable) -> None:
    tokenizer = trained("greedy")
    splicer = Splicer(tokenizer, " ")
    pieces = splicer.units(["The river.", "A town."])
    assert not splicer.safe and all(pieces)


def test_a_tokenizer_without_tokens_is_refused() -> None:
    made = Stream(load_haystack("bundled"), Splicer(Mute(), " "))
    made.splicer.safe = True
    with pytest.raises(DataError, match="no token"):
        Stream(TextHaystack("text", "No full stop here"), made.splicer).fitting(0, 10)
