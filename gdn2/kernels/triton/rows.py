"""What surrounds the mixers of a block, one kernel each and without gradients: RMSNorm, and SiLU of one tensor times
another. Both round where the plain operations of `gdn2.numerics` do.

Which rows a program takes, how many warps and the order of every sum depend on widths alone, so a row's result does not
depend on the rows beside it.

Axes: M rows, D width, G weights that rows take in turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton import refuse_fp64

ELEMENTS = 4096  # that a program of narrow rows takes


@triton.jit
def rms_norm_kernel(x, weight, y, M, G, eps, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    mask = (row < M)[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BM, BD]
    w = tl.load(weight + (row % G)[:, None] * D + col[None, :], mask=mask, other=0.0).to(y.dtype.element_ty)
    unit = a * (1.0 / tl.sqrt_rn(tl.sum(a * a, 1) / D + eps))[:, None]
    tl.store(y + at, unit.to(y.dtype.element_ty).to(tl.float32) * w.to(tl.float32), mask=mask)


@triton.jit
def silu_times_kernel(x, by, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    b = tl.load(by + at, mask=at < N, other=0.0).to(tl.float32)
    silu = (a / (1.0 + tl.exp(-a))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, silu * b, mask=at < N)


def tiles(width: int) -> dict[str, int]:
    """Rows a program and warps for rows of `width`; nothing else decides them."""
    bd = triton.next_power_of_2(width)
    warps = min(4 * max(bd // ELEMENTS, 1), 16)
    return {"BD": bd, "BM": max(ELEMENTS // bd, 1), "num_warps": warps, "enable_fp_fusion": True}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, returned in x's dtype.

    Args:
        x: [..., D].
        weight: [D], or of more axes that belong to the last ones of x.

    Raises:
        ValueError: fp64.
    """
    refuse_fp64(x, weight)
    width = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, shape = x.numel() // width, tiles(width)
    if rows:
        rms_norm_kernel[(triton.cdiv(rows, shape["BM"]),)](
            x, weight.contiguous(), y, rows, weight.numel() // width, eps, D=width, **shape
        )
    return y


def silu_times(x: Tensor, by: Tensor) -> Tensor:
    """silu(x) * by, for two tensors of one shape and dtype."""
    refuse_fp64(x, by)
    x, by = x.contiguous(), by.contiguous()
    y = torch.empty_like(x)
    if n := x.numel():
        block = ELEMENTS // 2
        silu_times_kernel[(triton.cdiv(n, block),)](x, by, y, n, BLOCK=block, num_warps=4, enable_fp_fusion=True)
    return y
