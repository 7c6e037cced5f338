"""Noise that is a function of a number: the same bits on any device, in any batch, wherever it lies in a tensor.

It is made of operations that every machine rounds alike, one at a time: integers, and single sums and products in fp32.
A library's logarithm would not do: its last bit may differ between devices, and between the middle of an array and its
end. `gdn2.kernels.numba` and `gdn2.kernels.triton.noise` have the same operations in one loop and in one kernel.

Axes: N rows, V values of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2.kernels import numba
from gdn2.kernels.dispatch import Implementation, choose

GAMMA = 0x9E3779B97F4A7C15  # what splitmix64 (Steele, Lea and Flood 2014) adds to its counter for each number

_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
_F1, _F2 = 0x85EBCA6B, 0xC2B2AE35  # of MurmurHash3's last step on 32 bits (Appleby 2011)
_LN2 = 0.693147182464599609375  # in fp32
# -ln(1 - t) / t on [0, 0.5], to 1e-6 of itself: weighted least squares on Chebyshev polynomials, highest power first.
_SERIES = (
    0.9904405474662781, -0.6377930045127869, 0.5227294564247131, 0.18751747906208038,
    0.33891603350639343, 0.49981626868247986, 1.0000009536743164,
)  # fmt: skip


def signed(x: int, bits: int = 64) -> int:
    """The integer of `bits` bits with the bits of `x`."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def counter(seed: int, position: int) -> int:
    """What splitmix64, begun with `seed`, makes its number `position` of; the next one is `GAMMA` further on."""
    return signed(seed + (position + 1) * GAMMA)


def splitmix(counters: Tensor) -> Tensor:
    """splitmix64's numbers of int64 `counters`."""
    x = counters ^ ((counters >> 30) & ((1 << 34) - 1))
    x = x * signed(_M1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * signed(_M2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def gumbel(counters: Tensor, width: int, implementation: Implementation | None = None) -> Tensor:
    """Independent noise [N, `width`], fp32, whose value exceeds x with probability 1 - exp(-exp(-x)).

    Args:
        counters: int64 [N], one of each row; see `counter`.
        implementation: None chooses from the device; it changes no bit.
    """
    keys = splitmix(counters)
    chosen = choose(keys.device, implementation)
    if chosen == "triton":
        from gdn2.kernels.triton import noise

        return noise.gumbel(keys, width)
    return numba.gumbel(keys, width) if chosen == "numba" else plain(keys, width)


def plain(keys: Tensor, width: int) -> Tensor:
    """`gumbel` by torch's operations, of keys int64 [N]."""
    low, high = keys.view(torch.int32).view(-1, 2, 1).unbind(1)
    columns = torch.arange(width, dtype=torch.int32, device=keys.device)
    x = _mixed(_mixed(columns, 0) ^ low, high)
    # The sign says which half of (0, 1) a uniform number is in, the rest how far from 0 or 1 it is: small distances are
    # fine at both ends, and neither is reached.
    near = (x ^ (x >> 31)).float().add_(0.5).mul_(2.0**-32)
    power, rest = _parts(near)
    below = x < 0
    exponential = _log(torch.where(below, power, 0), torch.where(below, rest, near))
    return _log(*_parts(exponential))


def _mixed(x: Tensor, key: Tensor | int) -> Tensor:
    """The last step of MurmurHash3 on int32 `x`, with a key added halfway."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * signed(_F1, 32) + key
    x = (x ^ ((x >> 13) & 0x7FFFF)) * signed(_F2, 32)
    return x ^ ((x >> 16) & 0xFFFF)


def _parts(y: Tensor) -> tuple[Tensor, Tensor]:
    """p and t of y = (1 - t) / 2^p with t in (0, 0.5], of y > 0 in fp32."""
    bits = y.view(torch.int32)
    return 126 - (bits >> 23), 1 - ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)


def _log(power: Tensor, t: Tensor) -> Tensor:
    """-ln((1 - t) / 2^power)."""
    out = torch.full_like(t, _SERIES[0])
    for coefficient in _SERIES[1:]:
        out.mul_(t).add_(coefficient)
    return out.mul_(t).add_(power * _LN2)
