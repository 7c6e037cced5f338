"""RULER's compatible profiles against facts of the benchmark worked out by hand, apart from any golden file."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.errors import UserError
from tasks.ruler import compat, cwe, fwe, qa, search, vt
from tasks.ruler.compat import Draft as NeedleDraft
from tasks.ruler.compat import Job as NeedleJob
from tasks.ruler.search import Draft, Job
from tasks.ruler.templates import NIAH_TASKS, NOISE
from tests.tasks.test_splice import Letters

TASK = {spec.name: spec for spec in NIAH_TASKS}
PERCENTS = [
    0, 3, 5, 8, 10, 13, 15, 18, 21, 23, 26, 28, 31, 33, 36, 38, 41, 44, 46, 49, 51, 54, 56, 59, 62, 64, 67, 69, 72, 74,
    77, 79, 82, 85, 87, 90, 92, 95, 97, 100,
]  # fmt: skip


def source(name: str, profile: str = "nvidia-main", length: int = 4096, seed: int = 42) -> compat.Source:
    return compat.Source(NeedleJob(TASK[name], profile, length, Letters(), lambda: "", seed))


def job(profile: str, length: int = 1000, budget: int = 32, name: str = "vt") -> Job:
    return Job(name, profile, length, Letters(), 42, budget)


class WithBos(Letters):
    bos_id = 1


class Fours(Letters):
    """One token for four characters: more like a real tokenizer, which RULER's own sizes are made for."""

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, text[i : i + 4])) for i in range(0, len(text), 4)]


def test_depths_are_forty_rounded_steps() -> None:
    assert compat._DEPTHS == PERCENTS


def test_lines_grow_by_five_below_4k_and_by_25_from_there() -> None:
    for length, noise in ((4095, 5), (4096, 25), (1024, 5), (131072, 25)):
        assert NeedleJob(TASK["niah_single_1"], "lm-eval", length, Letters(), str).increment == noise
        assert NeedleJob(TASK["niah_multikey_3"], "lm-eval", length, Letters(), str).increment == noise
        assert NeedleJob(TASK["niah_multivalue"], "lm-eval", length, Letters(), str).increment == 500


@pytest.mark.parametrize(("count", "order"), [(4, [2, 1, 3, 0]), (8, [3, 4, 6, 7, 2, 5, 0, 1])])
def test_needles_have_one_permutation_for_all_samples(count: int, order: list[int]) -> None:
    shuffled = list(range(count))
    random.Random(42).shuffle(shuffled)
    assert shuffled == order


def test_the_haystacks_own_needles_are_drawn_before_the_places() -> None:
    made = source("niah_multikey_2")
    rng = random.Random(42)
    key, value = compat.DRAW["words"](rng), compat.DRAW["numbers"](rng)
    others = [(compat.DRAW["words"](rng), compat.DRAW["numbers"](rng)) for _ in range(25)]
    (place,) = rng.sample(range(25), 1)
    draft = made.draft(25)
    assert draft.answers == (value,) and draft.queries == (key,) and draft.depth == place / 25
    assert draft.needles == (*others[:place], (key, value), *others[place:])
    assert draft.body.count("\n") == 25 + 2  # lines of the haystack, its needle, and what is around them


def test_a_needle_never_ends_a_haystack_of_lines() -> None:
    made = source("niah_single_1")
    for _ in range(60):
        lines = made.draft(5).body.split("\n")[1:-1]
        assert len(lines) == 6 and lines[-1] == NOISE and sum("magic" in line for line in lines) == 1


def test_each_generator_has_its_own_seeds() -> None:
    first = [source("niah_single_1", profile).draft(5).answers for profile in compat.PROFILES]
    assert first[0] == first[1] == first[2] != first[3]  # 42 at NVIDIA's, 0 in lm-eval
    assert source("niah_single_1", "lm-eval", seed=0).draft(5).answers == first[3]
    assert source("niah_single_1", "lm-eval", seed=7).draft(5) == source("niah_single_1", "nvidia-2024", seed=7).draft(
        5
    )
    assert job("lm-eval").seeds == (0, 1234) and job("nvidia-main").seeds == (42, 42)
    other = Job("vt", "lm-eval", 1000, Letters(), 7, 32)
    assert other.seeds == (7, 7) and other.shuffle_seed == 42
    assert Job("vt", "nvidia-2024", 1000, Letters(), 7, 32).shuffle_seed == 7


def test_bos_is_counted_by_lm_eval_alone() -> None:
    for profile, extra in (("lm-eval", 1), ("nvidia-main", 0), ("nvidia-2024", 0)):
        assert Job("vt", profile, 1000, WithBos(), 42, 32).tokens("abc") == 3 + extra
        assert job(profile).tokens("abc") == 3


RECORDS = {
    "nvidia-2024": ["index", "input", "outputs", "length"],
    "nvidia-main": ["index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"],
    "nvidia-main-noprefix": ["index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"],
    "lm-eval": ["index", "input", "outputs", "length", "max_length", "gen_prefix"],
}


@pytest.mark.parametrize("profile", RECORDS)
def test_a_sample_is_written_as_each_generator_writes_it(profile: str) -> None:
    prefix = " Answer: it is"
    made = search.written(
        job(profile), Draft("Text. Answer: it is early. Question?" + prefix, ("a", "b")), prefix, 3, 99
    )
    assert list(made.record) == RECORDS[profile] and made.record["outputs"] == ["a", "b"]
    assert made.record["index"] == made.index == 3 and made.record["length"] == 99
    # The prefix is cut off at its last occurrence.
    body = "Text. Answer: it is early. Question?"
    whole = body + prefix
    assert made.prompt == (body if profile == "nvidia-main-noprefix" else whole)
    assert made.record["input"] == (whole if profile == "nvidia-2024" else body)
    if profile == "lm-eval":
        assert made.record["gen_prefix"] == "Answer: it is" and made.record["max_length"] == 1000
        joined = search.written(job(profile), Draft(whole, ("a",), more={"x": 1}), prefix, 0, 9, joint="\n\n")
        assert joined.prompt == body + "\n\nAnswer: it is" and joined.record["x"] == 1
    elif profile != "nvidia-2024":
        assert made.record["answer_prefix"] == prefix


def test_the_prefix_is_found_by_its_first_ten_letters() -> None:
    """Upstream looks for no more: what follows them may differ from the prefix, and stays with the answer."""
    made = search.written(job("nvidia-main"), Draft("Q? Answer: it was", ("a",)), " Answer: it is", 0, 9)
    assert made.record["input"] == "Q?" and made.record["answer_prefix"] == " Answer: it was"
    plain = search.written(job("lm-eval"), Draft("Q? Answer: it is", ("a",)), " Answer: it is", 0, 9)
    assert plain.prompt == "Q? Answer: it is" and plain.record["input"] == "Q?"


def test_a_needle_sample_of_the_main_branch_says_where_the_answer_stands() -> None:
    draft = NeedleDraft(
        "Some text: 1234567. What?", " The special magic", ("1234567",), ("k",), (("k", "1234567"),), 0, False
    )
    for profile in compat.PROFILES:
        made = compat._finish(NeedleJob(TASK["niah_single_1"], profile, 1000, Letters(), str), draft, 5, 77)
        if profile.startswith("nvidia-main"):
            assert made.record["index"] == 11  # upstream overwrites the sample's number with the answer's place
            assert made.record["token_position_answer"] == 11 and made.record["answer_prefix"] == draft.prefix
        else:
            assert made.record["index"] == 5 and "answer_prefix" not in made.record
        assert made.prompt == draft.body + ("" if profile.endswith("noprefix") else draft.prefix)


def test_chains_are_handed_on_and_their_answers_are_all_the_names() -> None:
    for profile in ("nvidia-main", "nvidia-2024", "lm-eval"):
        made = next(vt.compatible(Job("vt", profile, 2000, Fours(), 42, 30)))
        text = made.record["input"].split(vt.INTRODUCTION)[-1]
        value = text.partition("assigned the value ")[2].split(" ")[0]
        names = list(made.answers)
        assert len(set(names)) == 5 and all(len(name) == 5 and name.isupper() for name in names)
        places = [text.index(f"VAR {names[0]} = {value}")]
        places += [text.index(f"VAR {new} = VAR {old} ") for old, new in itertools.pairwise(names)]
        assert places == sorted(places)
        # The solved example before it has names and a value of its own.
        example = made.record["input"].split(vt.INTRODUCTION)[1]
        assert "12345" not in made.record["input"] or profile != "nvidia-main"
        assert not any(f"VAR {name} " in example for name in names)
        assert ("assgined" in made.prompt) == (profile != "nvidia-main")  # as spelt until May 2025, and in lm-eval


def test_the_example_of_common_words_is_in_the_prompt_of_nvidias_alone() -> None:
    for profile in ("nvidia-main", "nvidia-2024", "lm-eval"):
        made = next(cwe.compatible(Job("cwe", profile, 6000, Fours(), 42, 120)))
        assert made.prompt.count(cwe.INTRODUCTION) == (1 if profile == "lm-eval" else 2)
        listed = made.prompt.rpartition(cwe.INTRODUCTION)[2].partition("\nQuestion")[0]
        words = [part.rstrip("0123456789. ") for part in listed.split(". ")[1:]]
        count = Counter(words)
        assert {word for word, n in count.items() if n == 30} == set(made.answers) and len(made.answers) == 10
        assert {n for word, n in count.items() if word not in made.answers} <= {3}
        if profile == "lm-eval":
            assert "input_example" in made.record and made.prompt.endswith("in the list are:")
    # One space was forgotten between the example's question and its answer before June 2025.
    old, new = (
        next(cwe.compatible(Job("cwe", p, 6000, Fours(), 42, 120))).prompt for p in ("nvidia-2024", "nvidia-main")
    )
    assert "in the list are:1. " in old and "in the list are: 1. " in new


@given(st.integers(0, 10**6), st.integers(1, 400))
def test_frequencies_are_those_of_the_law(total: int, ranks: int) -> None:
    counts = fwe.counts(total, ranks)
    exact = total / (np.pi**2 / 6) / np.arange(1, ranks + 1, dtype=float) ** 2
    assert len(counts) == ranks and (counts >= 0).all()
    assert (counts <= exact + 1e-6).all() and (counts > exact - 1 - 1e-6).all()
    assert counts.sum() <= total


def test_the_answer_budget_of_frequent_words_is_kept_free_by_the_main_branch_alone() -> None:
    for profile, room in (("nvidia-main", 2000 - 50), ("nvidia-2024", 2000), ("lm-eval", 2000)):
        made = next(fwe.compatible(Job("fwe", profile, 2000, Letters(), 42, 50)))
        used = len(f"{made.record['input']}{made.record.get('answer_prefix', made.record.get('gen_prefix', ''))}")
        assert room - room // 32 * 3 < used <= room + 1  # filled to a step or so, lm-eval joined by another space
        words = Counter(made.prompt.partition("words. ")[2].partition("\nQuestion")[0].split(" "))
        assert [word for word, _ in words.most_common(4)][1:] == list(made.answers) or sorted(
            made.answers, key=lambda word: -words[word]
        ) == list(made.answers)
        assert words.most_common(1)[0][0] == fwe.DOTS and fwe.DOTS not in made.answers


@pytest.mark.parametrize("profile", ["nvidia-main", "nvidia-2024", "lm-eval"])
def test_lengths_without_room_end_in_one_line(profile: str) -> None:
    for make, name, budget in ((vt.compatible, "vt", 30), (cwe.compatible, "cwe", 120), (fwe.compatible, "fwe", 50)):
        for length in (1, 31, 130, 199):
            with pytest.raises(UserError, match=f"length {length} is too short for {name} in profile {profile}"):
                next(make(Job(name, profile, length, Fours(), 42, budget)))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(vt.compatible, "vt", 30), (cwe.compatible, "cwe", 120), (fwe.compatible, "fwe", 50)]),
    st.sampled_from(["nvidia-main", "nvidia-2024", "lm-eval"]),
    st.integers(1, 1200),
)
def test_every_sample_asks_for_something_at_any_length(task: tuple, profile: str, length: int) -> None:
    make, name, budget = task
    try:
        made = next(make(Job(name, profile, length, Fours(), 42, budget)))
    except UserError as problem:
        assert f"length {length} is too short for {name}" in str(problem)
        return
    assert len(made.answers) == {"vt": 5, "cwe": 10, "fwe": 3}[name] == len(set(made.answers))
    assert all(answer in made.prompt for answer in made.answers)


@pytest.mark.parametrize("profile", ["nvidia-main", "nvidia-2024", "lm-eval"])
def test_an_example_that_no_length_helps_is_told_from_a_short_one(profile: str) -> None:
    """The solved example of vt has a window of its own, of 500 tokens, which a tokenizer of letters cannot meet."""
    with pytest.raises(UserError, match=f"^the solved example of vt in profile {profile} takes more than 500 tokens"):
        next(vt.compatible(job(profile, 100_000, 30)))


CORPUS = qa.Corpus(
    tuple(
        qa.Question(f"q{i}?", (f"a{i}", "b"), (i,), tuple(j for j in range(8) if j != i and j < 4), (i,))
        for i in range(8)
    ),
    tuple(f"T{i}\nDocument text number {i}." for i in range(40)),
)


@pytest.mark.parametrize("profile", ["nvidia-main", "nvidia-2024", "lm-eval"])
def test_documents_of_the_same_article_come_first(profile: str) -> None:
    made = qa._Source(Job("qa_1", profile, 10**6, Letters(), 42, 32), CORPUS)
    for index, question in enumerate(CORPUS.questions):
        chosen = made._chosen(question, 3)
        assert len(chosen) == 3 and CORPUS.documents[index] == chosen[0]
        assert set(chosen[1:]) <= {CORPUS.documents[i] for i in question.related}
        more = made._chosen(question, 20)
        known = [CORPUS.documents[i] for i in (*question.given, *question.related)]
        assert more[: len(known)] == known and len(set(more)) == 20
    # Where there are not enough documents, the main branch repeats them; the others take them all.
    assert len(made._chosen(CORPUS.questions[0], 90)) == (90 if profile == "nvidia-main" else 40)
    assert len(made._chosen(CORPUS.questions[0], 40)) == 40


def test_lm_eval_leaves_out_what_does_not_fit_and_the_others_go_on_with_fewer() -> None:
    long = qa.Corpus(CORPUS.questions, ("x" * 3000, *CORPUS.documents[1:]))
    for profile, numbers in (("lm-eval", [1, 2, 3]), ("nvidia-2024", [1, 2, 3])):
        asked = Job("qa_1", profile, 1400, Letters(), 42, 32)
        if profile == "lm-eval":
            assert [made.index for made in qa.compatible(asked, long, 4)] == numbers
            continue
        with pytest.raises(UserError, match="length 1400 is too short for qa_1"):
            list(qa.compatible(asked, long, 4))
    fits = list(qa.compatible(Job("qa_1", "lm-eval", 1400, Letters(), 42, 32), CORPUS, 3))
    assert [made.index for made in fits] == [0, 1, 2] and all(made.record["length"] <= 1400 for made in fits)
    assert json.loads(json.dumps(fits[0].record))["outputs"] == ["a0", "b"]
