"""The start of a layer in two kernels, each with its backward: the short convolution, and the folding of the gates.

Arithmetic in fp32, offsets in 64 bits. Block sizes depend on widths alone, so a token's result does not depend on how
many there are. Gradients of parameters are summed per block of tokens and then over the blocks: no atomics.

Axes: N sequences, T tokens, C channels, W taps, H key heads, Hv value heads, K key width, V value width.
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
    from gdn2.kernels.layer import Gates, Raw

CONV_TOKENS, CONV_CHANNELS = 64, 128  # that one warp walks along
MOST_TAPS = 4
FOLD_TOKENS = 16


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    small = tl.exp(-tl.abs(x))
    u = 1.0 + small
    exact = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, small, tl.log(u) * (small / exact))


@triton.jit
def _tap(weight, channel, C, BACK: tl.constexpr, W: tl.constexpr):
    """Weight of the input `BACK` tokens ago, fp32 [BC]; zero beyond the taps there are."""
    value = tl.zeros(channel.shape, tl.float32)
    if BACK < W:
        value = tl.load(weight + channel * W + (W - 1 - BACK), mask=channel < C, other=0.0).to(tl.float32)
    return value


@triton.jit
def _past(x, window, sequence, position, token, channel, C, BACK: tl.constexpr, W: tl.constexpr):
    """The input `BACK` tokens before `token`, from its sequence's window where that began since: fp32 [BC]."""
    value = tl.zeros(channel.shape, tl.float32)
    if BACK < W:
        in_x = channel < tl.where(position >= BACK, C, 0)
        at = window + (sequence * C + channel) * (W - 1) + (W - 1 - BACK + position)
        value += tl.load(x + (token - BACK) * C + channel, mask=in_x, other=0.0).to(tl.float32)
        value += tl.load(at, mask=(channel < C) & ~in_x, other=0.0).to(tl.float32)
    return value


@triton.jit
def _past_three(x, window, sequence_of, position_of, token, channel, C, W: tl.constexpr):
    position = tl.load(position_of + token)
    sequence = tl.load(sequence_of + token)
    x1 = _past(x, window, sequence, position, token, channel, C, 1, W)
    x2 = _past(x, window, sequence, position, token, channel, C, 2, W)
    x3 = _past(x, window, sequence, position, token, channel, C, 3, W)
    return x1, x2, x3


@triton.jit
def _row(x, token, stop, channel, C):
    """x of one token [BC], zero from token `stop` on."""
    return tl.load(x + token * C + channel, mask=channel < tl.where(token < stop, C, 0), other=0.0)


@triton.jit
def _four(x, token, stop, channel, C):
    """`_row` of `token` and the three after it: loads that a walk has under way, since none can pass its stores."""
    return (
        _row(x, token, stop, channel, C), _row(x, token + 1, stop, channel, C),
        _row(x, token + 2, stop, channel, C), _row(x, token + 3, stop, channel, C),
    )  # fmt: skip


@triton.jit
def conv_kernel(
    x, weight, bias, window, y, new_window, cu_seqlens, sequence_of, position_of, T, C, SEGMENTS,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Programs below SEGMENTS walk along BT tokens; each later one makes the new window of one sequence."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = channel < C
    if program < SEGMENTS:
        begin = program * BT
        end = tl.minimum(begin + BT, T)
        w0, w1 = _tap(weight, channel, C, 0, W), _tap(weight, channel, C, 1, W)
        w2, w3 = _tap(weight, channel, C, 2, W), _tap(weight, channel, C, 3, W)
        shift = tl.zeros([BC], tl.float32)
        if BIAS:
            shift += tl.load(bias + channel, mask=in_c, other=0.0).to(tl.float32)
        x1, x2, x3 = _past_three(x, window, sequence_of, position_of, begin, channel, C, W)
        n0, n1, n2, n3 = _four(x, begin, end, channel, C)
        whole = tl.load(position_of + end - 1) >= end - 1 - begin  # all of one sequence
        for token in range(begin, end):
            if not whole:  # noqa: SIM102 - `and` would load it all the same
                if tl.load(position_of + token) == 0:
                    x1, x2, x3 = _past_three(x, window, sequence_of, position_of, token, channel, C, W)
            x0 = n0.to(tl.float32)
            n0, n1, n2, n3 = n1, n2, n3, _row(x, token + 4, end, channel, C)
            out = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + shift
            if ACT:
                out *= _sigmoid(out)
            tl.store(y + token * C + channel, out.to(y.dtype.element_ty), mask=in_c)
            x3, x2, x1 = x2, x1, x0
    else:
        n = program - SEGMENTS
        start = tl.load(cu_seqlens + n)
        length = tl.load(cu_seqlens + n + 1) - start
        for i in tl.static_range(W - 1):
            source = length - (W - 1) + i
            in_x = channel < tl.where(source >= 0, C, 0)
            fresh = tl.load(x + (start + source) * C + channel, mask=in_x, other=0.0).to(tl.float32)
            old = window + (n * C + channel) * (W - 1) + (W - 1 + source)
            kept = tl.load(old, mask=in_c & ~in_x, other=0.0).to(tl.float32)
            value = (fresh + kept).to(new_window.dtype.element_ty)
            tl.store(new_window + (n * C + channel) * (W - 1) + i, value, mask=in_c)


@triton.jit
def conv_backward_kernel(
    x, weight, bias, window, dy, dx, partial, sequence_of, position_of, T, C,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dx of BT tokens, and their share of dweight (W rows) and dbias (row W) in `partial` [programs, W + 1, C].

    Walks three tokens further: a token's gradient gathers from itself and the three after it (a0 to a3).
    """
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = channel < C
    begin = program * BT
    end = tl.minimum(begin + BT, T)
    w0, w1 = _tap(weight, channel, C, 0, W), _tap(weight, channel, C, 1, W)
    w2, w3 = _tap(weight, channel, C, 2, W), _tap(weight, channel, C, 3, W)
    zero = tl.zeros([BC], tl.float32)
    a1, a2, a3 = zero, zero, zero
    s0, s1, s2, s3, shift, total = zero, zero, zero, zero, zero, zero
    if BIAS:
        shift += tl.load(bias + channel, mask=in_c, other=0.0).to(tl.float32)
    x1, x2, x3 = _past_three(x, window, sequence_of, position_of, begin, channel, C, W)
    stop = tl.minimum(end + 3, T)
    whole = tl.load(position_of + stop - 1) >= stop - 1 - begin  # all of one sequence
    n0, n1, n2, n3 = _four(x, begin, stop, channel, C)
    d0, d1, d2, d3 = _four(dy, begin, stop, channel, C)
    for token in range(begin, end + 3):
        inside = token < stop
        reach = token - begin
        if not whole:
            reach = tl.load(position_of + token, mask=inside, other=0)
            if inside & (reach == 0):
                x1, x2, x3 = _past_three(x, window, sequence_of, position_of, token, channel, C, W)
        x0, d = n0.to(tl.float32), d0.to(tl.float32)
        n0, n1, n2, n3 = n1, n2, n3, _row(x, token + 4, stop, channel, C)
        d0, d1, d2, d3 = d1, d2, d3, _row(dy, token + 4, stop, channel, C)
        if ACT:
            pre = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + shift
            s = _sigmoid(pre)
            d *= s * (1.0 + pre * (1.0 - s))
        a3 += tl.where(reach >= 3, w3 * d, 0.0)
        a2 += tl.where(reach >= 2, w2 * d, 0.0)
        a1 += tl.where(reach >= 1, w1 * d, 0.0)
        done = channel < tl.where(token - 3 >= begin, C, 0)
        tl.store(dx + (token - 3) * C + channel, a3.to(dx.dtype.element_ty), mask=done)
        a3, a2, a1 = a2, a1, w0 * d
        own = tl.where(token < end, d, 0.0)
        s0 += own * x0
        s1 += own * x1
        s2 += own * x2
        s3 += own * x3
        total += own
        x3, x2, x1 = x2, x1, x0
    row = partial + program * (W + 1) * C + channel
    for back in tl.static_range(W):
        value = s0 if back == 0 else s1 if back == 1 else s2 if back == 2 else s3
        tl.store(row + (W - 1 - back) * C, value, mask=in_c)
    tl.store(row + W * C, total, mask=in_c)


@triton.jit
def conv_step_kernel(
    x, weight, bias, window, y, slots, C,
    W: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One token of one sequence; its window moves on in place."""
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    slot = n
    if SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
    mask = channel < tl.where(slot >= 0, C, 0)
    at = window + (slot * C + channel) * (W - 1)
    new = tl.load(x + n * C + channel, mask=mask, other=0.0)
    out = new.to(tl.float32) * tl.load(weight + channel * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        old = tl.load(at + i, mask=mask, other=0.0)
        out += old.to(tl.float32) * tl.load(weight + channel * W + i, mask=mask, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(at + i - 1, old, mask=mask)
    if W > 1:
        tl.store(at + W - 2, new.to(window.dtype.element_ty), mask=mask)
    if BIAS:
        out += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    if ACT:
        out *= _sigmoid(out)
    tl.store(y + n * C + channel, tl.where(slot >= 0, out, 0.0).to(y.dtype.element_ty), mask=channel < C)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, ragged: Ragged, activate: bool
    ) -> tuple[Tensor, Tensor]:
        x, weight, window = x.contiguous(), weight.contiguous(), window.contiguous()
        t, c = x.shape
        y, new_window = torch.empty_like(x), torch.empty_like(window)
        blocks = triton.cdiv(t, CONV_TOKENS)
        if ragged.n_sequences:
            conv_kernel[(blocks + ragged.n_sequences, triton.cdiv(c, CONV_CHANNELS))](
                x, weight, bias, window, y, new_window, ragged.cu_seqlens, ragged.sequence, ragged.position, t, c,
                blocks, W=weight.shape[1], BT=CONV_TOKENS, BC=CONV_CHANNELS, BIAS=bias is not None, ACT=activate,
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, window)
        ctx.ragged, ctx.activate = ragged, activate
        ctx.mark_non_differentiable(new_window)
        return y, new_window

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, window = ctx.saved_tensors
        t, c = x.shape
        w = weight.shape[1]
        dx = torch.empty_like(x)
        blocks = triton.cdiv(t, CONV_TOKENS)
        partial = torch.empty(blocks, w + 1, c, dtype=torch.float32, device=x.device)
        if t:
            conv_backward_kernel[(blocks, triton.cdiv(c, CONV_CHANNELS))](
                x, weight, bias, window, grads[0].contiguous(), dx, partial, ctx.ragged.sequence, ctx.ragged.position,
                t, c, W=w, BT=CONV_TOKENS, BC=CONV_CHANNELS, BIAS=bias is not None, ACT=ctx.activate,
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        sums = partial.sum(0)
        dbias = None if bias is None else sums[w].to(bias.dtype)
        return dx, sums[:w].t().to(weight.dtype), dbias, None, None, None


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, ragged: Ragged, activate: bool = True
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over packed sequences: x [T, C], weight [C, W], W <= 4, window [N, C, W - 1].

    Returns:
        y [T, C] and the window after each sequence. Gradients reach x, weight and bias; not the windows.
    """
    refuse_fp64(x, weight, window)
    if window.requires_grad:
        raise ValueError("the convolution kernel has no gradient for its window: pass a detached one")
    if weight.shape[1] > MOST_TAPS:
        raise ValueError(f"the convolution kernel takes at most {MOST_TAPS} taps, got {weight.shape[1]}")
    return _ShortConv.apply(x, weight, bias, window, ragged, activate)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, slots: Tensor | None = None, activate: bool = True
) -> Tensor:
    """One token for each of N sequences: x [N, C] to y [N, C]; `window` [N or slots, C, W - 1] moves on in place."""
    refuse_fp64(x, weight, window)
    n, c = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert window.is_contiguous(), "windows are updated in place: they must be contiguous"
    if n:
        conv_step_kernel[(n, triton.cdiv(c, 256))](
            x.contiguous(), weight.contiguous(), bias, window, y, slots, c,
            W=weight.shape[1], BC=256, BIAS=bias is not None, ACT=activate, SLOTS=slots is not None,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return y


@triton.jit
def _rows(base, token, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, T):
    """Pointers to [BT, BLOCK] of a tensor [T, HEADS, WIDTH], and their mask."""
    col = tl.arange(0, BLOCK)
    return (
        base + (token[:, None] * HEADS + head) * WIDTH + col[None, :],
        (token < T)[:, None] & (col < WIDTH)[None, :],
    )


@triton.jit
def _load_rows(base, token, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, T):
    at, mask = _rows(base, token, head, HEADS, WIDTH, BLOCK, T)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, value, token, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, T):
    at, mask = _rows(base, token, head, HEADS, WIDTH, BLOCK, T)
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def fold_kernel(
    q, k, v, b, w, f, A_log, dt_bias, q_out, k_out, e_out, z_out, g_out, T, scale, erase_max, lower, eps,
    H: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr, HF: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TIED: tl.constexpr, DECAY: tl.constexpr,
    BOUNDED: tl.constexpr, MEAN_E: tl.constexpr, MEAN_W: tl.constexpr,
):  # fmt: skip
    """One key head of a block of tokens, with the value heads that share it."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.program_id(1)
    live = token < T
    x = _load_rows(q, token, h, H, K, BK, T)
    _store_rows(q_out, x * (scale / tl.sqrt_rn(tl.sum(x * x, 1) + eps))[:, None], token, h, H, K, BK, T)
    x = _load_rows(k, token, h, H, K, BK, T)
    key = x / tl.sqrt_rn(tl.sum(x * x, 1) + eps)[:, None]
    _store_rows(k_out, key, token, h, H, K, BK, T)
    for i in tl.static_range(HB // H):
        hb = h * (HB // H) + i
        if TIED:
            beta = erase_max * _sigmoid(tl.load(b + token * HB + hb, mask=live, other=0.0).to(tl.float32))
            _store_rows(e_out, beta[:, None] * key, token, hb, HB, K, BK, T)
            for j in tl.static_range(HV // HB):
                hv = hb * (HV // HB) + j
                value = _load_rows(v, token, hv, HV, V, BV, T)
                _store_rows(z_out, beta[:, None] * value, token, hv, HV, V, BV, T)
        else:
            gate = _sigmoid(_load_rows(b, token, hb, HB, K, BK, T))
            if MEAN_E:
                gate = (tl.sum(tl.where((tl.arange(0, BK) < K)[None, :], gate, 0.0), 1) / K)[:, None]
            _store_rows(e_out, erase_max * gate * key, token, hb, HB, K, BK, T)
    if not TIED:
        for i in tl.static_range(HV // H):
            hv = h * (HV // H) + i
            gate = _sigmoid(_load_rows(w, token, hv, HV, V, BV, T))
            if MEAN_W:
                gate = (tl.sum(tl.where((tl.arange(0, BV) < V)[None, :], gate, 0.0), 1) / V)[:, None]
            _store_rows(z_out, gate * _load_rows(v, token, hv, HV, V, BV, T), token, hv, HV, V, BV, T)
    if DECAY > 0:
        for i in tl.static_range(HF // H):
            hf = h * (HF // H) + i
            rate = tl.exp(tl.load(A_log + hf).to(tl.float32))
            if DECAY == 2:
                col = tl.arange(0, BK)
                shift = tl.load(dt_bias + hf * K + col, mask=col < K, other=0.0).to(tl.float32)
                y = _load_rows(f, token, hf, HF, K, BK, T) + shift[None, :]
                g = lower * _sigmoid(rate * y) if BOUNDED else -rate * _softplus(y)
                _store_rows(g_out, g, token, hf, HF, K, BK, T)
            else:
                shift = tl.load(dt_bias + hf).to(tl.float32)
                y = tl.load(f + token * HF + hf, mask=live, other=0.0).to(tl.float32) + shift
                g = lower * _sigmoid(rate * y) if BOUNDED else -rate * _softplus(y)
                tl.store(g_out + token * HF + hf, g, mask=live)


@triton.jit
def _norm_backward(x, d, scale, eps):
    """Gradient of scale * x / sqrt(sum x^2 + eps) over the last axis, from d [BT, BLOCK]."""
    r = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) + eps)
    unit = x * r[:, None]
    return (scale * r)[:, None] * (d - unit * tl.sum(unit * d, 1)[:, None])


@triton.jit
def _gate_backward(x, d, mean: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of a sigmoid gate's logits x from d = dL/dgate, both [BT, BLOCK]; with `mean`, of its channel mean."""
    s = _sigmoid(x)
    if mean:
        d = (tl.sum(d, 1) / WIDTH)[:, None]
    return d * s * (1.0 - s)


@triton.jit
def _decay_backward(y, d, rate, lower, BOUNDED: tl.constexpr):
    """dL/dy and dL/dA_log of every element, from d = dL/dg."""
    s = _sigmoid(rate * y) if BOUNDED else _sigmoid(y)
    if BOUNDED:
        dy = d * lower * s * (1.0 - s) * rate
        return dy, dy * y
    return -d * rate * s, -d * rate * _softplus(y)


@triton.jit
def fold_backward_kernel(
    q, k, v, b, w, f, A_log, dt_bias, dq_out, dk_out, de_out, dz_out, dg_out, dq, dk, dv, db, dw, df, dA, dbias,
    T, scale, erase_max, lower, eps,
    H: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr, HF: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TIED: tl.constexpr, DECAY: tl.constexpr,
    BOUNDED: tl.constexpr, MEAN_E: tl.constexpr, MEAN_W: tl.constexpr,
):  # fmt: skip
    """As `fold_kernel`; dA and dbias get one row a block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BT + tl.arange(0, BT)
    h = tl.program_id(1)
    live = token < T
    in_k = (tl.arange(0, BK) < K)[None, :]
    in_v = (tl.arange(0, BV) < V)[None, :]
    x = _load_rows(q, token, h, H, K, BK, T)
    d = _load_rows(dq_out, token, h, H, K, BK, T)
    _store_rows(dq, _norm_backward(x, d, scale, eps), token, h, H, K, BK, T)
    raw = _load_rows(k, token, h, H, K, BK, T)
    key = raw / tl.sqrt_rn(tl.sum(raw * raw, 1) + eps)[:, None]
    dkey = _load_rows(dk_out, token, h, H, K, BK, T)
    for i in tl.static_range(HB // H):
        hb = h * (HB // H) + i
        de = _load_rows(de_out, token, hb, HB, K, BK, T)
        if TIED:
            s = _sigmoid(tl.load(b + token * HB + hb, mask=live, other=0.0).to(tl.float32))
            beta = erase_max * s
            dkey += beta[:, None] * de
            total = tl.sum(de * key, 1)
            for j in tl.static_range(HV // HB):
                hv = hb * (HV // HB) + j
                dz = _load_rows(dz_out, token, hv, HV, V, BV, T)
                total += tl.sum(dz * _load_rows(v, token, hv, HV, V, BV, T), 1)
                _store_rows(dv, beta[:, None] * dz, token, hv, HV, V, BV, T)
            tl.store(db + token * HB + hb, (total * beta * (1.0 - s)).to(db.dtype.element_ty), mask=live)
        else:
            x = _load_rows(b, token, hb, HB, K, BK, T)
            gate = _sigmoid(x)
            if MEAN_E:
                gate = (tl.sum(tl.where(in_k, gate, 0.0), 1) / K)[:, None]
            dkey += erase_max * gate * de
            grad = _gate_backward(x, erase_max * de * key, MEAN_E, K, BK)
            _store_rows(db, grad, token, hb, HB, K, BK, T)
    _store_rows(dk, _norm_backward(raw, dkey, 1.0, eps), token, h, H, K, BK, T)
    if not TIED:
        for i in tl.static_range(HV // H):
            hv = h * (HV // H) + i
            x = _load_rows(w, token, hv, HV, V, BV, T)
            dz = _load_rows(dz_out, token, hv, HV, V, BV, T)
            value = _load_rows(v, token, hv, HV, V, BV, T)
            gate = _sigmoid(x)
            if MEAN_W:
                gate = (tl.sum(tl.where(in_v, gate, 0.0), 1) / V)[:, None]
            _store_rows(dv, gate * dz, token, hv, HV, V, BV, T)
            _store_rows(dw, _gate_backward(x, dz * value, MEAN_W, V, BV), token, hv, HV, V, BV, T)
    if DECAY > 0:
        for i in tl.static_range(HF // H):
            hf = h * (HF // H) + i
            rate = tl.exp(tl.load(A_log + hf).to(tl.float32))
            if DECAY == 2:
                col = tl.arange(0, BK)
                shift = tl.load(dt_bias + hf * K + col, mask=col < K, other=0.0).to(tl.float32)
                y = _load_rows(f, token, hf, HF, K, BK, T) + shift[None, :]
                dy, da = _decay_backward(y, _load_rows(dg_out, token, hf, HF, K, BK, T), rate, lower, BOUNDED)
                _store_rows(df, dy, token, hf, HF, K, BK, T)
                tl.store(dA + block * HF + hf, tl.sum(tl.sum(da, 1), 0))
                tl.store(dbias + (block * HF + hf) * K + col, tl.sum(dy, 0), mask=col < K)
            else:
                at = token * HF + hf
                y = tl.load(f + at, mask=live, other=0.0).to(tl.float32) + tl.load(dt_bias + hf).to(tl.float32)
                d = tl.load(dg_out + at, mask=live, other=0.0)
                dy, da = _decay_backward(y, d, rate, lower, BOUNDED)
                tl.store(df + at, dy.to(df.dtype.element_ty), mask=live)
                tl.store(dA + block * HF + hf, tl.sum(da, 0))
                tl.store(dbias + block * HF + hf, tl.sum(dy, 0))


def fold_variant(raw: Raw, gates: Gates) -> dict[str, Any]:
    """The compile-time choices of `fold_kernel` for these inputs."""
    h, width = raw.q.shape[1:]
    value_heads, value_width = raw.v.shape[1:]
    return {
        "H": h, "HV": value_heads, "HB": raw.b.shape[1], "HF": h if raw.f is None else raw.f.shape[1],
        "K": width, "V": value_width, "BK": triton.next_power_of_2(width), "BV": triton.next_power_of_2(value_width),
        "BT": FOLD_TOKENS, "TIED": raw.w is None, "DECAY": 0 if raw.f is None else raw.f.ndim - 1,
        "BOUNDED": gates.lower_bound is not None, "MEAN_E": gates.mean_erase, "MEAN_W": gates.mean_write,
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Gates, *tensors: Tensor | None) -> Any:
        from gdn2.kernels.layer import Raw

        raw = Raw(*(None if x is None else x.contiguous() for x in tensors))  # type: ignore[arg-type]
        t, h, width = raw.q.shape
        variant = fold_variant(raw, gates)
        q, k, z = torch.empty_like(raw.q), torch.empty_like(raw.k), torch.empty_like(raw.v)
        e = torch.empty(t, raw.b.shape[1], width, dtype=raw.q.dtype, device=raw.q.device)
        g = None if raw.f is None else torch.empty_like(raw.f, dtype=torch.float32)
        if t:
            fold_kernel[(triton.cdiv(t, FOLD_TOKENS), h)](
                *raw, q, k, e, z, g, t, gates.scale, gates.erase_max, gates.lower_bound or 0.0, gates.eps, **variant
            )
        ctx.save_for_backward(*raw)
        ctx.gates, ctx.variant = gates, variant
        return q, k, e, z, g

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from gdn2.kernels.layer import Raw

        raw, gates = Raw(*ctx.saved_tensors), ctx.gates
        t, h, _ = raw.q.shape
        out = [None if x is None else torch.empty_like(x) for x in raw[:6]]
        blocks = triton.cdiv(t, FOLD_TOKENS)
        dA = dbias = None
        if raw.A_log is not None and raw.dt_bias is not None:
            dA = torch.empty(blocks, raw.A_log.numel(), dtype=torch.float32, device=raw.q.device)
            dbias = torch.empty(blocks, raw.dt_bias.numel(), dtype=torch.float32, device=raw.q.device)
        if t:
            upstream = [None if x is None else x.contiguous() for x in grads]
            fold_backward_kernel[(blocks, h)](
                *raw, *upstream, *out, dA, dbias, t, gates.scale, gates.erase_max, gates.lower_bound or 0.0, gates.eps,
                **ctx.variant,
            )  # fmt: skip
        if raw.A_log is None or raw.dt_bias is None or dA is None or dbias is None:
            return None, *out, None, None
        sums = (dA.sum(0).reshape(raw.A_log.shape), dbias.sum(0).reshape(raw.dt_bias.shape))
        return None, *out, sums[0].to(raw.A_log.dtype), sums[1].to(raw.dt_bias.dtype)


def fold_gates(raw: Raw, gates: Gates) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`gdn2.kernels.layer.fold_gates` on the GPU: q, k, e, z in q's dtype and g in fp32, all from one kernel."""
    refuse_fp64(*raw)
    return _Fold.apply(gates, *raw)
