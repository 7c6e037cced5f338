"""Profile `exact`: the window is met to the token, for any tokenizer, haystack and length."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tasks
from evalsuite.types import Sample, Setting, Tokenizer
from gdn2.errors import UserError
from tasks.ruler import niah, splice
from tasks.ruler.exact import SLACK
from tasks.ruler.words import held_out
from tests.tasks.conftest import PUBLIC, TRAINED

NAMES = [spec.name for spec in niah.NIAH_TASKS]
ODD = {
    "rtl": "שלום עולם. זה משפט ארוך. " * 30 + "مرحبا بالعالم. ",
    "nul": "A sentence with a \0 in it. Another\x1done. And \x07 bells! " * 20,
    "braces": "{context} {} {0} %s $x \\n {{query}}. " * 40,
    "special": "<s> </s> <|endoftext|> [INST] <unk> <0x0A> ▁ Ġ Ċ. <|im_start|>system. " * 30,
    "marks": "e\u0301 \u0301x n\u0303o \u200bzero \ufeffwidth \u00a0hard\u2028line 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿. " * 30,
    "one word": "Word",
    "no spaces": "x" * 5000,
    "chinese": "我能吞下玻璃而不伤身体。" * 200,
    "no sentences": "and so it goes on " * 3000,
}


def ids_of(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(sample.requests[0].prompt.text)


def check(task: str, tokenizer: Tokenizer, sample: Sample, length: int, budget: int = 128) -> None:
    """All that must hold of one sample."""
    prompt, facts = sample.requests[0].prompt, sample.facts
    assert prompt.ids.dtype == np.int32
    assert prompt.ids.tolist() == ids_of(tokenizer, sample)
    assert length - SLACK <= len(prompt.ids) + budget <= length
    text = prompt.text
    spec = next(spec for spec in niah.NIAH_TASKS if spec.name == task)
    queried = [pair for pair in facts["needles"] if pair[1] in sample.target]
    assert {value for _, value in queried} == set(sample.target)
    for key, value in facts["needles"]:
        needle = spec.needle(key, value)
        assert text.count(needle) == 1
        assert held_out(key) and held_out(value)
    for key, value in queried:
        assert text.count(value) == 1
        assert sum(f" for {key} is" in part for part in text.split("One of the")) == spec.values
    places = [text.index(spec.needle(*pair)) for pair in facts["needles"]]
    assert places == sorted(places)
    start = facts["needle_token"]
    shown, token = (tokenizer.decode(prompt.ids[start:end].tolist()).lower() for end in (None, start + 1))
    assert 0 <= shown.find("one of the special magic") <= len(token)
    rank = next(i for i, (_, value) in enumerate(reversed(facts["needles"]), 1) if value == sample.target[0])
    assert shown.count("one of the special magic") == rank


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", NAMES)
def test_fills_the_window_with_trained_tokenizers(trained: Callable, name: str, kind: str) -> None:
    tokenizer = trained(kind)
    for length in (1024, 1531):
        samples = tasks.get(name).samples(Setting("exact", length, 6), tokenizer)
        if kind == "letters":
            length *= 3
            samples = tasks.get(name).samples(Setting("exact", length, 6), tokenizer)
        for sample in samples:
            check(name, tokenizer, sample, length)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(sorted(PUBLIC)),
    length=st.integers(128, 9000),
    budget=st.sampled_from([1, 16, 128]),
    index=st.integers(0, 30),
    seed=st.integers(0, 5),
    offset=st.sampled_from(["0", "17", "random"]),
)
def test_any_length_is_met_or_refused(
    public: Callable,
    emerson: str,
    name: str,
    kind: str,
    length: int,
    budget: int,
    index: int,
    seed: int,
    offset: str,
) -> None:
    tokenizer = public(kind)
    options = {"haystack": emerson, "budget": str(budget), "haystack_offset": offset}
    setting = Setting("exact", length, index + 1, seed, options)
    try:
        samples = tasks.get(name).samples(setting, tokenizer)
    except UserError as error:
        need = int(str(error).split(" take ")[1].split(";")[0])
        assert need > length and "\n" not in str(error)
        setting = Setting("exact", need, index + 1, seed, options)
        check(name, tokenizer, tasks.get(name).samples(setting, tokenizer)[index], need, budget)
        return
    check(name, tokenizer, samples[index], length, budget)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("odd", ODD)
def test_odd_haystacks(trained: Callable, tmp_path: Path, odd: str, kind: str) -> None:
    tokenizer = trained(kind)
    file = tmp_path / "odd.txt"
    file.write_text(ODD[odd], encoding="utf-8")
    length = 4000 if kind == "letters" else 1500
    samples = tasks.get("niah_multikey_1").samples(
        Setting("exact", length, 3, options={"haystack": str(file)}), tokenizer
    )
    for sample in samples:
        text = sample.requests[0].prompt.text
        assert sample.requests[0].prompt.ids.tolist() == ids_of(tokenizer, sample)
        assert length - SLACK <= len(sample.requests[0].prompt.ids) + 128 <= length
        assert all(text.count(value) == 1 for value in sample.target)


@pytest.mark.parametrize("name", ["gpt-neox", "llama2"])
def test_odd_haystacks_with_public_tokenizers(public: Callable, tmp_path: Path, name: str) -> None:
    for odd, text in ODD.items():
        file = tmp_path / f"{odd}.txt"
        file.write_text(text, encoding="utf-8")
        setting = Setting("exact", 3000, 2, options={"haystack": str(file), "haystack_offset": "random"})
        for sample in tasks.get("niah_single_3").samples(setting, public(name)):
            check("niah_single_3", public(name), sample, 3000)


def test_pieces_are_joined_only_where_tokens_cannot_cross(trained: Callable) -> None:
    assert splice.Splicer(trained("plain"), " ").safe
    assert splice.Splicer(trained("plain"), "\n").lead == "\n"
    newlines = splice.Splicer(trained("newlines"), "\n")
    assert newlines.safe and (newlines.lead, newlines.trail) == ("", "\n")
    assert not splice.Splicer(trained("greedy"), " ").safe


class Counting:
    """A tokenizer no piece of which can be encoded alone, though nothing in its vocabulary tells: it counts letters."""

    digest, name, vocab_size, bos_id, eos_id = "counting", "counting", 128, None, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) + 1000 * (i % 7 == 6) for i, letter in enumerate(text)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i % 1000) for i in ids)


def test_the_first_prompt_of_a_cell_tells_whether_pieces_may_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice.Splicer, "_cuts_cleanly", lambda self: True)
    niah._stream.cache_clear()
    tokenizer = Counting()
    for sample in tasks.get("niah_multikey_1").samples(Setting("exact", 4096, 4), tokenizer):
        assert sample.requests[0].prompt.ids.tolist() == ids_of(tokenizer, sample)
        assert 4096 - SLACK <= len(sample.requests[0].prompt.ids) + 128 <= 4096
    niah._stream.cache_clear()


def test_a_wrong_joint_is_noticed(trained: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the test of the vocabulary ever be wrong, the first prompt of a cell tells."""
    monkeypatch.setattr(splice, "_crossed", lambda tokenizer: set())
    monkeypatch.setattr(splice.Splicer, "_cuts_cleanly", lambda self: True)
    niah._stream.cache_clear()
    tokenizer = trained("greedy")
    for sample in tasks.get("niah_single_2").samples(Setting("exact", 1024, 5), tokenizer):
        assert sample.requests[0].prompt.ids.tolist() == ids_of(tokenizer, sample)
    niah._stream.cache_clear()


def test_a_sample_is_the_same_for_every_tokenizer_length_and_order(trained: Callable) -> None:
    for name in NAMES:
        found = []
        for kind, length, count in (("plain", 1024, 9), ("letters", 6000, 4), ("newlines", 1400, 12)):
            samples = tasks.get(name).samples(Setting("exact", length, count), trained(kind))
            sample = samples[3]
            assert samples[-count + 3].target == sample.target
            assert [one.id for one in samples[2:4]] == ["2", "3"]
            found.append((sample.id, sample.target, sample.depth, sample.facts["key"], sample.facts["haystack_offset"]))
        assert found[0] == found[1] == found[2]


def test_seed_and_task_change_the_samples(trained: Callable) -> None:
    values = [
        tasks.get(name).samples(Setting("exact", 1024, 1, seed), trained("plain"))[0].target
        for name in ("niah_single_1", "niah_single_2")
        for seed in (42, 43)
    ]
    assert len(set(values)) == 4


def test_depth_is_spread_evenly_over_any_first_n(trained: Callable) -> None:
    samples = tasks.get("niah_single_2").samples(Setting("exact", 2048, 200), trained("plain"))
    depths = [samples[i].depth for i in range(200)]
    for n in (10, 50, 200):
        counts = Counter(int(depth * 10) for depth in depths[:n])
        assert all(abs(counts[d] - n / 10) <= 2 for d in range(10))
    for i in (0, 57, 120):
        sample = samples[i]
        share = sample.facts["needle_token"] / len(sample.requests[0].prompt.ids)
        assert abs(share - sample.depth) < 0.1


def test_needles_sit_between_sentences(trained: Callable) -> None:
    for sample in tasks.get("niah_multivalue").samples(Setting("exact", 1024, 20), trained("plain")):
        text = sample.requests[0].prompt.text
        for part in text.split("One of the special")[1:-1]:
            assert part.rstrip()[-1] in ".?!"


def test_a_random_offset_moves_the_haystack_only(trained: Callable) -> None:
    fixed, moved = (
        tasks.get("niah_single_2").samples(Setting("exact", 1024, 8, options=options), trained("plain"))
        for options in ({}, {"haystack_offset": "random"})
    )
    assert [one.target for one in fixed] == [one.target for one in moved]
    assert {one.facts["haystack_offset"] for one in fixed} == {0}
    assert len({one.facts["haystack_offset"] for one in moved}) == 8
    assert len({one.requests[0].prompt.text[200:300] for one in moved}) == 8


def test_a_haystack_that_holds_the_needle_gets_another(trained: Callable, tmp_path: Path) -> None:
    first = tasks.get("niah_single_2").samples(Setting("exact", 1024, 1), trained("plain"))[0]
    file = tmp_path / "spoiled.txt"
    file.write_text(f"It is said that {first.target[0]} is the number. {first.facts['key']}!", encoding="utf-8")
    other = tasks.get("niah_single_2").samples(
        Setting("exact", 1024, 1, options={"haystack": str(file)}), trained("plain")
    )[0]
    assert other.target != first.target and other.facts["key"] != first.facts["key"]
    check("niah_single_2", trained("plain"), other, 1024)
    assert other.facts["haystack_repeats"]


@pytest.mark.parametrize("length", [1 << 17, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_long_windows(public: Callable, emerson: str, length: int) -> None:
    setting = Setting("exact", length, 2, options={"haystack": emerson})
    tokenizer = public("gpt-neox")
    sample = tasks.get("niah_single_2").samples(setting, tokenizer)[1]
    assert length - 128 - SLACK <= len(sample.requests[0].prompt.ids) <= length - 128
    assert sample.requests[0].prompt.text.count(sample.target[0]) == 1
    # The first prompt of a cell is compared with the tokenizer's own ids; had they differed, pieces would be unsafe.
    assert niah.stream(niah.load_haystack(emerson), tokenizer, " ").splicer.safe


@pytest.mark.parametrize("name", ["gpt-neox", "gpt2"])
def test_500_samples_at_128k_in_three_cpu_seconds(public: Callable, data: Path, name: str) -> None:
    """RULER's own generator and lm-eval's take 280 to 430 s of CPU for these."""
    tokenizer = public(name)
    setting = Setting("exact", 131072, 500, options={"haystack": str(data / "haystack_essays" / "thoreau")})
    niah._stream.cache_clear()
    splice._seen.clear()
    start = time.process_time()  # of all threads
    samples = tasks.get("niah_single_2").samples(setting, tokenizer)
    sizes = [len(sample.requests[0].prompt.ids) for sample in samples]
    assert time.process_time() - start < 3
    assert len(sizes) == 500 and all(131072 - 128 - SLACK <= size <= 131072 - 128 for size in sizes)
    assert samples[499].requests[0].prompt.ids.tolist() == ids_of(tokenizer, samples[499])
