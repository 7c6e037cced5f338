"""The pool a GPU decodes in, run on a CPU without its capture, and on a GPU with it."""

import random

import numpy as np
import pytest
import torch

from evalsuite.backends import native, pool
from evalsuite.backends.reading import Coming, Reader
from evalsuite.backends.sampling import form, greedy
from evalsuite.types import Decision, Generate, LogLikelihood, Sampling

PATTERNS = [("gdn2", "gdn2"), ("mamba2", "window"), ("mamba3-mimo", "mamba3-siso")]


@pytest.fixture
def pooled(monkeypatch):
    """Backends made after this decode in a pool and look ahead while they read, as on a GPU."""
    monkeypatch.setattr(native, "pooled", lambda model: True)
    made = Reader.__init__

    def ahead(self, *given):
        made(self, *given)
        self._ahead = True

    monkeypatch.setattr(Reader, "__init__", ahead)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def generations(small, seed, n=13, sampled=True):
    """Prompts that end at many times: by length, by a stop string, decided, or at the model's own end."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        letters = rng.sample([chr(48 + i) for i in range(64)], 24)
        stop = rng.choice([(), tuple(letters[:12])])
        decision = rng.choice([None, Decision(tuple(letters[12:]), "any")])
        start = small.prompt(rng, rng.choice([1, 20, 64, 65, 100]))
        sampling = rng.choice([None, small.sampling(rng)]) if sampled else None
        out.append(Generate(start, rng.randrange(1, 12), stop, decision, sampling))
    return out


@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_a_pool_says_what_single_steps_say(small, pattern, slots, pooled):
    ends = set()
    for seed in range(3):
        asked = generations(small, seed)
        found = small.answers(small.make(pattern, slots=slots), asked)
        ends |= {ended for *_, ended, _ in found}
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(native, "pooled", lambda model: False)
            assert found == small.answers(small.make(pattern), asked)
    assert len(ends) > 1


def test_requests_of_every_kind_are_read_ahead(small, pooled):
    asked = small.requests(5)
    backend = small.make(batch_tokens=128, slots=3)
    found = small.answers(backend, asked)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(Reader, "_ahead", False, raising=False)
        assert found == small.answers(small.make(), asked)
    assert backend.tokens_read <= backend.tokens_asked


def test_a_pool_draws_only_while_somebody_samples(small, pooled, monkeypatch):
    """Greedy answers beside sampled ones are those without them, and alone they make no noise."""
    rng = random.Random(8)
    plain = [Generate(small.prompt(rng, 30), 12) for _ in range(4)]
    ways = (Sampling(20.0, 1), Sampling(20.0, 2, 0.9), Sampling(20.0, 3, top_k=9))
    drawn = [Generate(small.prompt(rng, 30), size, sampling=way) for size, way in zip((9, 5, 5), ways, strict=True)]
    backend, kinds = small.make(), []
    made = pool.Pool.draw
    monkeypatch.setattr(pool.Pool, "draw", lambda self, kind: (kinds.append(kind), made(self, kind))[1])
    found = small.answers(backend, [*plain, *drawn])
    assert {"greedy", "drawn", "cut"} == set(kinds)
    assert found == [small.answers(small.make(), [one])[0] for one in [*plain, *drawn]]
    monkeypatch.setattr(pool, "drawn", lambda *given: pytest.fail("noise was made"))
    assert small.answers(backend, plain) == found[:4]


def test_a_pool_grows_by_doubling_and_keeps_who_is_in_it(small, pooled, monkeypatch):
    sizes = []
    made = pool.Pool.__init__

    def counted(self, model, size, note):
        sizes.append(size)
        made(self, model, size, note)

    monkeypatch.setattr(pool.Pool, "__init__", counted)
    rng = random.Random(2)
    backend = small.make(batch_tokens=64, slots=6)
    asked = [Generate(small.prompt(rng, 60), 12) for _ in range(9)]
    together = small.answers(backend, asked)
    assert sizes == sorted(set(sizes)) and sizes[-1] <= 6
    assert together == [small.answers(small.make(), [one])[0] for one in asked]


def test_a_pool_serves_the_next_call_while_the_model_stays_as_it_is(small, pooled, monkeypatch):
    made = []
    init = pool.Pool.__init__
    monkeypatch.setattr(pool.Pool, "__init__", lambda self, *given: (made.append(given[1]), init(self, *given))[1])
    asked = generations(small, 5, n=6)
    backend = small.make()
    expected = small.answers(backend, asked)
    assert small.answers(backend, asked) == expected and small.answers(backend, asked[:2]) == expected[:2]
    assert len(made) == 1
    for parameter in backend.model.parameters():
        parameter.data = parameter.data.clone()
    assert small.answers(backend, asked) == expected and len(made) == 2
    backend.model.fast = True
    small.answers(backend, asked)
    assert len(made) == 3 and len(backend.pools) == 1


def test_memory_that_runs_out_while_decoding_in_a_pool(small, pooled, monkeypatch):
    asked = generations(small, 4, n=9)
    expected = small.answers(small.make(), asked)
    backend = small.make(slots=8)
    limit = small.Limit(backend, monkeypatch, rows=4)
    assert small.answers(backend, asked) == expected
    assert limit.failures and backend.slots <= 4
    assert {event["while"] for event in backend.events} == {"decoding"}


def test_a_step_of_a_row_that_had_ended_is_not_read(small, pooled):
    """Ended at its first token: the second is on its way already, and must not be appended."""
    rng = random.Random(3)
    start = small.prompt(rng, 30)
    ((_, free),) = small.make().answer([Generate(start, 8)])
    ((_, cut),) = small.make().answer([Generate(start, 8, stop=(free.text[2],))])
    assert cut.text == free.text[: free.text.index(free.text[2])] and cut.ended == "stop"
    ((_, two),) = small.make().answer([Generate(start, 2)])
    assert two.text == free.text[:2] and two.tokens == 2 and two.ended == "length"


def test_values_that_are_not_finite_fail_in_a_pool_by_name(small, pooled):
    backend = small.make()
    rng = random.Random(6)
    good = [Generate(small.prompt(rng, 20), 5) for _ in range(3)]
    expected = small.answers(backend, good)
    step = backend.model.logits

    def spoiled(hidden, *, stepped=False):
        logits = step(hidden, stepped=stepped)
        if stepped:
            logits[1] = float("nan")
        return logits

    backend.model.logits = spoiled
    found = small.answers(backend, good)
    failed = [i for i, (*_, error) in enumerate(found) if error is not None]
    assert len(failed) == 1 and "not finite after 1 generated tokens" in found[failed[0]][4]
    assert [f for i, f in enumerate(found) if i not in failed] == [e for i, e in enumerate(expected) if i not in failed]


def test_greedy_marks_rows_that_are_not_finite():
    rows = torch.tensor([[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0], [float("inf"), 0.0, 0.0]])
    assert greedy(rows).tolist() == [1, -1, -1]
    assert Coming([torch.arange(2), torch.arange(2)]).numbers() == [0, 1, 0, 1]
    assert Coming([]).numbers() == []


def test_a_step_that_cannot_be_captured_is_made_plainly_and_noted(small, monkeypatch):
    """Capture itself needs a GPU: what stands in for it here fails as torch does."""
    notes = []
    model = small.make().model

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

        def __exit__(self, *problem):
            pass

    made = pool.Pool(model, 2, notes.append)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.inference_mode())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    with torch.inference_mode():
        assert made._captured() == made._step
    assert notes == ["a step could not be captured: CUDA error: operation not permitted when stream is capturing"]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_a_captured_step_is_the_step(small, pattern, kernels, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    asked = [request for seed in range(4) for request in generations(small, seed)]
    assert {form([request.sampling]) for request in asked} == {"greedy", "drawn", "cut"}
    backend = small.make(pattern, gpu=kernels)
    found = small.answers(backend, asked)
    assert not backend.events  # each step was captured, those that draw too
    monkeypatch.setattr(pool.Pool, "_captured", lambda self: self._step)
    assert found == small.answers(small.make(pattern, gpu=kernels), asked)
    monkeypatch.setattr(native, "pooled", lambda model: False)
    assert found == small.answers(small.make(pattern, gpu=kernels), asked)


@pytest.mark.gpu
def test_one_answer_per_request_while_slots_are_refilled_on_a_gpu(small):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rng = random.Random(9)
    ways = [None, Sampling(20.0, 3), Sampling(20.0, 4, 0.9)]  # in turn: rows of every kind meet in a step
    asked = [
        Generate(small.prompt(rng, rng.randrange(1, 200)), rng.randrange(1, 30), sampling=ways[i % 3])
        for i in range(200)
    ]
    asked += [LogLikelihood(r.prompt, small.prompt(rng, 3)) for r in asked[:50]]
    few = rng.sample(range(len(asked)), 12)
    found = small.answers(small.make(gpu="torch", slots=16), asked)
    for i in few:
        assert found[i] == small.answers(small.make(gpu="torch"), [asked[i]])[0]
    assert np.mean([error is None for *_, error in found]) == 1.0
