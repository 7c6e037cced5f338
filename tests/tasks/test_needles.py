"""The small parts of the needle tasks: samples on demand, options at their bounds, joints, worked-out scores."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from evalsuite.types import Prompt, Response, Sample, Setting
from gdn2.errors import UserError
from tasks.ruler import compat, exact, niah, splice
from tasks.ruler.haystack import NeedleHaystack, TextHaystack, rng_of, split_sentences
from tasks.ruler.niah import LAST_OFFSET, InOrder, Lazy, checked, sentence_offset, value_scores
from tasks.ruler.templates import NIAH_TASKS, query_of
from tests.tasks.test_splice import Letters

MARKED = next(spec for spec in NIAH_TASKS if spec.name == "niah_multikey_1")


def made(count: int) -> tuple[Lazy, list[int]]:
    asked: list[int] = []

    def make(i: int) -> Sample:
        asked.append(i)
        return Sample(str(i), (), ())

    return Lazy(count, make), asked


@given(st.integers(0, 9), st.slices(9))
def test_samples_on_demand_are_a_sequence(count: int, part: slice) -> None:
    lazy, asked = made(count)
    plain = [str(i) for i in range(count)]
    assert [one.id for one in lazy] == plain and len(lazy) == count
    chosen = lazy[part]
    asked.clear()
    assert len(chosen) == len(plain[part]) and asked == []  # cutting makes nothing
    assert [one.id for one in chosen] == plain[part]
    assert [one.id for one in lazy[part][::-1]] == plain[part][::-1]
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"sample {index} of {count}"):
            lazy[index]
    if count:
        assert lazy[-1].id == plain[-1] and lazy[0].id == "0"


def test_items_in_order_are_made_once_up_to_the_one_asked_for() -> None:
    drawn: list[int] = []

    def endless() -> object:
        for i in range(1000):
            drawn.append(i)
            yield i

    items = InOrder(endless())  # type: ignore[arg-type]
    assert items[3] == 3 and drawn == [0, 1, 2, 3]
    assert items[1] == 1 and items[3] == 3 and drawn == [0, 1, 2, 3]
    assert items[4] == 4 and drawn == [0, 1, 2, 3, 4]


def test_options_at_their_bounds() -> None:
    assert checked("t", Setting("exact", 1), 128) == (1, compat.DEFAULT_SAMPLES, 128)
    assert checked("t", Setting("lm-eval", 9, 0, options={"budget": "1"}), 128) == (9, 0, 1)
    assert checked("t", Setting("exact", 9, 7, options={"budget": "9" * 18}), 1) == (9, 7, int("9" * 18))
    for text in ("9" * 19, "0", "-1", "+1", "1.0", " 1", "1 ", "", "٣", "0x1", "1_0"):
        with pytest.raises(UserError, match="^budget must be a whole number of at least 1, got "):
            checked("t", Setting("exact", 9, 7, options={"budget": text}), 128)
    for offset, want in (("0", 0), (str(LAST_OFFSET), LAST_OFFSET), ("007", 7), ("random", None)):
        assert sentence_offset(Setting("exact", 9, options={"haystack_offset": offset})) == want
    assert sentence_offset(Setting("exact", 9)) == 0
    with pytest.raises(UserError, match=f"haystack_offset '{LAST_OFFSET + 1}' is beyond {LAST_OFFSET}"):
        sentence_offset(Setting("exact", 9, options={"haystack_offset": str(LAST_OFFSET + 1)}))
    with pytest.raises(
        UserError, match=r"haystack_offset \(or `random`\) must be a whole number of at least 0, got 'Random'"
    ):
        sentence_offset(Setting("exact", 9, options={"haystack_offset": "Random"}))


def test_forced_scores_are_means_over_the_values() -> None:
    answers = [Response(logprob=-2.0, rank=1, greedy=True), Response(logprob=-6.0, rank=5, greedy=False)]
    logprob, rank, greedy = value_scores("a, b", answers)
    assert [(s.metric, s.value, s.outcome) for s in (logprob, rank, greedy)] == [
        ("value_logprob", -4.0, "partial"), ("value_rank", 3.0, "partial"), ("value_greedy", 0.5, "partial"),
    ]  # fmt: skip
    assert logprob.target == "a, b"
    assert {s.outcome for s in value_scores("a", answers[:1])} == {"target"}
    assert {s.outcome for s in value_scores("b", answers[1:])} == {"other"}


def sample(needles: list[tuple[str, str]], target: tuple[str, ...], kind: str) -> Sample:
    return Sample("0", (), target, 0.5, {"needles": tuple(needles), "kind": kind})


@pytest.mark.parametrize(
    ("said", "value", "outcome"),
    [
        ("2222222", 1.0, "target"), ("it is 2222222, not 1111111", 1.0, "target"), ("12222222", 1.0, "target"),
        ("1111111", 0.0, "distractor:3"), ("3333333", 0.0, "distractor:1"), ("3333333 or 1111111", 0.0, "distractor:1"),
        ("1111111 or 3333333", 0.0, "distractor:3"), ("222222", 0.0, "other"), ("42", 0.0, "other"),
        ("4", 0.0, "nothing"), ("", 0.0, "nothing"), ("\x00\x01", 0.0, "nothing"), ("２２２２２２２", 0.0, "other"),
    ],
)  # fmt: skip
def test_what_was_said_instead_is_named_from_the_end(said: str, value: float, outcome: str) -> None:
    asked = sample([("a", "1111111"), ("b", "2222222"), ("c", "3333333")], ("2222222",), "numbers")
    (score,) = tasks.get("niah_multikey_1").score(asked, [Response(text=said)])
    assert (score.value, score.outcome, score.output) == (value, outcome, said)


def test_uuids_are_found_in_any_case_and_words_by_their_shape() -> None:
    right, wrong = "0a1b2c3d-0000-4000-8000-00000000000a", "ffffffff-0000-4000-8000-00000000000b"
    asked = sample([("a", right), ("b", wrong)], (right,), "uuids")
    for said, outcome in (
        (right.upper(), "target"),
        (wrong.upper(), "distractor:1"),
        ("DEADBEEF-00", "other"),
        ("x-y", "nothing"),
    ):
        assert tasks.get("niah_single_3").score(asked, [Response(text=said)])[0].outcome == outcome
    words = sample([("k", "calm-river")], ("calm-river",), "words")
    for said, outcome in (("Calm-River!", "target"), ("wild-river", "other"), ("river", "nothing")):
        assert tasks.get("niah_single_1").score(words, [Response(text=said)])[0].outcome == outcome


def test_the_text_after_a_prompt_is_what_it_is_in_the_whole(trained: Callable) -> None:
    for kind in ("plain", "newlines", "letters", "prefix", "unigram"):
        tokenizer = trained(kind)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        before = "The special magic number for calm-river mentioned in the provided text is"
        prompt = Prompt(np.array(bos + tokenizer.encode(before), dtype=np.int32), before)
        after = splice.continued(tokenizer, prompt, " 1234567")
        assert [*prompt.ids, *after.ids] == bos + tokenizer.encode(before + " 1234567"), kind
        assert after.text == " 1234567" and after.ids.dtype == np.int32


def test_tokenizers_and_haystacks_are_cached_by_what_they_are() -> None:
    class Other(Letters):
        digest = "other"

    one, same, other = splice.ByDigest(Letters()), splice.ByDigest(Letters()), splice.ByDigest(Other())
    assert one == same and hash(one) == hash(same) and one != other and one != "letters"
    assert splice.spaces(one) is splice.spaces(same) and splice.spaces(one) is not splice.spaces(other)
    hay = niah.stream(TextHaystack("t", "A b. C d."), Letters(), " ")
    assert hay is niah.stream(TextHaystack("t", "A b. C d."), Letters(), " ")
    assert hay is not niah.stream(TextHaystack("t", "A b. C e."), Letters(), " ")
    assert hay is not niah.stream(TextHaystack("t", "A b. C d."), Letters(), "\n")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5))
def test_keys_are_listed_as_upstream_lists_them(keys: list[str]) -> None:
    listed = query_of(keys)
    assert listed.replace(", and ", ", ").split(", ") == keys
    assert (", and " in listed) == (len(keys) > 1) and not listed.endswith(",")


def test_random_streams_are_those_of_their_names_and_machine_free() -> None:
    assert rng_of(42, "niah_single_2", 7).getrandbits(64) == rng_of("42", "niah_single_2", "7").getrandbits(64)
    assert rng_of(42, "a", 1).getrandbits(64) != rng_of(42, "a", 2).getrandbits(64)
    assert rng_of(42, "depth").random() == rng_of(42, "depth").random()
    assert rng_of("ж", 1).getrandbits(32) == rng_of("ж", 1).getrandbits(32)


def test_questions_need_no_tokenizer_and_avoid_what_the_haystack_says() -> None:
    free = exact.ask(MARKED, 42, 3, TextHaystack("t", "Nothing here."), 0)
    told = TextHaystack("t", f"They say {free.answers[0]} and {free.queries[0]} here.")
    other = exact.ask(MARKED, 42, 3, told, 0)
    assert len(free.needles) == MARKED.keys and free.needles[0].value == free.answers[0]
    assert other.answers != free.answers and other.queries != free.queries
    assert [n.depth for n in other.needles][:1] == [n.depth for n in free.needles][:1]  # depth is the sample's own
    offsets = {exact.ask(MARKED, 42, i, TextHaystack("t", "One. Two. Three. Four."), None).offset for i in range(40)}
    assert offsets == {0, 1, 2, 3}
    lines = exact.ask(NIAH_TASKS[4], 42, 0, NeedleHaystack(NIAH_TASKS[4], 42), None)
    assert 0 <= lines.offset < exact._POOL


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Dr. No came. St. Ives!", ["Dr. No came.", "St. Ives!"]), ("A. B. C.", ["A. B. C."]),
        ("See p. 3 vol. 2.", ["See p. 3 vol. 2."]), ("他来了。 她走了！", ["他来了。", "她走了！"]),
        ("One.) Two.] Three.»", ["One.)", "Two.]", "Three.»"]), ("e.g. this. i.e. that.", ["e.g. this.", "i.e. that."]),
        ("End…  Next", ["End…", "Next"]), ("\u3000 \u00a0 ", []), ("No stop", ["No stop"]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_would_end_them(text: str, want: list[str]) -> None:
    assert split_sentences(text) == want
