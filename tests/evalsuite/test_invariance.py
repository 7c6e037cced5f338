"""Whatever is asked together, in whatever order and pieces, an answer is the same, bit for bit."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.types import Generate, LogLikelihood, Rolling

RECURRENT = ("gdn2", "gdn", "kda", "deltanet", "mamba2", "mamba3-siso", "mamba3-mimo")
PATTERNS = [(name, name) for name in RECURRENT] + [(name, "window") for name in RECURRENT] + [("gdn2", "full")]


def draw(small, rng):
    """Up to eight requests; half of them begin like an earlier one."""
    out, fronts = [], [[]]
    for _ in range(rng.randrange(2, 9)):
        front = rng.choice(fronts)
        front = front[: rng.randrange(len(front) + 1)]
        kind = rng.randrange(3)
        start = small.prompt(rng, rng.choice([1, 7, 63, 64, 65, 90, 140]), front)
        fronts.append(start.ids.tolist())
        if kind == 0:
            out.append(Generate(start, rng.randrange(1, 7)))
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
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_nor_on_a_gpu_in_bf16(small, pattern):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for seed in range(4):
        check(small, pattern, random.Random(seed), gpu=True)


def check(small, pattern, rng, gpu=False):
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
