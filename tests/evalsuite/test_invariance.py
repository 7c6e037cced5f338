"""Whatever is asked together, in whatever order and pieces, an answer is the same, bit for bit."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.types import Generate, LogLikelihood, Rolling
from gdn2.ragged import Ragged

RECURRENT = ("gdn2", "gdn", "kda", "deltanet", "mamba2", "mamba3-siso", "mamba3-mimo")
PATTERNS = [(name, name) for name in RECURRENT] + [(name, "window") for name in RECURRENT] + [("gdn2", "full")]


def draw(small, rng):
    """Requests of every kind, greedy and sampled; half of them begin like an earlier one."""
    out, fronts = [], [[]]
    for _ in range(rng.randrange(2, 9)):
        front = rng.choice(fronts)
        front = front[: rng.randrange(len(front) + 1)]
        kind = rng.randrange(3)
        start = small.prompt(rng, rng.choice([1, 7, 63, 64, 65, 90, 140]), front)
        fronts.append(start.ids.tolist())
        if kind == 0:
            size, sampling = rng.randrange(1, 7), rng.choice([None, small.sampling(rng)])
            out += [Generate(start, size, sampling=sampling)] * rng.choice([1, 2])
            if sampling is not None:
                out.append(Generate(start, size, sampling=replace(sampling, seed=sampling.seed ^ 1)))
        elif kind == 1:
            out.append(LogLikelihood(start, small.prompt(rng, rng.randrange(1, 6))))
        else:
            out.append(Rolling(start, rng.choice([None, 50, 64])))
    return out


@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_no_answer_depends_on_the_rest(small, pattern, seed):
    check(small, pattern, random.Random(seed))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_nor_on_a_gpu_in_bf16(small, pattern, kernels):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for seed in range(3):
        check(small, pattern, random.Random(seed), gpu=kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("pattern", [*PATTERNS[:1], *PATTERNS[4:6], *PATTERNS[7:8], PATTERNS[-1]], ids="+".join)
def test_nor_on_the_cuts_of_long_sequences(small, pattern, kernels):
    """Longer than what kernels do in one go or split by themselves."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rng = random.Random(1)
    front = small.prompt(rng, 5000).ids.tolist()
    asked = [Generate(small.prompt(rng, n, front), 4, sampling=small.sampling(rng)) for n in (1, 1500, 8300)]
    asked += [Generate(small.prompt(rng, n), 4) for n in (2100, 9001)]
    asked += [LogLikelihood(small.prompt(rng, n), small.prompt(rng, 2)) for n in (1000, 4200)]
    alone = [small.answers(small.make(pattern, 16384, gpu=kernels), [request])[0] for request in asked]
    for tokens in (640, 4160, 8192):
        assert small.answers(small.make(pattern, tokens, gpu=kernels), asked) == alone


def check(small, pattern, rng, gpu=None):
    """Answer some requests alone, then shuffled and together under a random budget."""
    asked = draw(small, rng)
    alone = [small.answers(small.make(pattern, gpu=gpu), [request])[0] for request in asked]
    order = rng.sample(range(len(asked)), len(asked))
    backend = small.make(
        pattern, rng.choice([64, 128, 192, 8192]), rng.choice([1, 2, 3, 64]), rng.random() < 0.7, gpu=gpu
    )
    found = small.answers(backend, [asked[i] for i in order])
    assert [found[order.index(i)] for i in range(len(asked))] == alone
    assert all(error is None for *_, error in alone)


@pytest.mark.parametrize("pattern", [(name, name) for name in RECURRENT], ids="+".join)
def test_token_form_and_prefill_of_compiled_loops_differ_by_rounding_at_most(small, pattern):
    """The loops themselves are the same; the products around them are made of other numbers of rows."""
    pytest.importorskip("numba")
    backend = small.make(pattern)
    model = backend.model
    assert backend.info.details["identity"]["kernels"] == "numba"
    ids = torch.randint(1, 64, (150,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole, end = model(ids, Ragged([150]))
        state = model.new_state(1)
        steps = torch.cat([model.step(ids[t : t + 1], state) for t in range(150)])
    assert (steps - whole).abs().max() <= 1e-5 * whole.abs().max()
    for mine, theirs in zip(state.layers, end.layers, strict=True):
        for key in mine:
            scale = theirs[key].abs().max().clamp_min(1)
            assert (mine[key] - theirs[key]).abs().max() <= 1e-4 * scale, key


def test_threads_change_no_bit(small):
    """Work is cut between threads at sequences and heads, or at blocks of rows."""
    rng = random.Random(7)
    asked = draw(small, rng) + [Generate(small.prompt(rng, 300), 5)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(small.answers(small.make(("gdn2", "window")), asked))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
