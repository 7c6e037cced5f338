"""The noise of `gdn2.kernels.noise` in one kernel, operation by operation: no product is fused with a sum.

Axes: N rows, V values of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values a program


@triton.jit
def _mixed(x, key):
    x = (x ^ (x >> 16)) * 0x85EBCA6B + key
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _power(y):
    return 126 - (y.to(tl.int32, bitcast=True) >> 23)


@triton.jit
def _rest(y):
    bits = (y.to(tl.int32, bitcast=True) & 0x7FFFFF) | 0x3F000000
    return 1.0 - bits.to(tl.float32, bitcast=True)


@triton.jit
def _minus_log(power, t):
    p = 0.9904405474662781 * t + -0.6377930045127869
    p = p * t + 0.5227294564247131
    p = p * t + 0.18751747906208038
    p = p * t + 0.33891603350639343
    p = p * t + 0.49981626868247986
    p = p * t + 1.0000009536743164
    return p * t + power.to(tl.float32) * 0.693147182464599609375


@triton.jit
def gumbel_kernel(keys, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + row)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x = _mixed(_mixed(column.to(tl.uint32), 0) ^ low, high).to(tl.int32, bitcast=True)
    near = ((x ^ (x >> 31)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = _minus_log(tl.where(x < 0, _power(near), 0), tl.where(x < 0, _rest(near), near))
    tl.store(y + row * V + column, _minus_log(_power(exponential), _rest(exponential)), mask=column < V)


def gumbel(keys: Tensor, width: int) -> Tensor:
    """See `gdn2.kernels.noise.plain`."""
    y = torch.empty(len(keys), width, device=keys.device)
    if y.numel():
        grid = len(keys), triton.cdiv(width, BLOCK)
        gumbel_kernel[grid](keys.contiguous(), y, width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return y
