"""Packed sequences: each one's numbers are those it has alone, bit for bit, and an empty one keeps its state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn2.kernels.triton import tuning
from tests.gdn2.kernels.oracle import Case, Inputs, device, draw, run
from tests.gdn2.kernels.test_triton_forward import check

LENGTHS = (17, 0, 70, 1, 65)


@pytest.mark.parametrize("decay", ["channel", "head", "none"])
@pytest.mark.parametrize("lengths", [(0, 1, 40, 0, 59), (64, 64), (1, 1, 1), (0, 0)], ids=str)
def test_packed_equals_the_loop(decay: str, lengths: tuple[int, ...]) -> None:
    check(Case(sum(lengths), lengths=lengths, decay=decay), torch.float32, backward=sum(lengths) > 0)


def alone(inputs: Inputs, n: int, start: int, length: int) -> Inputs:
    rows = {
        name: None if x is None else x[n : n + 1] if name == "state" else x[:, start : start + length]
        for name, x in inputs.tensors.items()
    }
    return replace(inputs, tensors=rows, cu_seqlens=None)


@pytest.mark.parametrize("case", [Case(153), Case(153, decay="head"), Case(153, heads=2, value_heads=2, erase=False)])
@pytest.mark.parametrize("segment", [0, 64])
def test_a_sequence_does_not_feel_its_neighbours(case: Case, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SEGMENT", segment)
    tuning._plan.cache_clear()
    inputs = draw(replace(case, lengths=LENGTHS)).to(torch.float32, device())
    together = run(inputs, "triton")
    start = 0
    for n, length in enumerate(LENGTHS):
        own = run(alone(inputs, n, start, length), "triton")
        assert torch.equal(own["o"], together["o"][:, start : start + length])
        assert torch.equal(own["last"], together["last"][n : n + 1])
        start += length
    tuning._plan.cache_clear()


def test_an_empty_sequence_keeps_its_state() -> None:
    inputs = draw(Case(5, lengths=(0, 5, 0))).to(torch.float32, device())
    last, state = run(inputs, "triton")["last"], inputs.tensors["state"]
    assert state is not None
    assert torch.equal(last[::2], state[::2])
    assert not torch.equal(last[1], state[1])
