"""Associative recall: contexts, questions, scores, and a model that remembers perfectly or only so much."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.backends.scripted import ScriptedBackend, nothing
from evalsuite.plan import Ask, make_plan
from evalsuite.plan import settings as planned
from evalsuite.reports import capacity
from evalsuite.store import read_records
from evalsuite.types import LogLikelihood, Request, Response, Sample, Setting
from gdn2.errors import DataError, UserError
from tasks import mqar
from tests.evalsuite import small
from tests.tasks.conftest import PUBLIC, TRAINED
from tests.tasks.test_splice import Letters

NAMES = [task.name for task in mqar.TASKS]
PLAIN = {"pairs": 16, "gap": 0, "vocabulary": 1024, "queries": 32}


def recall(name: str) -> mqar.Recall:
    found = tasks.get(name)
    assert isinstance(found, mqar.Recall)
    return found


def cell(name: str, fields: str = "", count: int = 3, tokenizer: object = None, seed: int = 42) -> Sequence[Sample]:
    (protocol,) = recall(name).expand(f"lines:pairs=16{fields}" if ":pairs=" not in fields else f"lines{fields}")
    return recall(name).samples(Setting(protocol, None, count, seed), tokenizer or Letters())


def lines(sample: Sample) -> list[tuple[str, str]]:
    """Pairs of a context, as its text has them."""
    text = sample.requests[0].context.text
    return re.findall(r"^(\w+): (\w+)$", text, re.MULTILINE)


def questions(sample: Sample) -> list[tuple[str, str]]:
    """Key and value of each likelihood asked."""
    return [(one.context.text.rpartition("\n")[2][:-1], one.continuation.text[1:]) for one in sample.requests]


class Remembering(ScriptedBackend):
    """Recalls the last `limit` assignments of a context, the last value of each key; `first` recalls the first one."""

    def __init__(self, limit: int, first: bool = False) -> None:
        super().__init__(nothing, f"remembering-{limit}")
        self.limit, self.first = limit, first

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        for index, request in enumerate(requests):
            assert isinstance(request, LogLikelihood)
            *context, key = request.context.text.split("\n")
            held = [line.split(": ") for line in context if re.fullmatch(r"\w+: \w+", line)][-self.limit :]
            found = dict(reversed(held) if self.first else held).get(key.rstrip(":"))
            right = request.continuation.text == f" {found}"
            rank = (1 if right else 9) if request.ranked else None
            yield index, Response(logprob=-0.1 if right else -5.0, greedy=right, rank=rank, tokens=3)


def scores(name: str, fields: str, backend: Remembering, count: int = 8) -> dict[str, float]:
    task = recall(name)
    plan = make_plan(backend, [task], Ask((), count, f"lines{fields}"))
    sums: dict[str, list[float]] = {}
    for one in plan.cells:
        for sample in one.samples():
            responses = [response for _, response in sorted(backend.answer(sample.requests))]
            for score in task.score(sample, responses):
                sums.setdefault(score.metric, []).append(score.value)
    return {metric: sum(values) / len(values) for metric, values in sums.items()}


def test_words_are_short_and_none_begins_another() -> None:
    words = mqar.words()
    assert len(words) > 4000 and len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in words)
    ordered = sorted(words)
    assert not [a for a, b in zip(ordered, ordered[1:], strict=False) if b.startswith(a)]
    assert words[:3] == ("kebab", "sediment", "prickly")  # frozen: another order asks other questions


@pytest.mark.parametrize("name", ["mqar", "capacity"])
def test_every_key_has_one_value_and_is_asked_for(name: str) -> None:
    for sample in cell(name):
        pairs = lines(sample)
        assert len(pairs) == len(dict(pairs)) == 16 == len(sample.requests)
        assert sorted(questions(sample)) == sorted(pairs)
        assert [value for _, value in questions(sample)] == list(sample.target)
        assert all(request.ranked for request in sample.requests)
        assert not {key for key, _ in pairs} & {value for _, value in pairs}


def test_questions_about_one_context_share_it() -> None:
    for sample in cell("mqar", ":gap=5"):
        starts = {request.context.text.rpartition("\n")[0] for request in sample.requests}
        assert len(starts) == 1
        *pairs, gap = starts.pop().split("\n")
        assert len(pairs) == 16 and len(re.findall("[.?!]", gap)) >= 5


def test_the_last_value_counts_and_the_one_before_tempts() -> None:
    for sample in cell("overwrite", ":pairs=10:times=4"):
        pairs = lines(sample)
        history: dict[str, list[str]] = {}
        for key, value in pairs:
            history.setdefault(key, []).append(value)
        again = {key: values for key, values in history.items() if len(values) > 1}
        assert len(history) == 10 and len(again) == 5 and {len(values) for values in again.values()} == {4}
        asked = questions(sample)
        assert {key for key, _ in asked} == set(again)
        for (key, right), (same, wrong) in zip(asked[::2], asked[1::2], strict=True):
            assert key == same and right == again[key][-1] and wrong == again[key][-2] != right
        assert [request.ranked for request in sample.requests] == [True, False] * 5


def test_what_was_assigned_once_is_to_be_kept() -> None:
    for kept, over in zip(cell("keep", ":pairs=10"), cell("overwrite", ":pairs=10"), strict=True):
        assert lines(kept) == lines(over)  # the same contexts, other questions
        values = dict(lines(kept))
        asked = questions(kept)
        assert not {key for key, _ in asked} & {key for key, _ in questions(over)}
        for (key, right), (_, wrong) in zip(asked[::2], asked[1::2], strict=True):
            assert right == values[key] != wrong and wrong in values.values()


def test_contexts_grow_and_are_the_same_for_every_tokenizer(trained: Callable) -> None:
    short, long = cell("mqar", ":pairs=8"), cell("mqar", ":pairs=64")
    assert [lines(a) == lines(b)[:8] for a, b in zip(short, long, strict=True)] == [True] * 3
    other = cell("mqar", ":pairs=8", tokenizer=trained("unigram"))
    assert [questions(a) for a in short] == [questions(b) for b in other]
    assert lines(cell("mqar", ":pairs=8", seed=1)[0]) != lines(short[0]) != lines(short[1])


@pytest.mark.parametrize("kind", [*TRAINED, *PUBLIC])
def test_ids_are_those_of_the_text(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer = request.getfixturevalue("trained" if kind in TRAINED else "public")(kind)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for one in cell("overwrite", ":gap=2", 1, tokenizer)[0].requests[:6]:
        assert one.context.ids.tolist() == bos + tokenizer.encode(one.context.text)
        if kind != "greedy":  # whose tokens reach across the joint
            whole = bos + tokenizer.encode(one.context.text + one.continuation.text)
            assert [*one.context.ids.tolist(), *one.continuation.ids.tolist()] == whole


def test_a_perfect_memory_scores_one_and_a_short_one_what_it_holds() -> None:
    for name in NAMES:
        found = scores(name, ":pairs=16", Remembering(1000))
        assert found["recall"] == 1 and found["value_rank"] == 1 and found["value_logprob"] == pytest.approx(-0.1)
    assert scores("mqar", ":pairs=16", Remembering(4))["recall"] == 0.25
    assert scores("mqar", ":pairs=16:gap=40", Remembering(16))["recall"] == 1


def test_overwriting_and_keeping_are_told_apart() -> None:
    """One that never erases fails the first task only; one that holds what came last, the second only."""
    stale = Remembering(1000, first=True)
    assert scores("overwrite", ":pairs=16", stale) == pytest.approx(
        {"recall": 0, "preferred": 0, "value_logprob": -5, "value_rank": 9}
    )
    assert scores("keep", ":pairs=16", stale)["recall"] == 1
    recent = Remembering(8)
    assert scores("overwrite", ":pairs=16", recent)["recall"] == 1
    assert scores("keep", ":pairs=16", recent)["recall"] == 0


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(2, 60),
    st.integers(2, 70),
    st.integers(1, 9),
    st.integers(2, 5),
    st.integers(0, 99),
)
def test_any_setting_is_consistent(name: str, pairs: int, vocabulary: int, queries: int, times: int, seed: int) -> None:
    numbers = {"pairs": min(pairs, vocabulary), "gap": 0, "vocabulary": vocabulary, "queries": queries, "times": times}
    if not recall(name).rewritten:
        del numbers["times"]
    context = recall(name).context(seed, "lines", numbers, 3)
    last = dict(context.assigned)
    assert len(last) == numbers["pairs"] and 1 <= len(context.asked) <= queries
    for key, right, wrong in context.asked:
        assert last[key] == right
        assert not recall(name).rewritten or wrong
    assert len({key for key, _, _ in context.asked}) == len(context.asked)


WRONG = [
    ("mqar", "lines:pairs=0", "is not a whole number from 1"),
    ("mqar", "lines:vocabulary=3000", "vocabulary 3000 of mqar is above the"),
    ("mqar", "lines:pairs=100:vocabulary=50", "pairs 100 of mqar need as many keys: the vocabulary has 50"),
    ("mqar", "lines:times=3", "has no field 'times=3'"),
    ("keep", "lines:pairs=1", "pairs 1 of keep must be at least 2"),
    ("overwrite", "lines:times=1", "times '1' of overwrite is not a whole number from 2 to 99"),
    ("mqar", "pairs", "has no profile 'pairs'; it has lines"),
]


@pytest.mark.parametrize(("name", "profile", "message"), WRONG)
def test_fields_that_cannot_be_are_refused(name: str, profile: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recall(name).expand(profile)
    assert message in str(caught.value)


def test_a_real_model_reads_a_context_once() -> None:
    samples = cell("mqar", ":pairs=32", 2, small.Letters())
    backend = small.make()
    got = dict(backend.answer([request for sample in samples for request in sample.requests]))
    assert len(got) == 64 and all(one.rank >= 1 and one.logprob <= 0 for one in got.values())
    report = backend.report()
    assert report["tokens_read"] < report["tokens_asked"] / 6


def run(monkeypatch: pytest.MonkeyPatch, backend: Remembering, *arguments: str) -> int:
    monkeypatch.setattr("evalsuite.backends.load", lambda *args, **kwargs: backend)
    return cli.main(["run", "--model", "scripted:nothing", "--tasks", *arguments])


def test_capacity_is_read_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["capacity"]) == 3
    for limit in (20, 1000, 0):
        assert run(monkeypatch, Remembering(max(limit, 1)), "capacity", "--samples", "6") == 0
    capsys.readouterr()
    assert cli.main(["capacity"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    # The last 20 of n pairs are recalled: all of 16, 20 of 32 (asked are up to 32), 10 of 64.
    assert re.search(r" 6 +4\d\.?\d? ", shown["remembering-20"]) and "16: 1.00, 32: 0.6" in shown["remembering-20"]
    assert ">= 256" in shown["remembering-1000"] and " 2 to 2 " in shown["remembering-1"]
    records = [one for path in (tmp_path / "results" / "runs").iterdir() for one in read_records(path)]
    assert {one.length for one in records} == {None} and len(records) == 3 * 9 * 6 * 3
    assert "lines:pairs=256:gap=0:vocabulary=1024:queries=32" in {one.protocol for one in records}


def test_a_capacity_needs_records_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, Remembering(5), "mqar@lines:pairs=4", "--samples", "2") == 0
    with pytest.raises(DataError, match="no records of task capacity"):
        capacity.rows([Path("results")], lambda text: None)


@pytest.mark.parametrize("name", NAMES)
def test_needles_have_the_wording_of_ruler(trained: Callable, name: str) -> None:
    (protocol,) = recall(name).expand("needles:pairs=6")
    assert protocol.startswith("needles:pairs=6:gap=0:vocabulary=1024:queries=32")
    for sample in recall(name).samples(Setting(protocol, None, 2), trained("plain")):
        text = sample.requests[0].context.text
        first, *lines_, last = text.split("\n")
        assert first.startswith("A special magic number is hidden within the following text.")
        found = [re.fullmatch(r"One of the special magic numbers for (\S+-.+) is: (\d{7})\.", line) for line in lines_]
        assert all(found) and last.endswith("mentioned in the provided text is")
        values = {match[1]: match[2] for match in found}
        for request in sample.requests[:: 2 if recall(name).rewritten else 1]:
            key = re.findall(r"What is the special magic number for (.+?) mentioned", request.context.text)[0]
            assert request.continuation.text == f" {values[key]}"


def test_a_needle_model_s_capacity_is_measured_in_its_own_wording() -> None:
    keys, values = mqar.pools("needles", 50)
    assert len(set(keys)) == len(set(values)) == 50 and keys[:20] == mqar.pools("needles", 20)[0]
    lines_of = mqar.pools("lines", 50)
    assert not set(keys) & set(lines_of[0]) and mqar.pools("lines", 50) == lines_of
    found = planned([recall("capacity")], Ask((), 2, "needles"))
    assert [one.protocol.split(":")[1] for _, one in found] == [f"pairs={2**i}" for i in range(9)]
