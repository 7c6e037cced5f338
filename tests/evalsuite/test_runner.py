"""The runner: what is answered is stored, what fails is said, and a second run does nothing."""

import dataclasses
import json
import math
import os
import signal
import threading
import time

import pytest

from evalsuite import runfile
from evalsuite.backends.scripted import ScriptedBackend, perfect
from evalsuite.plan import Ask, make_plan
from evalsuite.progress import Bar, Lines, duration
from evalsuite.runner import run
from evalsuite.schema import NewerSchemaError
from evalsuite.store import read_records
from evalsuite.types import LogLikelihood, Response
from gdn2.errors import DataError, StorageError

ASK = Ask((256, 512), 3)


def go(directory, backend, tasks, ask=ASK, progress=None):
    plan = make_plan(backend, tasks, ask)
    warnings = []
    outcome = run(plan, backend, directory, {"tasks": "toy"}, warnings.append, progress)
    assert warnings == []
    return plan, outcome


def timeless(record):
    return dataclasses.replace(record, latency_s=0.0, created_at="")


def content(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_every_sample_becomes_its_records(tmp_path, toy):
    plan, outcome = go(tmp_path, ScriptedBackend(perfect), [toy.Find(), toy.Choose()])
    assert (outcome.planned, outcome.before, outcome.answered, outcome.failed) == (9, 0, 9, 0)
    assert outcome.status == "complete" and outcome.exit_code == 0
    records = read_records(tmp_path)
    assert len(records) == 6 + 3 * 2
    found = [r for r in records if r.task == "toy_find"]
    assert all(r.score == 1.0 and r.decided_early and r.outcome == "target" for r in found)
    assert all(200 < r.prompt_tokens <= r.length and r.output == r.target for r in found)
    assert [r.depth for r in found][:3] == [0.0, 1 / 12, 2 / 12] and found[0].metric_count == 1
    chosen = [r for r in records if r.task == "toy_choose"]
    assert {r.metric for r in chosen} == {"acc", "acc_norm"}
    assert all(r.length is None and r.metric_count == 2 and r.logprob is None for r in chosen)
    assert all(r.run_id == plan.run_id and r.checkpoint == plan.info.checkpoint for r in records)


def test_a_second_run_does_nothing(tmp_path, toy):
    go(tmp_path, ScriptedBackend(perfect), [toy.Find()])
    before = content(tmp_path)

    def never(prompt):
        raise AssertionError("asked again")

    _, outcome = go(tmp_path, ScriptedBackend(never), [toy.Find()])
    assert (outcome.before, outcome.answered, outcome.exit_code) == (6, 0, 0)
    assert content(tmp_path) == before


def test_a_larger_run_adds_only_the_difference(tmp_path, toy):
    _, first = go(tmp_path, ScriptedBackend(perfect), [toy.Find()])
    _, second = go(tmp_path, ScriptedBackend(perfect), [toy.Find(), toy.Choose()], Ask((512, 1024), 5))
    assert (second.planned, second.before, second.answered) == (15, 3, 12)
    assert len(read_records(tmp_path)) == first.answered + 2 + 5 + 5 * 2
    assert len(runfile.read(tmp_path)["invocations"]) == 2


def test_a_failed_request_is_recorded_and_asked_again(tmp_path, toy):
    def fail(request):
        return "device sneezed" if isinstance(request, LogLikelihood) else None

    tasks = [toy.Find(), toy.Choose()]
    _, outcome = go(tmp_path, ScriptedBackend(perfect, fail=fail), tasks)
    assert (outcome.answered, outcome.failed, outcome.status, outcome.exit_code) == (9, 3, "incomplete", 5)
    failed = [r for r in read_records(tmp_path) if r.error]
    assert {(r.metric, r.error, r.score, r.outcome) for r in failed} == {
        ("acc", "device sneezed", None, "error"),
        ("acc_norm", "device sneezed", None, "error"),
    }
    _, outcome = go(tmp_path, ScriptedBackend(perfect), tasks)
    assert (outcome.before, outcome.answered, outcome.exit_code) == (6, 3, 0)
    assert not [r for r in read_records(tmp_path) if r.error] and len(read_records(tmp_path)) == 12


class Odd(ScriptedBackend):
    """Answers the requests with one given response."""

    def __init__(self, response):
        super().__init__(perfect)
        self.response = response

    def answer(self, requests):
        yield from ((i, self.response) for i in range(len(requests)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_likelihood_that_is_no_number_is_an_error(tmp_path, toy, value):
    _, outcome = go(tmp_path, Odd(Response(logprob=value, greedy=True)), [toy.Choose()])
    assert outcome.failed == 3 and outcome.exit_code == 5
    assert {r.error for r in read_records(tmp_path)} == {"the model's log-probability is not a finite number"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_is_an_error(tmp_path, toy, value):
    class Bad(toy.Find):
        def score(self, sample, responses):
            return [dataclasses.replace(s, value=value) for s in super().score(sample, responses)]

    _, outcome = go(tmp_path, ScriptedBackend(perfect), [Bad()])
    assert outcome.failed == 6 and all(r.score is None for r in read_records(tmp_path))


def test_a_score_that_raises_costs_one_sample(tmp_path, toy):
    class Bad(toy.Find):
        def score(self, sample, responses):
            if sample.id == "1" and responses[0].text:
                raise KeyError("odd output")
            return super().score(sample, responses)

    _, outcome = go(tmp_path, ScriptedBackend(perfect), [Bad()])
    assert (outcome.answered, outcome.failed) == (6, 2)
    errors = [r for r in read_records(tmp_path) if r.error]
    assert {(r.sample_id, r.metric, r.error) for r in errors} == {
        ("1", "match", "scoring failed: KeyError: 'odd output'")
    }


def test_answers_in_any_order_make_the_same_records(tmp_path, toy):
    class Backwards(ScriptedBackend):
        def answer(self, requests):
            yield from reversed(list(super().answer(requests)))

    tasks = [toy.Find(), toy.Choose()]
    go(tmp_path / "a", ScriptedBackend(perfect), tasks)
    go(tmp_path / "b", Backwards(perfect), tasks)
    one, two = (sorted(map(timeless, read_records(tmp_path / d)), key=lambda r: (r.key, r.metric)) for d in "ab")
    assert one == two
    assert [r.sample_id for r in read_records(tmp_path / "b")][0] == "2"


def test_an_answer_that_never_comes_is_an_error_and_one_too_many_a_bug(tmp_path, toy):
    class Lazy(ScriptedBackend):
        def answer(self, requests):
            yield from list(super().answer(requests))[:-1]

    class Eager(ScriptedBackend):
        def answer(self, requests):
            first = next(super().answer(requests))
            yield from (first, first)

    _, outcome = go(tmp_path / "lazy", Lazy(perfect), [toy.Find()])
    assert outcome.failed == 1
    assert [r.error for r in read_records(tmp_path / "lazy") if r.error] == ["no answer came back"]
    with pytest.raises(ValueError, match="answered request 0 twice"):
        go(tmp_path / "eager", Eager(perfect), [toy.Choose()])


def test_a_backend_that_dies_keeps_what_it_answered(tmp_path, toy):
    class Dying(ScriptedBackend):
        def answer(self, requests):
            for index, response in super().answer(requests):
                if index == 4:
                    raise RuntimeError("illegal memory access")
                yield index, response

    with pytest.raises(RuntimeError, match="illegal memory access"):
        go(tmp_path, Dying(perfect), [toy.Find()])
    assert len(read_records(tmp_path)) == 4 and runfile.read(tmp_path)["status"] == "failed"
    _, outcome = go(tmp_path, ScriptedBackend(perfect), [toy.Find()])
    assert (outcome.before, outcome.answered) == (4, 2) and runfile.read(tmp_path)["status"] == "complete"


def test_a_disk_that_fills_up_stops_the_run(tmp_path, toy, monkeypatch):
    from evalsuite.store import RunStore

    append = RunStore.append

    def filling(self, records):
        if len(read_records(tmp_path)) == 2:
            raise StorageError(f"cannot write {self.path}: No space left on device (0 bytes free)")
        append(self, records)

    class Closing(ScriptedBackend):
        closed = False

        def answer(self, requests):
            try:
                yield from super().answer(requests)
            finally:
                self.closed = True

    monkeypatch.setattr(RunStore, "append", filling)
    backend = Closing(perfect)
    with pytest.raises(StorageError, match="No space") as caught:
        go(tmp_path, backend, [toy.Find()])
    assert backend.closed and caught.value.exit_code == 6
    assert len(read_records(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_keeps_the_answers(tmp_path, toy, number):
    class Slow(ScriptedBackend):
        closed = False

        def answer(self, requests):
            try:
                for index, response in super().answer(requests):
                    if index == 3:
                        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
                        time.sleep(20)
                    yield index, response
            finally:
                self.closed = True

    before = signal.getsignal(number)
    backend = Slow(perfect)
    start = time.monotonic()
    _, outcome = go(tmp_path, backend, [toy.Find()])
    assert time.monotonic() - start < 5 and backend.closed
    assert (outcome.answered, outcome.status, outcome.exit_code) == (3, "interrupted", 128 + number)
    assert len(read_records(tmp_path)) == 3 and signal.getsignal(number) is before
    assert runfile.read(tmp_path)["status"] == "interrupted"


def test_hostile_text_is_stored_without_loss(tmp_path, toy):
    hostile = "\x1b]0;pwn\x07\x00\ud800 [/INST] \u202e </script> =cmd() \\input{x}\r\n"
    plan, _ = go(tmp_path, ScriptedBackend(lambda prompt: hostile), [toy.Find()])
    tokenizer = ScriptedBackend(perfect).tokenizer
    kept = tokenizer.decode(tokenizer.encode(hostile)[:16])
    assert {r.output for r in read_records(tmp_path)} == {kept} and "\x1b" in kept and "\ud800" in kept


def test_run_json_says_what_ran(tmp_path, toy):
    plan, _ = go(tmp_path, ScriptedBackend(perfect), [toy.Find()])
    saved = runfile.read(tmp_path)
    assert saved["id"] == plan.run_id and saved["identity"]["checkpoint"] == plan.info.checkpoint
    assert saved["model"]["details"]["identity"]["device"] == "cpu" and saved["totals"]["samples"] == 6
    (invocation,) = saved["invocations"]
    assert invocation["passed"] == {"tasks": "toy"} and invocation["status"] == "complete"
    assert invocation["resolved"][0]["length"] == 256 and invocation["resolved"][0]["data"] == "grass"
    assert invocation["provenance"]["python"] and runfile.rate(tmp_path) > 0


@pytest.mark.parametrize("field", ["checkpoint", "tokenizer", "options"])
def test_a_directory_of_another_run_is_refused_by_field(tmp_path, toy, field):
    go(tmp_path, ScriptedBackend(perfect), [toy.Find()])
    path = tmp_path / "run.json"
    saved = json.loads(path.read_text())
    saved["identity"][field] = "other"
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match=f"whose {field} is 'other'"):
        go(tmp_path, ScriptedBackend(perfect), [toy.Find()], Ask((256, 512), 4))
    path.write_text(json.dumps(saved | {"version": 2}))
    with pytest.raises(NewerSchemaError, match="version 2 is newer"):
        go(tmp_path, ScriptedBackend(perfect), [toy.Find()], Ask((256, 512), 4))


def test_progress_speaks_every_ten_seconds_and_counts_tokens():
    said, times = [], iter([0.0, 4.0, 11.0, 12.0, 22.0])
    lines = Lines(said.append, lambda: next(times))
    lines.start(4, 4000)
    for tokens, failed in [(100, False), (1000, True), (900, False), (200, False)]:
        lines.advance(tokens, failed)
    assert said == ["2/4 samples, 1 failed, 100 tokens/s, 29 s left", "4/4 samples, 1 failed, 100 tokens/s, 18 s left"]
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3600, 90061)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "25 h 01 min"
    ]  # fmt: skip


def test_the_bar_counts_samples_and_failures_on_standard_error(capsys):
    bar = Bar()
    bar.start(3, 300)
    bar.advance(100, False)
    bar.advance(100, True)
    bar.close()
    out, err = capsys.readouterr()
    assert out == "" and "67%" in err and "2/3 samples, 1 failed" in err


def test_a_sample_without_requests_is_scored(tmp_path, toy):
    class Empty(toy.Find):
        def samples(self, setting, tokenizer):
            return [dataclasses.replace(s, requests=()) for s in super().samples(setting, tokenizer)]

        def score(self, sample, responses):
            return [dataclasses.replace(s, value=0.0) for s in super().score(sample, [Response(text="")])]

    _, outcome = go(tmp_path, ScriptedBackend(perfect), [Empty()])
    assert outcome.answered == 6 and {r.score for r in read_records(tmp_path)} == {0.0}
