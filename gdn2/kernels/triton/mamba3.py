"""What surrounds the operator in Mamba-3, each part in one kernel and its backward in one or two.

    turn    B and C to the rotated keys and queries of every head, the phase summed over each sequence in whole units
    write   w_t v_t x_r, what is written in each row
    read    sum_r o_r (norm(y_r + D v x_r)) SiLU(z z_r), what the layer gives to its last projection

The torch forms in `gdn2.kernels.mamba3` spell out the equations. Arithmetic in fp32, offsets in 64 bits, phases in
integers. Block sizes depend on widths alone, so a token's result does not depend on how many there are. Gradients of
parameters are summed per block of tokens and then over the blocks: no atomics.

Axes: N sequences, T tokens, H heads, G groups, R rank, K state width, J rotating pairs, P head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton import refuse_fp64
from gdn2.ragged import Ragged

if TYPE_CHECKING:
    from gdn2.kernels.mamba3 import Mixing, Shared, Turning

TILE = 2048  # elements of a program's block of tokens
SCAN = 64  # tokens that a scan takes at once
WIDER = {"num_warps": 8}  # of the kernels that hold the most


@triton.jit
def _bounds(cu_seqlens, n, EACH: tl.constexpr):
    """First token of sequence n and the one after its last; with EACH every sequence has one."""
    start = n
    end = n + 1
    if not EACH:
        start = tl.load(cu_seqlens + n)
        end = tl.load(cu_seqlens + n + 1)
    return start, end


@triton.jit
def phase_kernel(
    dt, direction, theta, phase, after, cu_seqlens, H,
    J: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Phases [T, H, J] of one head of one sequence in 2^-32 turns, from theta [N, H, J] on."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    col = tl.arange(0, BJ)
    row = (n * H + h) * J + col
    start, end = _bounds(cu_seqlens, n, EACH)
    total = tl.load(theta + row, mask=col < J, other=0).to(tl.int64)
    for begin in range(start, end, BT):
        token = begin + tl.arange(0, BT)
        live = (token < end)[:, None] & (col < J)[None, :]
        step = tl.load(dt + token * H + h, mask=token < end, other=0.0).to(tl.float64)
        way = tl.load(direction + token[:, None] * J + col[None, :], mask=live, other=0.0)
        units = tl.floor(step[:, None] * way * 2147483648.0 + 0.5).to(tl.int64)
        at = phase + (token[:, None] * H + h) * J + col[None, :]
        tl.store(at, (total[None, :] + tl.cumsum(units, 0)).to(tl.int32), mask=live)
        total += tl.sum(units, 0)
    tl.store(after + row, total.to(tl.int32), mask=col < J)


@triton.jit
def phase_backward_kernel(
    dt, direction, dphase, ddt, ddirection, cu_seqlens, T, H,
    R: tl.constexpr, J: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """From dphase [R, T, H, J] (per radian): ddt [T, H], and one head's share of ddirection in [H, T, J]."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BJ)
    start, end = _bounds(cu_seqlens, n, EACH)
    later = tl.zeros([BJ], tl.float32)
    for done in range(0, end - start, BT):
        token = end - done - BT + tl.arange(0, BT)
        live = (token >= start)[:, None] & (col < J)[None, :]
        d = tl.zeros([BT, BJ], tl.float32)
        for r in range(R):
            d += tl.load(dphase + ((r * T + token[:, None]) * H + h) * J + col[None, :], mask=live, other=0.0)
        total = (later[None, :] + tl.cumsum(d, 0, reverse=True)) * 3.14159265358979  # half a turn
        later += tl.sum(d, 0)
        step = tl.load(dt + token * H + h, mask=token >= start, other=0.0)
        way = tl.load(direction + token[:, None] * J + col[None, :], mask=live, other=0.0).to(tl.float32)
        tl.store(ddt + token * H + h, tl.sum(total * way, 1), mask=token >= start)
        tl.store(ddirection + (h * T + token[:, None]) * J + col[None, :], total * step[:, None], mask=live)


@triton.jit
def _cos_sin(units):
    """Of an angle in 2^-32 turns, int32, to 1e-7: the nearest quarter turn and a series for the rest."""
    quarter = (units + 536870912) >> 30
    x = (units - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09
    y = x * x
    s = x * (1.0 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    c = 1.0 + y * (-0.5 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 - y * (1 / 3628800)))))
    odd = (quarter & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def _channels(pair, K: tl.constexpr, HALVES: tl.constexpr):
    """The two channels of each pair."""
    first = pair if HALVES else 2 * pair
    return first, first + (K // 2 if HALVES else 1)


@triton.jit
def _load_pairs(base, live, K: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, HALVES: tl.constexpr):
    """The pairs of the K values at each of `base` [BT]: two fp32 [BT, BP]."""
    if HALVES:
        col = tl.arange(0, BP)
        mask = live[:, None] & (col < K // 2)[None, :]
        a = tl.load(base[:, None] + col[None, :], mask=mask, other=0.0)
        b = tl.load(base[:, None] + (K // 2 + col)[None, :], mask=mask, other=0.0)
    else:
        col = tl.arange(0, 2 * BP)
        x = tl.load(base[:, None] + col[None, :], mask=live[:, None] & (col < K)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, [BT, BP, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(base, a, b, live, K: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, HALVES: tl.constexpr):
    dtype = base.dtype.element_ty
    if HALVES:
        col = tl.arange(0, BP)
        mask = live[:, None] & (col < K // 2)[None, :]
        tl.store(base[:, None] + col[None, :], a.to(dtype), mask=mask)
        tl.store(base[:, None] + (K // 2 + col)[None, :], b.to(dtype), mask=mask)
    else:
        col = tl.arange(0, 2 * BP)
        x = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), [BT, 2 * BP])
        tl.store(base[:, None] + col[None, :], x, mask=live[:, None] & (col < K)[None, :])


@triton.jit
def _two(base, pair, K: tl.constexpr, HALVES: tl.constexpr):
    """The pairs of K parameters at `base`: two fp32 [1, BP]."""
    first, second = _channels(pair, K, HALVES)
    a = tl.load(base + first, mask=pair < K // 2, other=0.0).to(tl.float32)
    b = tl.load(base + second, mask=pair < K // 2, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@triton.jit
def _store_two(base, a, b, pair, K: tl.constexpr, HALVES: tl.constexpr):
    first, second = _channels(pair, K, HALVES)
    tl.store(base + first, tl.sum(a, 0), mask=pair < K // 2)
    tl.store(base + second, tl.sum(b, 0), mask=pair < K // 2)


@triton.jit
def _unit(x, stride, token, live, at, eps, K: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, HALVES: tl.constexpr):
    """The K values at column `at` of each token, over their root mean square, as pairs; and 1 / root mean square."""
    a, b = _load_pairs(x + token * stride + at, live, K, BP, BT, HALVES)
    scale = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / K + eps)
    return a * scale[:, None], b * scale[:, None], scale


@triton.jit
def turn_kernel(
    b, c, b_norm, c_norm, b_bias, c_bias, phase, k, q, T, b_stride, c_stride, eps,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BP: tl.constexpr, BT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The keys and queries of one row of one group: a block of tokens and every head of the group."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(1) // G
    g = tl.program_id(1) % G
    live = token < T
    pair = tl.arange(0, BP)
    turning = live[:, None] & (pair < J)[None, :]
    k0, k1, _ = _unit(b, b_stride, token, live, (r * G + g) * K, eps, K, BP, BT, HALVES)
    q0, q1, _ = _unit(c, c_stride, token, live, (r * G + g) * K, eps, K, BP, BT, HALVES)
    w0, w1 = _two(b_norm, pair, K, HALVES)
    k0, k1 = k0 * w0, k1 * w1
    w0, w1 = _two(c_norm, pair, K, HALVES)
    q0, q1 = q0 * w0, q1 * w1
    for i in range(H // G):
        h = g * (H // G) + i
        units = tl.load(phase + (token[:, None] * H + h) * J + pair[None, :], mask=turning, other=0)
        cos, sin = _cos_sin(units)
        out = ((token * R + r) * H + h) * K
        s0, s1 = _two(b_bias + (h * R + r) * K, pair, K, HALVES)
        x0, x1 = k0 + s0, k1 + s1
        _store_pairs(k + out, x0 * cos - x1 * sin, x0 * sin + x1 * cos, live, K, BP, BT, HALVES)
        s0, s1 = _two(c_bias + (h * R + r) * K, pair, K, HALVES)
        x0, x1 = q0 + s0, q1 + s1
        _store_pairs(q + out, x0 * cos - x1 * sin, x0 * sin + x1 * cos, live, K, BP, BT, HALVES)


@triton.jit
def _unit_backward(
    dx, dnorm, stride, u0, u1, scale, w0, w1, d0, d1, token, live, at,
    K: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """From d0, d1, the gradient of w u: store that of the values at `at` and the block's share of that of w."""
    _store_two(dnorm, d0 * u0, d1 * u1, tl.arange(0, BP), K, HALVES)
    d0, d1 = d0 * w0, d1 * w1
    mean = (tl.sum(d0 * u0 + d1 * u1, 1) / K)[:, None]
    x0, x1 = (d0 - u0 * mean) * scale[:, None], (d1 - u1 * mean) * scale[:, None]
    _store_pairs(dx + token * stride + at, x0, x1, live, K, BP, BT, HALVES)


@triton.jit
def turn_backward_kernel(
    b, c, b_norm, c_norm, b_bias, c_bias, phase, dk, dq, db, dc, db_norm, dc_norm, db_bias, dc_bias, dphase,
    T, b_stride, c_stride, eps,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BP: tl.constexpr, BT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """As `turn_kernel`. dphase [R, T, H, J] is per radian; a block's shares go to row `block` of the others.

    Shares are [blocks, R, G, K] of the norms and [blocks, H, R, K] of the biases.
    """
    block = tl.program_id(0).to(tl.int64)
    token = block * BT + tl.arange(0, BT)
    r = tl.program_id(1) // G
    g = tl.program_id(1) % G
    at = (r * G + g) * K
    live = token < T
    pair = tl.arange(0, BP)
    turning = live[:, None] & (pair < J)[None, :]
    k0, k1, k_scale = _unit(b, b_stride, token, live, at, eps, K, BP, BT, HALVES)
    q0, q1, q_scale = _unit(c, c_stride, token, live, at, eps, K, BP, BT, HALVES)
    b0, b1 = _two(b_norm, pair, K, HALVES)
    c0, c1 = _two(c_norm, pair, K, HALVES)
    zero = tl.zeros([BT, BP], tl.float32)
    dk0, dk1, dq0, dq1 = zero, zero, zero, zero
    for i in range(H // G):
        h = g * (H // G) + i
        where = (token[:, None] * H + h) * J + pair[None, :]
        cos, sin = _cos_sin(tl.load(phase + where, mask=turning, other=0))
        row = ((token * R + r) * H + h) * K
        shift = (h * R + r) * K
        share = block * H * R * K + shift
        y0, y1 = _load_pairs(dk + row, live, K, BP, BT, HALVES)
        x0, x1 = y0 * cos + y1 * sin, y1 * cos - y0 * sin
        s0, s1 = _two(b_bias + shift, pair, K, HALVES)
        angle = x1 * (k0 * b0 + s0) - x0 * (k1 * b1 + s1)
        _store_two(db_bias + share, x0, x1, pair, K, HALVES)
        dk0 += x0
        dk1 += x1
        y0, y1 = _load_pairs(dq + row, live, K, BP, BT, HALVES)
        x0, x1 = y0 * cos + y1 * sin, y1 * cos - y0 * sin
        s0, s1 = _two(c_bias + shift, pair, K, HALVES)
        angle += x1 * (q0 * c0 + s0) - x0 * (q1 * c1 + s1)
        _store_two(dc_bias + share, x0, x1, pair, K, HALVES)
        dq0 += x0
        dq1 += x1
        tl.store(dphase + r.to(tl.int64) * T * H * J + where, angle, mask=turning)
    width = R * G * K
    share = block * width + at
    _unit_backward(db, db_norm + share, width, k0, k1, k_scale, b0, b1, dk0, dk1, token, live, at, K, BP, BT, HALVES)
    _unit_backward(dc, dc_norm + share, width, q0, q1, q_scale, c0, c1, dq0, dq1, token, live, at, K, BP, BT, HALVES)


def turn_variant(how: Turning) -> dict[str, Any]:
    """The compile-time choices of `turn_kernel`."""
    bp = triton.next_power_of_2(how.width // 2)
    return {
        "H": how.heads, "G": how.groups, "R": how.rank, "K": how.width, "J": how.pairs, "BP": bp,
        "BT": max(TILE // (2 * bp), 1), "HALVES": how.in_halves, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


def scan_variant(how: Turning, each: bool) -> dict[str, Any]:
    """The compile-time choices of the two scans over the tokens. Unfused: units are those of the torch form."""
    bj = triton.next_power_of_2(how.pairs)
    return {
        "J": how.pairs, "BJ": bj, "BT": 1 if each else SCAN, "EACH": each, "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip


def _flat(x: Tensor) -> Tensor:
    """[T, ...] as [T, width] whose rows lie in one piece each, in place where they do."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, b: Tensor, c: Tensor, b_norm: Tensor, c_norm: Tensor, b_bias: Tensor, c_bias: Tensor,
        dt: Tensor, direction: Tensor, theta: Tensor, ragged: Ragged | None, how: Turning,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        b, c, dt, direction, theta = _flat(b), _flat(c), dt.contiguous(), direction.contiguous(), theta.contiguous()
        vectors = tuple(x.contiguous() for x in (b_norm, c_norm, b_bias, c_bias))
        t, n = b.shape[0], theta.shape[0]
        after, phase = torch.empty_like(theta), theta.new_empty(t, how.heads, how.pairs)
        k, q = (b.new_empty(t, how.rank, how.heads, how.width) for _ in range(2))
        bounds = None if ragged is None else ragged.cu_seqlens
        if n:
            phase_kernel[(n, how.heads)](
                dt, direction, theta, phase, after, bounds, how.heads, **scan_variant(how, ragged is None)
            )
        variant = turn_variant(how)
        if t:
            turn_kernel[(triton.cdiv(t, variant["BT"]), how.rank * how.groups)](
                b, c, *vectors, phase, k, q, t, b.stride(0), c.stride(0), how.eps, **variant
            )
        ctx.save_for_backward(b, c, *vectors, dt, direction, phase)
        ctx.ragged, ctx.how = ragged, how
        ctx.mark_non_differentiable(after)
        return k, q, after

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        b, c, b_norm, c_norm, b_bias, c_bias, dt, direction, phase = ctx.saved_tensors
        how, variant, t = ctx.how, turn_variant(ctx.how), b.shape[0]
        blocks = triton.cdiv(t, variant["BT"])
        db, dc = (b.new_empty(t, x.shape[1]) for x in (b, c))
        fp32 = {"dtype": torch.float32, "device": b.device}
        norms = [torch.empty(blocks, how.rank * how.groups, how.width, **fp32) for _ in range(2)]
        biases = [torch.empty(blocks, *b_bias.shape, **fp32) for _ in range(2)]
        dphase = torch.empty(how.rank, t, how.heads, how.pairs, **fp32)
        ddt, shares = torch.empty_like(dt), torch.empty(how.heads, t, how.pairs, **fp32)
        if t:
            dk, dq = (x.contiguous() for x in grads[:2])
            turn_backward_kernel[(blocks, how.rank * how.groups)](
                b, c, b_norm, c_norm, b_bias, c_bias, phase, dk, dq, db, dc, *norms, *biases, dphase,
                t, b.stride(0), c.stride(0), how.eps, **variant | WIDER,
            )  # fmt: skip
            each = ctx.ragged is None
            n, bounds = (t, None) if each else (ctx.ragged.n_sequences, ctx.ragged.cu_seqlens)
            phase_backward_kernel[(n, how.heads)](
                dt, direction, dphase, ddt, shares, bounds, t, how.heads, R=how.rank, **scan_variant(how, each)
            )
        vectors = [x.sum((0, 1)).to(b_norm.dtype) for x in norms] + [x.sum(0).to(b_bias.dtype) for x in biases]
        return db, dc, *vectors, ddt, shares.sum(0).to(direction.dtype), None, None, None


def turn(
    b: Shared, c: Shared, dt: Tensor, angle: Tensor, theta: Tensor, ragged: Ragged | None, how: Turning
) -> tuple[Tensor, Tensor, Tensor]:
    """`gdn2.kernels.mamba3.turn` on the GPU."""
    refuse_fp64(*b, *c, dt)
    direction = torch.tanh(angle.double())
    return _Turn.apply(b.x, c.x, b.norm, c.norm, b.bias, c.bias, dt, direction, theta, ragged, how)


@triton.jit
def write_kernel(
    v, weight, x, y, T, v_stride,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.program_id(1)
    col = tl.arange(0, BP)
    mask = (token < T)[:, None] & (col < P)[None, :]
    value = tl.load(v + token[:, None] * v_stride + h * P + col[None, :], mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(weight + token * H + h, mask=token < T, other=0.0)[:, None]
    for r in range(R):
        out = value
        if RANKED:
            out = value * tl.load(x + (h * R + r) * P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
        tl.store(y + ((token[:, None] * R + r) * H + h) * P + col[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def write_backward_kernel(
    v, weight, x, dy, dv, dweight, dx, T, v_stride,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """dx gets one row [H, R, P] a block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BT + tl.arange(0, BT)
    h = tl.program_id(1)
    col = tl.arange(0, BP)
    mask = (token < T)[:, None] & (col < P)[None, :]
    value = tl.load(v + token[:, None] * v_stride + h * P + col[None, :], mask=mask, other=0.0).to(tl.float32)
    share = tl.load(weight + token * H + h, mask=token < T, other=0.0)[:, None]
    total = tl.zeros([BT, BP], tl.float32)
    for r in range(R):
        at = ((token[:, None] * R + r) * H + h) * P + col[None, :]
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if RANKED:
            row = (h * R + r) * P + col
            tl.store(dx + block * H * R * P + row, tl.sum(d * value * share, 0), mask=col < P)
            d *= tl.load(x + row, mask=col < P, other=0.0).to(tl.float32)[None, :]
        total += d
    tl.store(dweight + token * H + h, tl.sum(total * value, 1), mask=token < T)
    at = dv + (token[:, None] * H + h) * P + col[None, :]
    tl.store(at, (total * share).to(dv.dtype.element_ty), mask=mask)


def head_variant(heads: int, rank: int, width: int) -> dict[str, Any]:
    """The compile-time choices of kernels whose programs take one head of a block of tokens."""
    bp = triton.next_power_of_2(width)
    return {
        "H": heads, "R": rank, "P": width, "BP": bp, "BT": max(TILE // bp, 1), "num_warps": 4,
        "enable_fp_fusion": True,
    }  # fmt: skip


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, x: Tensor | None) -> Tensor:
        t, h, p = v.shape
        rows, weight, x = _flat(v), weight.contiguous(), None if x is None else x.contiguous()
        rank = 1 if x is None else x.shape[1]
        variant = {**head_variant(h, rank, p), "RANKED": x is not None}
        y = v.new_empty(t, rank, h, p)
        if t:
            write_kernel[(triton.cdiv(t, variant["BT"]), h)](rows, weight, x, y, t, rows.stride(0), **variant)
        ctx.save_for_backward(rows, weight, x)
        ctx.variant = variant
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weight, x = ctx.saved_tensors
        t, h = weight.shape
        dv, dweight = rows.new_empty(t, h, ctx.variant["P"]), torch.empty_like(weight)
        blocks = triton.cdiv(t, ctx.variant["BT"])
        dx = None if x is None else torch.empty(blocks, *x.shape, dtype=torch.float32, device=x.device)
        if t:
            write_backward_kernel[(blocks, h)](
                rows, weight, x, grads[0].contiguous(), dv, dweight, dx, t, rows.stride(0), **ctx.variant
            )
        return dv, dweight, None if x is None or dx is None else dx.sum(0).to(x.dtype)


def write(v: Tensor, weight: Tensor, x: Tensor | None) -> Tensor:
    """`gdn2.kernels.mamba3.write` on the GPU."""
    refuse_fp64(v, weight, x)
    return _Write.apply(v, weight, x)


@triton.jit
def _parameter(base, h, r, col, R: tl.constexpr, P: tl.constexpr, RANKED: tl.constexpr):
    """Row r of one head of a parameter [H, R, P] as fp32 [1, BP]; ones without ranks."""
    value = tl.full(col.shape, 1.0, tl.float32)
    if RANKED:
        value = tl.load(base + (h * R + r) * P + col, mask=col < P, other=0.0).to(tl.float32)
    return value[None, :]


@triton.jit
def read_kernel(
    o, v, z, skip, x, gate, out, norm, y, T, o_stride, v_stride, z_stride, eps,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
    RANKED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One head of a block of tokens."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.program_id(1)
    col = tl.arange(0, BP)
    mask = (token < T)[:, None] & (col < P)[None, :]
    value = tl.load(v + token[:, None] * v_stride + h * P + col[None, :], mask=mask, other=0.0).to(tl.float32)
    a = tl.load(z + token[:, None] * z_stride + h * P + col[None, :], mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(skip + h).to(tl.float32)
    total = tl.zeros([BT, BP], tl.float32)
    for r in range(R):
        s = tl.load(o + token[:, None] * o_stride + (r * H + h) * P + col[None, :], mask=mask, other=0.0)
        s = s.to(tl.float32) + value * _parameter(x, h, r, col, R, P, RANKED)
        if NORM:
            s *= (1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / P + eps))[:, None]
            s *= tl.load(norm + h * P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
        m = a * _parameter(gate, h, r, col, R, P, RANKED)
        total += s * m / (1.0 + tl.exp(-m)) * _parameter(out, h, r, col, R, P, RANKED)
    tl.store(y + (token[:, None] * H + h) * P + col[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def read_backward_kernel(
    o, v, z, skip, x, gate, out, norm, dy, do, dv, dz, dskip, dx, dgate, dout, dnorm,
    T, o_stride, v_stride, z_stride, eps,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
    RANKED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Gradients of parameters get one row a block of tokens: [H], [H, R, P] three times, [H, P]."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BT + tl.arange(0, BT)
    h = tl.program_id(1)
    col = tl.arange(0, BP)
    mask = (token < T)[:, None] & (col < P)[None, :]
    value = tl.load(v + token[:, None] * v_stride + h * P + col[None, :], mask=mask, other=0.0).to(tl.float32)
    a = tl.load(z + token[:, None] * z_stride + h * P + col[None, :], mask=mask, other=0.0).to(tl.float32)
    at = (token[:, None] * H + h) * P + col[None, :]
    upstream = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    amount = tl.load(skip + h).to(tl.float32)
    dvalue = tl.zeros([BT, BP], tl.float32)
    da = tl.zeros([BT, BP], tl.float32)
    dweight = tl.zeros([BT, BP], tl.float32)
    for r in range(R):
        row = block * H * R * P + (h * R + r) * P + col
        wx = _parameter(x, h, r, col, R, P, RANKED)
        wz = _parameter(gate, h, r, col, R, P, RANKED)
        wo = _parameter(out, h, r, col, R, P, RANKED)
        s = tl.load(o + token[:, None] * o_stride + (r * H + h) * P + col[None, :], mask=mask, other=0.0)
        s = s.to(tl.float32) + amount * value * wx
        m = a * wz
        sigma = 1.0 / (1.0 + tl.exp(-m))
        normed = s
        scale = tl.full([BT], 1.0, tl.float32)
        weight = tl.full([1, BP], 1.0, tl.float32)
        if NORM:
            scale = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / P + eps)
            weight = tl.load(norm + h * P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
            s *= scale[:, None]
            normed = s * weight
        d = upstream * wo
        dm = d * normed * sigma * (1.0 + m * (1.0 - sigma))
        da += dm * wz
        ds = d * m * sigma
        if NORM:
            dweight += ds * s
            ds *= weight
            ds = scale[:, None] * (ds - s * (tl.sum(ds * s, 1) / P)[:, None])
        if RANKED:
            tl.store(dout + row, tl.sum(upstream * normed * m * sigma, 0), mask=col < P)
            tl.store(dgate + row, tl.sum(dm * a, 0), mask=col < P)
            tl.store(dx + row, tl.sum(ds * value, 0) * amount, mask=col < P)
        dvalue += ds * wx
        to = do + ((token[:, None] * R + r) * H + h) * P + col[None, :]
        tl.store(to, ds.to(do.dtype.element_ty), mask=mask)
    if NORM:
        tl.store(dnorm + (block * H + h) * P + col, tl.sum(dweight, 0), mask=col < P)
    tl.store(dskip + block * H + h, tl.sum(tl.sum(dvalue * value, 1), 0))
    tl.store(dv + at, (dvalue * amount).to(dv.dtype.element_ty), mask=mask)
    tl.store(dz + at, da.to(dz.dtype.element_ty), mask=mask)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, o: Tensor, v: Tensor, z: Tensor, *parameters: Tensor | None) -> Tensor:
        skip, x, gate, out, norm = (None if p is None else p.contiguous() for p in parameters)
        t, rank, h, p = o.shape
        rows = _flat(o), _flat(v), _flat(z)
        variant = {**head_variant(h, rank, p), "RANKED": x is not None, "NORM": norm is not None}
        y = v.new_empty(t, h, p)
        strides = tuple(row.stride(0) for row in rows)
        if t:
            read_kernel[(triton.cdiv(t, variant["BT"]), h)](
                *rows, skip, x, gate, out, norm, y, t, *strides, eps, **variant
            )
        ctx.save_for_backward(*rows, skip, x, gate, out, norm)
        ctx.variant, ctx.eps, ctx.strides = variant, eps, strides
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        o, v, z, *parameters = ctx.saved_tensors
        t, h, rank, p = o.shape[0], *(ctx.variant[name] for name in "HRP")
        do = o.new_empty(t, rank, h, p)
        dv, dz = v.new_empty(t, h, p), z.new_empty(t, h, p)
        blocks = triton.cdiv(t, ctx.variant["BT"])
        shares = [
            None if x is None else torch.empty(blocks, x.numel(), dtype=torch.float32, device=o.device)
            for x in parameters
        ]
        if t:
            read_backward_kernel[(blocks, h)](
                o, v, z, *parameters, grads[0].contiguous(), do, dv, dz, *shares, t, *ctx.strides, ctx.eps,
                **ctx.variant | WIDER,
            )  # fmt: skip
        sums = [
            None if x is None or share is None else share.sum(0).reshape(x.shape).to(x.dtype)
            for x, share in zip(parameters, shares, strict=True)
        ]
        return None, do, dv, dz, *sums


def read(o: Tensor, v: Tensor, z: Tensor, mixing: Mixing, eps: float) -> Tensor:
    """`gdn2.kernels.mamba3.read` on the GPU."""
    refuse_fp64(o, v, z, *mixing)
    return _Read.apply(eps, o, v, z, *mixing)
