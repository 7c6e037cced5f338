"""Backward chunk kernels: every gradient against autograd through the token loop in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.gdn2.kernels.oracle import EXTREME, Case, allowed, assert_close, device, draw, run
from tests.gdn2.kernels.test_triton_forward import VARIANTS, check


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(case: Case) -> None:
    check(case, torch.float32, backward=True)


@pytest.mark.parametrize("case", [VARIANTS["gdn2"], VARIANTS["mamba2"], VARIANTS["undecayed"]])
def test_half_precision(case: Case) -> None:
    check(case, torch.float16, backward=True)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_lengths(tokens: int, decay: str) -> None:
    check(Case(tokens, decay=decay), torch.float32, backward=True)


@pytest.mark.parametrize("key,value", [(60, 100), (128, 200), (4, 8)])
def test_widths(key: int, value: int) -> None:
    check(Case(20, key=key, value=value), torch.float32, backward=True)


@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("gates", [EXTREME, (float("-inf"),), (0.0, -1e-8)], ids=str)
def test_extreme_decay(decay: str, gates: tuple[float, ...]) -> None:
    check(Case(70, decay=decay, gates=gates), torch.float32, backward=True)


@pytest.mark.parametrize("rank", [1, 4, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_of_keys_within_and_beyond_reach(dtype: torch.dtype, rank: int) -> None:
    """Of the tiles of 32 channels one is in reach, one from the start of sixteen rows only, one in part not even so."""
    inputs = draw(Case(132, key=80, value=16, rank=rank, erase=rank == 1)).to(dtype, device())
    g = inputs.tensors["g"]
    assert g is not None
    first_rows = (torch.arange(132, device=g.device) % rank == 0)[:, None, None]
    g[..., 32:64] = -3.5 * first_rows
    g[..., 66:70] = -26.0 * first_rows
    g[:, 42, :, 72] = float("-inf") if rank != 4 else 0.0
    g[:, 44, :, 73] = float("-inf") if rank == 4 else 0.0
    exact = run(inputs.to(torch.float64), "reference", backward=True)
    assert_close(run(inputs, "triton", backward=True), exact, allowed(inputs, exact, backward=True))


def test_equal_keys() -> None:
    inputs = draw(Case(70)).to(torch.float32, device())
    k = inputs.tensors["k"]
    assert k is not None
    k[:, 5:60] = k[:, 5:6]
    inputs.tensors |= {"e": k.clone(), "g": torch.zeros_like(k)}
    exact = run(inputs.to(torch.float64), "reference", backward=True)
    assert_close(run(inputs, "triton", backward=True), exact, allowed(inputs, exact, backward=True))
