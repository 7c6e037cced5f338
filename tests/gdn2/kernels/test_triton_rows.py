"""Norm and activation of whole rows, against what plain torch says of the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdn2 import numerics
from gdn2.kernels.triton import rows
from tests.gdn2.kernels.memory import guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = 4 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 2
    return guarded(x.to(dtype).to(DEVICE))


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """`numerics.rms_norm` as training has it."""
    with torch.enable_grad():
        return numerics.rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("shape", [(1, 16), (37, 100), (5, 2304), (3, 5000), (9, 4, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_training_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = drawn(*shape, dtype=dtype), drawn(shape[-1], seed=1, dtype=torch.bfloat16)
    found, want = rows.rms_norm(x, weight, 1e-5), plain(x, weight)
    assert found.dtype == dtype and found.shape == x.shape
    torch.testing.assert_close(found, want, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        return  # the interpreter cuts bits off where a GPU rounds
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert (found - exact).norm() <= (1.001 * (want - exact).norm() + 1e-6 * exact.norm())


def test_groups_of_a_row_have_weights_of_their_own() -> None:
    x, weight = drawn(6, 3, 32), drawn(3, 32, seed=1)
    torch.testing.assert_close(rows.rms_norm(x, weight, 1e-5), plain(x, weight))


@pytest.mark.parametrize("shape", [(1, 8), (33, 416)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_silu_of_one_times_the_other(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, by = drawn(*shape, dtype=dtype), drawn(*shape, seed=1, dtype=dtype)
    rtol = 1.6e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rows.silu_times(x, by), F.silu(x) * by, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("width", [32, 128, 2304])
def test_a_row_is_the_same_in_every_batch(width: int) -> None:
    x, by, weight = drawn(70, width), drawn(70, width, seed=1), drawn(width, seed=2)
    for part in (slice(0, 1), slice(13, 47)):
        assert torch.equal(rows.rms_norm(x[part], weight, 1e-5), rows.rms_norm(x, weight, 1e-5)[part])
        assert torch.equal(rows.silu_times(x[part], by[part]), rows.silu_times(x, by)[part])


def test_what_is_not_taken() -> None:
    assert rows.rms_norm(drawn(0, 16), drawn(16), 1e-5).shape == (0, 16)
    assert rows.silu_times(drawn(0, 16), drawn(0, 16)).shape == (0, 16)
    with pytest.raises(ValueError, match="float64"):
        rows.rms_norm(drawn(1, 16).double(), drawn(16), 1e-5)


@pytest.mark.gpu
def test_inference_on_a_gpu_uses_them() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x, weight = drawn(70, 96, dtype=torch.bfloat16), drawn(96, seed=1, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(numerics.rms_norm(x, weight, 1e-5), rows.rms_norm(x, weight, 1e-5))
        assert torch.equal(numerics.silu_times(x, x), rows.silu_times(x, x))
