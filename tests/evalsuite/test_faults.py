"""Exhausted memory changes no answer, what is not finite fails alone, a lost device or refuted model stops the run."""

import json
import math
import weakref

import pytest
import torch

from evalsuite import runfile
from evalsuite.backends import memory
from evalsuite.backends.memory import Shelf, cache_bytes_per_token, held_budget, raise_if_lost, too_large
from evalsuite.backends.native import load
from evalsuite.plan import Ask, make_plan
from evalsuite.runner import run
from evalsuite.show import outcome_line
from evalsuite.store import read_records
from evalsuite.types import Generate, Rolling
from gdn2.errors import DeviceLostError, SelfCheckError, UserError
from gdn2.models import State

ASK = Ask((256, 512), 3)


def go(directory, backend, tasks, ask=ASK):
    return run(make_plan(backend, tasks, ask), backend, directory, {}, lambda text: None)


def scores(directory):
    return {(r.key, r.metric): (r.score, r.output, r.logprob) for r in read_records(directory)}


@pytest.mark.parametrize(("tokens", "rows"), [(300, 10**9), (64, 10**9), (10**9, 3), (128, 1)])
def test_exhausted_memory_changes_no_answer(small, monkeypatch, tokens, rows):
    asked = small.requests(1)
    expected = small.answers(small.make(), asked)
    backend = small.make()
    limit = small.Limit(backend, monkeypatch, tokens, rows)
    assert small.answers(backend, asked) == expected
    assert limit.failures > 0 and len(backend.events) == limit.failures
    assert backend.batch_tokens <= tokens and {event["event"] for event in backend.events} == {"out of memory"}
    before = limit.failures
    assert small.answers(backend, asked[:3]) == expected[:3]
    assert limit.failures == before  # what was learned is kept


def test_without_shared_prefixes_too(small, monkeypatch):
    asked = small.requests(2)
    expected = small.answers(small.make(), asked)
    backend = small.make(share_prefixes=False)
    small.Limit(backend, monkeypatch, 100, 2)
    assert small.answers(backend, asked) == expected
    assert backend.report()["tokens_shared"] == 0


def test_at_the_smallest_budget_a_request_fails_by_name(small, monkeypatch):
    asked = small.requests(3)
    expected = small.answers(small.make(), asked)
    backend = small.make()
    small.Limit(backend, monkeypatch, 63)
    found = small.answers(backend, asked)
    fits = [i for i, (r, e) in enumerate(zip(asked, expected, strict=True)) if found[i] == e]
    failed = [i for i in range(len(asked)) if i not in fits]
    assert failed and fits
    assert all(found[i][4].startswith("oom: the device's memory is exhausted at 64 tokens") for i in failed)
    assert all(isinstance(asked[i], Rolling) for i in fits)  # the others begin with 130 tokens


def test_one_sequence_that_cannot_be_decoded_fails_by_name(small, monkeypatch):
    asked = small.requests(4)
    backend = small.make()
    expected = small.answers(small.make(), asked)
    small.Limit(backend, monkeypatch, rows=0)
    for request, found, right in zip(asked, small.answers(backend, asked), expected, strict=True):
        if isinstance(request, Generate):
            assert found[4] == "oom: the device's memory is exhausted decoding one sequence"
        else:
            assert found == right


def test_reading_waits_for_decoding_to_free_memory(small, monkeypatch):
    """At the smallest budget, a batch that fails beside live sequences is tried again when they have ended."""
    asked = small.requests(5)
    expected = small.answers(small.make(), asked)
    backend = small.make(batch_tokens=64, slots=2)
    forward = backend.model.forward
    works = []

    def crowded(ids, ragged, state=None):
        if works and works[-1].decoding:
            raise torch.OutOfMemoryError("out of memory")
        return forward(ids, ragged, state)

    monkeypatch.setattr(backend.model, "forward", crowded)
    from evalsuite.backends import native

    class Watched(native._Work):
        def __init__(self, *args):
            super().__init__(*args)
            works.append(self)

    monkeypatch.setattr(native, "_Work", Watched)
    assert small.answers(backend, asked) == expected
    assert backend.events


def test_faults_through_the_runner(tmp_path, small, toy, monkeypatch):
    tasks = [toy.Find(), toy.Choose()]
    assert go(tmp_path / "clean", small.make(), tasks).exit_code == 0
    backend = small.make()
    limit = small.Limit(backend, monkeypatch, 300)
    outcome = go(tmp_path / "little", backend, tasks)
    assert outcome.exit_code == 0 and limit.failures
    assert scores(tmp_path / "little") == scores(tmp_path / "clean")
    last = runfile.read(tmp_path / "little")["invocations"][-1]
    assert len(last["report"]["events"]) == limit.failures
    assert "memory was exhausted" in outcome_line(outcome)
    monkeypatch.setattr(backend, "self_check", dict)
    limit.tokens = 40  # the choices still fit
    outcome = go(tmp_path / "less", backend, tasks)
    assert (outcome.exit_code, outcome.status, outcome.failed) == (5, "incomplete", 6)
    failed = [r for r in read_records(tmp_path / "less") if r.error]
    assert {r.task for r in failed} == {"toy_find"} and all(r.error.startswith("oom: ") for r in failed)
    assert {r.outcome for r in failed} == {"error"}


def test_what_is_not_finite_fails_by_name_and_the_rest_goes_on(tmp_path, small, toy):
    """Only the four likelihoods of one sample meet the token whose embedding is not a number."""
    backend = small.make(tied=False)
    tasks = [toy.Choose()]
    assert go(tmp_path / "clean", backend, tasks).exit_code == 0
    backend.model.embed.weight[small.Letters().encode("2")[0]] = math.nan
    outcome = go(tmp_path / "bad", backend, tasks)
    assert outcome.exit_code == 5
    records = read_records(tmp_path / "bad")
    assert {r.error for r in records if r.sample_id == "2"} == {"values that are not finite, first in embedding"}
    assert {r.sample_id for r in records if r.error} == {"2"}
    expected = [r for r in read_records(tmp_path / "clean") if r.sample_id != "2"]
    found = [r for r in records if r.sample_id != "2"]
    assert [(r.key, r.metric, r.score) for r in found] == [(r.key, r.metric, r.score) for r in expected]


def test_a_lost_device_stops_the_run_and_keeps_what_was_answered(tmp_path, small, toy, monkeypatch):
    backend = small.make(slots=1)
    step, calls = backend.model.step, []

    def lost(ids, state):
        calls.append(1)
        if len(calls) > 60:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors")
        return step(ids, state)

    monkeypatch.setattr(backend.model, "step", lost)
    monkeypatch.setattr(backend, "self_check", dict)
    with pytest.raises(DeviceLostError, match="the device was lost: CUDA error: an illegal memory access") as caught:
        go(tmp_path, backend, [toy.Find()])
    assert caught.value.exit_code == 1
    kept = len(read_records(tmp_path))
    assert 0 < kept < 6
    assert runfile.read(tmp_path)["status"] == "failed"
    monkeypatch.setattr(backend.model, "step", step)
    outcome = go(tmp_path, backend, [toy.Find()])
    assert (outcome.before, outcome.answered, outcome.exit_code) == (kept, 6 - kept, 0)


def test_other_errors_are_no_lost_device():
    raise_if_lost(RuntimeError("shape mismatch"))
    raise_if_lost(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceLostError):
        raise_if_lost(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))


def test_a_refuted_model_is_not_asked(tmp_path, small, toy, monkeypatch):
    backend = small.make()
    mixer = backend.model.blocks()[0].mixer
    step = mixer.step

    def forgetful(x, state):
        state["memory"].mul_(0.5)
        return step(x, state)

    monkeypatch.setattr(mixer, "step", forgetful)
    with pytest.raises(SelfCheckError, match="the self check of small failed.*chunk against recurrent") as caught:
        go(tmp_path, backend, [toy.Find()])
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert read_records(tmp_path) == []


def test_the_run_file_holds_the_check_and_the_tokens(tmp_path, small, toy):
    outcome = go(tmp_path, small.make(), [toy.Find(), toy.Choose()])
    last = json.loads((tmp_path / "run.json").read_text())["invocations"][-1]
    check = last["provenance"]["self_check"]
    assert last["provenance"]["self_check_s"] > 0
    assert check["packed_against_single"] == 0.0 and 0 <= check["chunk_against_recurrent"] < 1e-3
    report = last["report"]
    assert report["tokens_asked"] > report["tokens_read"] > 0
    assert report["tokens_shared"] == report["tokens_asked"] - report["tokens_read"]
    assert f"{report['tokens_read']:,} read" in outcome_line(outcome)


def test_full_attention_is_told_before_memory_runs_out(small, monkeypatch):
    backend = small.make(("gdn2", "full"))
    # Keys and values of two heads of 16, fp32.
    assert cache_bytes_per_token(backend.model) == 2 * 2 * 16 * 4
    assert cache_bytes_per_token(small.make().model) == 0
    asked = small.requests(6)
    expected = small.answers(backend, asked)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 256 * 220)
    assert too_large(backend.model, 220) is None and too_large(small.make().model, 10**9) is None
    found = small.answers(backend, asked)
    long = [i for i, request in enumerate(asked) if not isinstance(request, Rolling) and expected[i] != found[i]]
    assert long and all("oom: full attention over" in found[i][4] for i in long)
    assert [found[i] for i in range(len(asked)) if i not in long] == [
        expected[i] for i in range(len(asked)) if i not in long
    ]


def test_memory_is_known_on_the_cpu():
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20
    assert held_budget(torch.device("cpu")) is None


def states(n, floats=100):
    return [State([{"memory": torch.full((1, floats), float(i))}], torch.tensor([i])) for i in range(n)]


@pytest.fixture
def away(monkeypatch):
    """Host memory by another name, so that the CPU counts as a device."""
    monkeypatch.setattr(memory, "HOST", torch.device("cpu:0"))
    moves = []
    move = memory._move
    monkeypatch.setattr(memory, "_move", lambda state, device: (moves.append(state), move(state, device)))
    return moves


def test_the_first_states_move_and_the_budget_holds(away):
    shelf = Shelf(1300)
    held = states(5)
    for state in held:
        shelf.put(state)
        shelf.put(state)
    assert not away
    shelf.settle()
    assert away == held[:2] and shelf.moved_bytes == 800
    shelf.settle()
    assert len(away) == 2
    shelf.shrink()
    assert shelf.budget == 650 and away == held[:4]
    assert [s.layers[0]["memory"][0, 0].item() for s in held] == [0, 1, 2, 3, 4]


def test_states_nobody_waits_for_are_not_counted_nor_kept(away):
    shelf = Shelf(500)
    held = states(3)
    refs = [weakref.ref(state) for state in held]
    for state in held:
        shelf.put(state)
    del held[:2], state
    shelf.settle()
    assert not away and [ref() is None for ref in refs] == [True, True, False]


def test_without_a_budget_nothing_moves(away):
    shelf = Shelf(None)
    shelf.put(states(1)[0])
    shelf.settle()
    shelf.shrink()
    assert not away


def test_states_in_host_memory_change_no_answer(small, away):
    asked = small.requests(7)
    expected = small.answers(small.make(), asked)
    backend = small.make(batch_tokens=256, slots=4)
    backend.shelf = Shelf(1)
    assert small.answers(backend, asked) == expected
    assert len(away) > 3 and backend.report()["states_moved_bytes"] > 0


@pytest.mark.gpu
def test_states_move_off_a_gpu_and_come_back(small):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    asked = small.requests(8)
    backend = small.make(batch_tokens=256, slots=4)
    backend.model.to("cuda")
    backend = type(backend)(backend.model, backend.tokenizer, backend.info, 256, 4)
    assert backend.shelf.budget
    expected = small.answers(backend, asked)
    backend.shelf = Shelf(1)
    assert small.answers(backend, asked) == expected
    assert backend.shelf.moved_bytes > 0


def test_a_process_works_on_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(UserError, match="device 'cuda:2' is not there: torch sees 2 GPUs"):
        load("nowhere", device="cuda:2")
    with pytest.raises(UserError):  # there is no such model
        load("nowhere", device="cuda:1")
    assert chosen == [torch.device("cuda:1")]
