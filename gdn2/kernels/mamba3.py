"""What surrounds the operator in Mamba-3: keys and queries that turn, values of each row, the gated output.

Each function is plain torch here, differentiable, and Triton kernels with their own backward where the implementation
is "triton": in torch every step of the way makes a trip of [T, R, H, K] numbers through memory.

Axes: N sequences, T tokens, H heads, G groups, R rank, K state width, J rotating pairs, P head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gdn2 import numerics
from gdn2.kernels.dispatch import Implementation, choose
from gdn2.ragged import Ragged

TURN = 2**32  # units of a whole turn


@dataclass(frozen=True)
class Turning:
    """How keys and queries are made."""

    heads: int  # H
    groups: int  # G
    rank: int  # R
    width: int  # K
    pairs: int  # J
    in_halves: bool  # channel i pairs with i + K/2; else 2i with 2i + 1
    eps: float  # inside the norm


class Shared(NamedTuple):
    """B or C: what the heads of a group share, and what makes it each head's own."""

    x: Tensor  # [T, R G K]
    norm: Tensor  # [K]
    bias: Tensor  # [H, R, K]


class Mixing(NamedTuple):
    """Parameters of the output."""

    skip: Tensor  # D [H]
    x: Tensor | None  # of MIMO, all three [H, R, P]: values of each row, ...
    gate: Tensor | None  # ... its gate, ...
    out: Tensor | None  # ... its share of the output
    norm: Tensor | None  # [H, P]


def turn(
    b: Shared, c: Shared, dt: Tensor, angle: Tensor, theta: Tensor, ragged: Ragged | None, how: Turning,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotated keys and queries: RMSNorm(x) + bias, turned by theta_t = sum_{s <= t} dt_s pi tanh(angle_s).

    Args:
        b, c: keys and queries before.
        dt: step sizes, fp32 (fp64 for fp64 inputs)                 [T, H]
        angle: what the token turns by, before its activation       [T, J]
        theta: phases before the first token, 2^-32 turns, int32    [N, H, J]
        ragged: where the sequences lie; None is one token for each of N

    Returns:
        k, q [T, R, H, K] in the dtype of b and c, and the phases after the last tokens, int32 [N, H, J].
    """
    if choose(b.x.device, implementation, b.x.dtype) == "triton":
        from gdn2.kernels.triton import mamba3

        return mamba3.turn(b, c, dt, angle, theta, ragged, how)
    turns = 0.5 * dt.double()[:, :, None] * torch.tanh(angle.double())[:, None, :]
    phase = _phase(turns, ragged, theta)
    after = as_units(phase if ragged is None else phase[ragged.last])
    after = after if ragged is None else theta.index_copy(0, ragged.begun, after)
    phase = phase if phase.is_floating_point() else as_units(phase).double() / TURN
    radians = 2 * math.pi * (phase - phase.detach().round())
    radians = radians.to(torch.float64 if b.x.dtype == torch.float64 else torch.float32)[:, None]  # [T, 1, H, J]
    cos, sin = radians.cos(), radians.sin()
    k, q = (rotate(_shifted(x, how), cos, sin, how.in_halves).to(x.x.dtype) for x in (b, c))
    return k, q, after


def _phase(turns: Tensor, ragged: Ragged | None, theta: Tensor) -> Tensor:
    """The phase at each token [T, H, J]: whole units without gradients, turns (fp64) with them."""
    steps, begin = (turns, theta.double() / TURN) if torch.is_grad_enabled() else (units(turns), theta.long())
    if ragged is None:
        return begin + steps
    total = steps.cumsum(0)
    before = torch.cat([total.new_zeros(1, *total.shape[1:]), total])[ragged.cu_seqlens[:-1]]  # [N, H, J]
    return total + (begin - before)[ragged.sequence]


def _shifted(shared: Shared, how: Turning) -> Tensor:
    """Normalised and shifted B or C, from (r, g, k) to [T, R, H, K]."""
    x = shared.x.unflatten(-1, (how.rank, how.groups, how.width))
    x = numerics.rms_norm(x, shared.norm, how.eps)
    return x.repeat_interleave(how.heads // how.groups, 2) + shared.bias.transpose(0, 1)


def units(turns: Tensor) -> Tensor:
    """Turns to whole units, int64."""
    return (turns.detach() * TURN).round().long()


def as_units(phase: Tensor) -> Tensor:
    """A phase, in units or in turns, wrapped into int32."""
    phase = units(phase) if phase.is_floating_point() else phase.long()
    return ((phase + TURN // 2) % TURN - TURN // 2).to(torch.int32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, in_halves: bool) -> Tensor:
    """Rotate the first J pairs of the last axis of x [..., K] by the angles of cos, sin [..., J]; the rest stays."""
    pairs = cos.shape[-1]
    if in_halves:
        a, a_rest, b, b_rest = x.split([pairs, x.shape[-1] // 2 - pairs] * 2, dim=-1)
        return torch.cat([a * cos - b * sin, a_rest, a * sin + b * cos, b_rest], -1)
    turned, rest = x.split([2 * pairs, x.shape[-1] - 2 * pairs], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), rest], -1)


def ranked(v: Tensor, x: Tensor | None) -> Tensor:
    """Values of each row: v [T, H, P] times x [H, R, P] to [T, R, H, P]; without ranks one row of v."""
    return v[:, None] if x is None else v[:, None] * x.transpose(0, 1)


def write(v: Tensor, weight: Tensor, x: Tensor | None, implementation: Implementation | None = None) -> Tensor:
    """What each row writes, weight [T, H] times `ranked(v, x)`: [T, R, H, P] in v's dtype."""
    if choose(v.device, implementation, v.dtype) == "triton":
        from gdn2.kernels.triton import mamba3

        return mamba3.write(v, weight, x)
    return (weight[:, None, :, None] * ranked(v, x)).to(v.dtype)


def read(
    o: Tensor, v: Tensor, z: Tensor, mixing: Mixing, eps: float, implementation: Implementation | None = None
) -> Tensor:
    """The layer's output before its last projection, from what the operator read.

        y = (o + D v) * SiLU(z);   y = sum_r out_r * (o_r + D v x_r) * SiLU(z gate_r)   with ranks

    With a norm, RMSNorm over each head of what stands in brackets.

    Args:
        o: [T, R, H, P]; v, z: [T, H, P]

    Returns:
        [T, H, P] in v's dtype.
    """
    if choose(v.device, implementation, v.dtype) == "triton":
        from gdn2.kernels.triton import mamba3

        return mamba3.read(o, v, z, mixing, eps)
    y = o + mixing.skip[:, None].to(o.dtype) * ranked(v, mixing.x)  # [T, R, H, P]
    if mixing.norm is not None:
        y = numerics.rms_norm(y, mixing.norm, eps)
    if mixing.gate is None or mixing.out is None:
        y = (y * numerics.silu(z)[:, None])[:, 0]
    else:
        y = y * numerics.silu(z[:, None] * mixing.gate.transpose(0, 1)) * mixing.out.transpose(0, 1)
        y = y.sum(1)
    return y.to(v.dtype)
