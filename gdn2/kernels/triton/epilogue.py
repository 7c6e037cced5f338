"""The end of a layer in one kernel: RMSNorm over each head times the activated output gate, and its backward.

    y = weight * o / sqrt(mean(o^2) + eps) * act(gate),   act = SiLU or sigmoid

Axes: M rows (tokens times value heads), V value width. Arithmetic in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton import refuse_fp64


@triton.jit
def gated_norm_kernel(
    o, gate, weight, y, M, eps,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BV)
    mask = (row < M)[:, None] & (col < V)[None, :]
    at = row[:, None] * V + col[None, :]
    x = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)  # [BM, BV]
    a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < V, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / V + eps)
    s = 1.0 / (1.0 + tl.exp(-a))
    act = a * s if SILU else s
    tl.store(y + at, (x * scale[:, None] * w[None, :] * act).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward_kernel(
    o, gate, weight, dy, do, dgate, dweight, M, eps,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCKS blocks of BM rows; its share of dweight goes to a row of its own, summed afterwards."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BV)
    w = tl.load(weight + col, mask=col < V, other=0.0).to(tl.float32)
    sums = tl.zeros([BM, BV], tl.float32)
    for block in range(BLOCKS):
        row = (program * BLOCKS + block) * BM + tl.arange(0, BM)
        mask = (row < M)[:, None] & (col < V)[None, :]
        at = row[:, None] * V + col[None, :]
        x = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / V + eps)
        unit = x * scale[:, None]
        s = 1.0 / (1.0 + tl.exp(-a))
        act = a * s if SILU else s
        slope = s * (1.0 + a * (1.0 - s)) if SILU else s * (1.0 - s)
        tl.store(dgate + at, (d * unit * w[None, :] * slope).to(dgate.dtype.element_ty), mask=mask)
        sums += d * act * unit
        dn = d * act * w[None, :]
        mean = tl.sum(dn * unit, 1) / V
        tl.store(do + at, (scale[:, None] * (dn - unit * mean[:, None])).to(do.dtype.element_ty), mask=mask)
    tl.store(dweight + program * V + col, tl.sum(sums, 0), mask=col < V)


BLOCK, BACKWARD_BLOCK = 4096, 2048  # numbers of a block of rows
BACKWARD_BLOCKS = 16  # of a program


def tiles(v: int, size: int = BLOCK) -> dict[str, int]:
    """Rows a block of `size` numbers and warps for width v."""
    bv = triton.next_power_of_2(v)
    return {"BV": bv, "BM": max(size // bv, 1), "num_warps": 4, "enable_fp_fusion": True}


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
        o, gate, weight = o.contiguous(), gate.contiguous(), weight.contiguous()
        v = o.shape[-1]
        m = o.numel() // v
        y = torch.empty_like(o)
        shape = tiles(v)
        if m:
            gated_norm_kernel[(triton.cdiv(m, shape["BM"]),)](o, gate, weight, y, m, eps, V=v, SILU=silu, **shape)
        ctx.save_for_backward(o, gate, weight)
        ctx.eps, ctx.silu = eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        o, gate, weight = ctx.saved_tensors
        v = o.shape[-1]
        m = o.numel() // v
        do, dgate = torch.empty_like(o), torch.empty_like(gate)
        shape = tiles(v, BACKWARD_BLOCK)
        programs = triton.cdiv(m, shape["BM"] * BACKWARD_BLOCKS)
        dweight = torch.empty(programs, v, dtype=torch.float32, device=o.device)
        if m:
            gated_norm_backward_kernel[(programs,)](
                o, gate, weight, grads[0].contiguous(), do, dgate, dweight, m, ctx.eps,
                V=v, BLOCKS=BACKWARD_BLOCKS, SILU=ctx.silu, **shape,
            )  # fmt: skip
        return do, dgate, dweight.sum(0).to(weight.dtype), None, None


def gated_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """`gdn2.kernels.layer.gated_norm` on the GPU: o, gate [T, Hv, V], weight [V]."""
    refuse_fp64(o, gate, weight)
    return _GatedNorm.apply(o, gate, weight, eps, activation == "silu")
