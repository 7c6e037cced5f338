"""Every needle of one context asked from one state, and the suite `memory`."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
import tasks
from evalsuite.plan import Ask, settings
from evalsuite.store import read_records
from evalsuite.types import Chosen, Response, Sample, Setting, Tokenizer
from gdn2.errors import UserError
from tasks.ruler.exact import SLACK
from tests.evalsuite import small
from tests.tasks.conftest import TRAINED
from tests.tasks.test_splice import Letters

EIGHT = "exact:needles=8:values=numbers"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def contexts(tokenizer: Tokenizer, length: int = 3000, protocol: str = EIGHT, count: int = 3) -> list[Sample]:
    return list(tasks.get("niah_all").samples(Setting(protocol, length, count), tokenizer))


@pytest.mark.parametrize("kind", TRAINED)
def test_every_needle_is_asked_about_the_same_context(trained: Callable, kind: str) -> None:
    tokenizer = trained(kind)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for sample in contexts(tokenizer):
        assert len(sample.requests) == 16 and len(sample.target) == 8
        generated, forced = sample.requests[::2], sample.requests[1::2]
        texts = [request.prompt.text for request in generated]
        assert len({text.rpartition("\nWhat is the special")[0] for text in texts}) == 1
        needles = {value: key for _, key, value in NEEDLE.findall(texts[0])}
        assert set(needles) == set(sample.target)
        for request, likelihood, value in zip(generated, forced, sample.target, strict=True):
            assert request.prompt.ids.tolist() == bos + tokenizer.encode(request.prompt.text)
            assert request.prompt.text.endswith(f"number for {needles[value]} mentioned in the provided text is")
            assert request.decision.references == (value,) and likelihood.continuation.text == f" {value}"
            assert likelihood.context is request.prompt and likelihood.ranked
        sizes = [len(request.prompt.ids) + request.max_tokens for request in generated]
        assert 3000 - 3 * SLACK <= max(sizes) <= 3000  # keys differ in tokens, and the longest is fitted


def test_needles_and_values_are_fields() -> None:
    task = tasks.get("niah_all")
    assert task.expand("exact") == (EIGHT,)
    several = task.expand("exact:needles=1/2:values=uuids")
    assert several == ("exact:needles=1:values=uuids", "exact:needles=2:values=uuids")
    for protocol, count in zip(several, (1, 2), strict=True):
        (sample,) = contexts(Letters(), 4000, protocol, 1)
        assert len(sample.requests) == 2 * count and all(len(value) == 36 for value in sample.target)
    with pytest.raises(UserError, match="needles '0' of niah_all is not a whole number from 1 to 9999"):
        task.expand("exact:needles=0")


def test_the_same_is_asked_whatever_the_tokenizer_and_length(trained: Callable) -> None:
    found = [
        [one.target for one in contexts(tokenizer, length)]
        for tokenizer, length in ((trained("plain"), 2500), (trained("letters"), 9000))
    ]
    assert found[0] == found[1]


def test_more_needles_than_fit_are_refused_with_a_length_that_does() -> None:
    with pytest.raises(UserError, match="too short for niah_all") as caught:
        contexts(Letters(), 1000, "exact:needles=40:values=numbers")
    need = int(re.findall(r"use at least (\d+)", str(caught.value))[0])
    assert len(contexts(Letters(), need + 40, "exact:needles=40:values=numbers", 1)[0].target) == 40


def test_scores_are_means_over_the_needles() -> None:
    task = tasks.get("niah_all")
    (sample,) = contexts(Letters(), count=1)
    responses = []
    for i, value in enumerate(sample.target):
        said = value if i < 6 else "no"
        responses += [Response(text=f" {said}."), Response(logprob=-1.0 * i, rank=i + 1, greedy=i == 0)]
    scores = {one.metric: (one.value, one.outcome) for one in task.score(sample, responses)}
    assert scores == {
        "string_match_all": (0.75, "partial"),
        "value_logprob": (-3.5, "partial"),
        "value_rank": (4.5, "partial"),
        "value_greedy": (0.125, "partial"),
    }
    silent = [Response(), Response(logprob=-1.0, greedy=False)] * 8
    assert task.score(sample, silent)[0].outcome == "nothing"
    assert task.score(sample, silent)[0].output == "\n" * 7


def test_a_model_reads_the_context_once() -> None:
    backend = small.make()
    (sample,) = contexts(small.Letters(), 6000, EIGHT, 1)
    got = dict(backend.answer(sample.requests))
    assert len(got) == 16 and not any(one.error for one in got.values())
    report = backend.report()
    assert report["tokens_asked"] > 80_000 and report["tokens_read"] < 12_000


def test_the_suite_asks_the_needle_tasks_forced_and_the_others_as_they_are() -> None:
    found = tasks.resolve("memory")
    assert all(isinstance(one, Chosen) for one in found)
    cells = [(task.name, one.protocol, one.length) for task, one in settings(found, Ask((1024,)))]
    assert [row for row in cells if row[0].startswith("niah_s")] == [
        (f"niah_single_{i}", "exact:forced=yes", 1024) for i in (1, 2, 3)
    ]
    names = list(dict.fromkeys(row[0] for row in cells))
    assert names == [*tasks.suites()["ruler"], "niah_all", "mqar", "capacity", "overwrite", "keep"]
    assert tasks.suites()["memory"] == tuple(names)
    assert len([row for row in cells if row[0] == "capacity"]) == 9
    assert {row[2] for row in cells if row[0] in ("mqar", "capacity", "overwrite", "keep")} == {None}


def test_a_run_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "scripted:perfect", "--tasks", "memory", "--lengths", "4k", "--samples", "1"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "niah_all" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"niah_all +exact:needles=8:values=numbers +4096 +string_match_all +1 +0 +1\.0000", out)
    assert re.search(r"niah_multivalue +exact:forced=yes +4096 +value_rank +1 +0 +\d", out)
    (directory,) = (tmp_path / "results" / "runs").iterdir()
    assert not [one for one in read_records(directory) if one.error]
    assert cli.main(command) == 0 and "0 samples answered" in capsys.readouterr().err
