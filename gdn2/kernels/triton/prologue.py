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

from gdn2.ragged import Ragged

if TYPE_CHECKING:
    from gdn2.kernels.layer import Gates, Raw

CONV_TOKENS, CONV_CHANNELS, CONV_BLOCKS = 16, 128, 16
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
def _before(x, window, sequence, position, token, channel, mask, near, C, BACK: tl.constexpr, W: tl.constexpr):
    """The input `BACK` tokens before `token`, from the window where the sequence began since: fp32 [BT, BC].

    `near`: some token of the block is among the first W - 1 of its sequence; the others never look at a window.
    """
    here = position >= BACK
    value = tl.load(
        x + (token - BACK)[:, None] * C + channel[None, :], mask=mask & here[:, None], other=0.0
    ).to(tl.float32)  # fmt: skip
    if BACK > 0:
        if near:
            at = (sequence[:, None] * C + channel[None, :]) * (W - 1) + (W - 1 - BACK + position)[:, None]
            value += tl.load(window + at, mask=mask & ~here[:, None], other=0.0).to(tl.float32)
    return value


@triton.jit
def _convolve(
    x, weight, bias, window, sequence, position, token, channel, mask, near, C,
    W: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The convolution before its activation: fp32 [BT, BC]."""
    y = tl.zeros([BT, BC], tl.float32)
    for back in tl.static_range(W):
        tap = tl.load(weight + channel * W + (W - 1 - back), mask=channel < C, other=0.0).to(tl.float32)
        y += tap[None, :] * _before(x, window, sequence, position, token, channel, mask, near, C, back, W)
    if BIAS:
        y += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def conv_kernel(
    x, weight, bias, window, y, new_window, cu_seqlens, sequence_of, position_of, T, C, TOKEN_BLOCKS,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Programs below TOKEN_BLOCKS take a block of tokens; each later one takes the new window of one sequence."""
    block = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = channel < C
    if block < TOKEN_BLOCKS:
        token = block * BT + tl.arange(0, BT)
        sequence = tl.load(sequence_of + token, mask=token < T, other=0)
        position = tl.load(position_of + token, mask=token < T, other=W)
        near = tl.min(position, 0) < W - 1
        mask = (token < T)[:, None] & in_c[None, :]
        out = _convolve(x, weight, bias, window, sequence, position, token, channel, mask, near, C, W, BIAS, BT, BC)
        if ACT:
            out *= _sigmoid(out)
        tl.store(y + token[:, None] * C + channel[None, :], out.to(y.dtype.element_ty), mask=mask)
    else:
        n = block - TOKEN_BLOCKS
        begin = tl.load(cu_seqlens + n)
        length = tl.load(cu_seqlens + n + 1) - begin
        for i in tl.static_range(W - 1):
            source = length - (W - 1) + i
            in_x = channel < tl.where(source >= 0, C, 0)
            fresh = tl.load(x + (begin + source) * C + channel, mask=in_x, other=0.0).to(tl.float32)
            old = window + (n * C + channel) * (W - 1) + (W - 1 + source)
            kept = tl.load(old, mask=in_c & ~in_x, other=0.0).to(tl.float32)
            value = (fresh + kept).to(new_window.dtype.element_ty)
            tl.store(new_window + (n * C + channel) * (W - 1) + i, value, mask=in_c)


@triton.jit
def _before_activation(
    x, weight, bias, window, dy, sequence_of, position_of, token, ahead, channel, T, C,
    W: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of the convolution at `token`, zero where its sequence does not reach `ahead` tokens back."""
    sequence = tl.load(sequence_of + token, mask=token < T, other=0)
    position = tl.load(position_of + token, mask=token < T, other=W)
    near = tl.min(position, 0) < W - 1
    mask = ((token < T) & (position >= ahead))[:, None] & (channel < C)[None, :]
    d = tl.load(dy + token[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if ACT:
        pre = _convolve(x, weight, bias, window, sequence, position, token, channel, mask, near, C, W, BIAS, BT, BC)
        s = _sigmoid(pre)
        d *= s * (1.0 + pre * (1.0 - s))
    return d, sequence, position, near, mask


@triton.jit
def conv_backward_kernel(
    x, weight, bias, window, dy, dx, partial, sequence_of, position_of, T, C,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BLOCKS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dx of BLOCKS blocks of tokens, and their share of dweight (W rows) and dbias (row W): `partial` [., W + 1, C]."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = channel < C
    taps = tl.arange(0, 8)
    sums = tl.zeros([8, BC], tl.float32)
    for block in range(BLOCKS):
        token = (program * BLOCKS + block) * BT + tl.arange(0, BT)
        d, sequence, position, near, mask = _before_activation(
            x, weight, bias, window, dy, sequence_of, position_of, token, 0, channel, T, C, W, BIAS, ACT, BT, BC
        )
        for back in tl.static_range(W):
            seen = _before(x, window, sequence, position, token, channel, mask, near, C, back, W)
            sums += tl.where((taps == W - 1 - back)[:, None], tl.sum(d * seen, 0)[None, :], 0.0)
        sums += tl.where((taps == W)[:, None], tl.sum(d, 0)[None, :], 0.0)
        total = d * tl.load(weight + channel * W + (W - 1), mask=in_c, other=0.0).to(tl.float32)[None, :]
        for ahead in range(1, W):
            d, sequence, position, near, later = _before_activation(
                x, weight, bias, window, dy, sequence_of, position_of, token + ahead, ahead, channel, T, C,
                W, BIAS, ACT, BT, BC,
            )  # fmt: skip
            total += d * tl.load(weight + channel * W + (W - 1 - ahead), mask=in_c, other=0.0).to(tl.float32)[None, :]
        tl.store(dx + token[:, None] * C + channel[None, :], total.to(dx.dtype.element_ty), mask=mask)
    at = partial + (program * (W + 1) + taps[:, None]) * C + channel[None, :]
    tl.store(at, sums, mask=(taps <= W)[:, None] & in_c[None, :])


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
        conv_kernel[(blocks + ragged.n_sequences, triton.cdiv(c, CONV_CHANNELS))](
            x, weight, bias, window, y, new_window, ragged.cu_seqlens, ragged.sequence, ragged.position, t, c, blocks,
            W=weight.shape[1], BT=CONV_TOKENS, BC=CONV_CHANNELS, BIAS=bias is not None, ACT=activate, num_warps=4, enable_fp_fusion=True,
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
        blocks = triton.cdiv(t, CONV_TOKENS * CONV_BLOCKS)
        partial = torch.empty(blocks, w + 1, c, dtype=torch.float32, device=x.device)
        if t:
            conv_backward_kernel[(blocks, triton.cdiv(c, CONV_CHANNELS // 2))](
                x, weight, bias, window, grads[0].contiguous(), dx, partial, ctx.ragged.sequence, ctx.ragged.position,
                t, c, W=w, BT=CONV_TOKENS, BC=CONV_CHANNELS // 2, BLOCKS=CONV_BLOCKS, BIAS=bias is not None,
                ACT=ctx.activate, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        sums = partial.sum(0)
        dbias = None if bias is None else sums[w].to(bias.dtype)
        return dx, sums[:w].t().to(weight.dtype), dbias, None, None, None


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, ragged: Ragged, activate: bool = True
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over packed sequences: x [T, C], weight [C, W] with W <= 7, window [N, C, W - 1].

    Returns:
        y [T, C] and the window after each sequence. Gradients reach x, weight and bias; not the windows.
    """
    if window.requires_grad:
        raise ValueError("the convolution kernel has no gradient for its window: pass a detached one")
    if weight.shape[1] > 7:
        raise ValueError(f"the convolution kernel takes at most 7 taps, got {weight.shape[1]}")
    return _ShortConv.apply(x, weight, bias, window, ragged, activate)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, slots: Tensor | None = None, activate: bool = True
) -> Tensor:
    """One token for each of N sequences: x [N, C] to y [N, C]; `window` [N or slots, C, W - 1] moves on in place."""
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

        raw = Raw(*(None if x is None else x.contiguous() for x in tensors))
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
    return _Fold.apply(gates, *raw)
