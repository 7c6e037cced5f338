"""Softmax attention: full, or over a sliding window of W tokens (itself and W - 1 before it); grouped queries, rotary.

    q, k, v = W x [, a short convolution without activation] [, q and k normalised]; q and k rotated by position
    o_t     = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s,   s in (t - W, t] or s <= t
    y_t     = W_o (o_t [* sigmoid(W_g x_t)])

Rotation (NeoX): channel i of the first `rotary` pairs with i + rotary/2, angle = position * base^(-2i / rotary).

Axes: T tokens, N sequences, D model width, H query heads, G key heads, R = H/G, d head width, W window, L cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn2 import numerics
from gdn2.kernels.dispatch import choose
from gdn2.mixers.conv import ShortConv
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn2 import HeadNorm
from gdn2.mixers.linear import Linear
from gdn2.mixers.softmax import SLOTS, attend, attend_cached, attend_together
from gdn2.ragged import Ragged


@dataclass(frozen=True)
class AttentionConfig:
    """Every option that some published model uses. The scale is always 1/sqrt(d)."""

    d_model: int
    n_heads: int = 16  # H
    n_kv_heads: int | None = None  # G, divides n_heads; None is n_heads
    d_head: int = 128  # d
    window: int | None = None  # W; None sees everything before
    rotary: int | None = None  # how many channels rotate, even; None is all of them, 0 none
    rotary_base: float = 10000.0
    rotary_bf16: bool = False  # cosines and sines rounded to bf16, as the authors' first version does
    qkv_bias: bool = False
    out_bias: bool = False
    conv_taps: int = 0  # short convolution with bias on q, k and v (mamba_ssm); 0 is none
    qk_norm: Literal["none", "head", "all"] = "none"  # RMSNorm of q and k over each head, or over all heads at once
    gate: bool = False  # sigmoid output gate (qwen3_next)
    norm_eps: float = 1e-6  # of qk_norm

    def __post_init__(self) -> None:
        for name in ("n_heads", "d_head", "window", "n_kv_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.rotated % 2 or not 0 <= self.rotated <= self.d_head:
            raise ValueError(f"rotary must be even and at most d_head {self.d_head}, got {self.rotated}")
        if self.qk_norm not in ("none", "head", "all"):
            raise ValueError(f"qk_norm must be none, head or all, got {self.qk_norm!r}")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def rotated(self) -> int:
        return self.d_head if self.rotary is None else self.rotary


class Attention(Mixer):
    """The softmax attention layer. Parameter names are fla's.

    State: keys (already rotated) and values [N, G, L, d] and how many tokens were read, `position` [N]. With a window
    L is W and position p lies in slot p mod W; without one L grows, and position p lies in slot p.
    """

    kind = "attention"

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = c = config
        queries, keys = c.n_heads * c.d_head, c.kv_heads * c.d_head
        self.q_proj = Linear(c.d_model, queries, bias=c.qkv_bias)
        self.k_proj, self.v_proj = (Linear(c.d_model, keys, bias=c.qkv_bias) for _ in range(2))
        self.o_proj = Linear(queries, c.d_model, bias=c.out_bias)
        if c.gate:
            self.g_proj = Linear(c.d_model, queries)
        if c.conv_taps:
            self.q_conv1d = ShortConv(queries, c.conv_taps, bias=True, activate=False)
            self.k_conv1d, self.v_conv1d = (
                ShortConv(keys, c.conv_taps, bias=True, activate=False) for _ in range(2)
            )  # fmt: skip
        if c.qk_norm != "none":
            self.q_norm = HeadNorm(c.d_head if c.qk_norm == "head" else queries)
            self.k_norm = HeadNorm(c.d_head if c.qk_norm == "head" else keys)

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        fresh = state is None
        state = self.new_state(ragged.n_sequences) if state is None else state
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        new: LayerState = {}
        if self.config.conv_taps:
            q, new["q_window"] = self.q_conv1d(q, state["q_window"], ragged)
            k, new["k_window"] = self.k_conv1d(k, state["k_window"], ragged)
            v, new["v_window"] = self.v_conv1d(v, state["v_window"], ragged)
        q, k, v = self._heads(q, k, v, state["position"][ragged.sequence] + ragged.position)
        if self._in_kernels(x):
            o, caches = self._packed(q, k, v, ragged, state)
            return self._output(x, o), {**new, **caches}
        begun = [0] * ragged.n_sequences if fresh else state["position"].tolist()
        if torch.is_grad_enabled() and not any(begun) and ragged.n_tokens and len(set(ragged.lengths)) == 1:
            shape = (ragged.n_sequences, -1)
            o = attend_together(
                q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), self.config.window
            ).flatten(0, 1)
        else:
            o = self._each(q, k, v, ragged, state, begun)
        return self._output(x, o), {**new, **self._cached(k, v, ragged, state, begun)}

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, G, R, d], k and v [T, G, d], normalised and rotated, for tokens at `position` [T]."""
        c = self.config
        if c.qk_norm == "all":
            q = numerics.rms_norm(q, self.q_norm.weight, c.norm_eps)
            k = numerics.rms_norm(k, self.k_norm.weight, c.norm_eps)
        q, k, v = (y.unflatten(-1, (-1, c.d_head)) for y in (q, k, v))
        if c.qk_norm == "head":
            q = numerics.rms_norm(q, self.q_norm.weight, c.norm_eps)
            k = numerics.rms_norm(k, self.k_norm.weight, c.norm_eps)
        if c.rotated:
            turn = rotation(position, c.rotated, c.rotary_base, c.rotary_bf16)
            q, k = rotate(q, turn), rotate(k, turn)
        return q.unflatten(1, (c.kv_heads, -1)), k, v

    def _in_kernels(self, x: Tensor) -> bool:
        """Whether the GPU's kernels serve; they have no gradients."""
        return not torch.is_grad_enabled() and choose(x.device, self.implementation, x.dtype) == "triton"

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, state: LayerState
    ) -> tuple[Tensor, LayerState]:
        """Attention of all sequences together [T, H, d], and their caches after it."""
        from gdn2.kernels.triton import attention as kernels

        window, position = self.config.window, state["position"]
        caches = state["keys"], state["values"]
        q = q.flatten(1, 2)
        o = kernels.attend(q, k, v, *caches, position, ragged.cu_seqlens, ragged.lengths, window)
        slots = window or 0
        if window is None:  # the one case that waits for the device
            ends = [begin + n for begin, n in zip(position.tolist(), ragged.lengths, strict=True)]
            slots = max(-(-max(ends, default=0) // SLOTS) * SLOTS, caches[0].shape[2])
        keys, values = kernels.cached(k, v, *caches, position, ragged.cu_seqlens, slots, window is not None)
        return o, {"keys": keys, "values": values, "position": position + ragged.counts}

    def _each(self, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, state: LayerState, begun: list[int]) -> Tensor:
        """Attention of every sequence on its own, past tokens from its cache."""
        out = []
        for n, start in enumerate(begun):
            rows = slice(ragged.starts[n], ragged.starts[n + 1])
            slots = self._past(start, k.device)
            keys, values = (
                torch.cat([state[name][n][:, slots].transpose(0, 1).to(new.dtype), new[rows]])
                for name, new in (("keys", k), ("values", v))
            )
            out.append(attend(q[rows], keys, values, start, self.config.window))
        return torch.cat(out) if out else q

    def _past(self, start: int, device: torch.device) -> Tensor:
        """Slots of the tokens before position `start` that a window still reaches, oldest first."""
        window = self.config.window
        if window is None:
            return torch.arange(start, device=device)
        return torch.arange(max(0, start - window + 1), start, device=device) % window

    def _cached(self, k: Tensor, v: Tensor, ragged: Ragged, state: LayerState, begun: list[int]) -> LayerState:
        """The caches after the tokens k, v [T, G, d]."""
        window = self.config.window
        ends = [start + length for start, length in zip(begun, ragged.lengths, strict=True)]
        position = state["position"] + ragged.counts
        keys, values = state["keys"], state["values"]
        if window is None:
            keys, values = (grown(cache, max(ends, default=0)) for cache in (keys, values))
        keys, values = keys.clone(), values.clone()
        for n, (start, end) in enumerate(zip(begun, ends, strict=True)):
            first = start if window is None else max(start, end - window)
            rows = slice(ragged.starts[n] + first - start, ragged.starts[n + 1])
            slots = torch.arange(first, end, device=k.device)
            slots = slots if window is None else slots % window
            keys[n, :, slots] = k[rows].transpose(0, 1).to(keys.dtype)
            values[n, :, slots] = v[rows].transpose(0, 1).to(values.dtype)
        return {"keys": keys, "values": values, "position": position}

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        c, position = self.config, state["position"]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.conv_taps:
            q = self.q_conv1d.step(q, state["q_window"])
            k = self.k_conv1d.step(k, state["k_window"])
            v = self.v_conv1d.step(v, state["v_window"])
        q, k, v = self._heads(q, k, v, position)
        if c.window is None:
            longest = int(position.max()) + 1 if position.numel() else 0
            state["keys"], state["values"] = grown(state["keys"], longest), grown(state["values"], longest)
        slot = position if c.window is None else position % c.window
        row = torch.arange(x.shape[0], device=x.device)
        state["keys"][row, :, slot] = k.to(state["keys"].dtype)
        state["values"][row, :, slot] = v.to(state["values"].dtype)
        position += 1
        filled = position if c.window is None else position.clamp(max=c.window)
        if self._in_kernels(x):
            from gdn2.kernels.triton import attention as kernels

            return self._output(x, kernels.attend_cached(q.flatten(1, 2), state["keys"], state["values"], filled))
        o = attend_cached(q, state["keys"].to(q.dtype), state["values"].to(q.dtype), filled, c.window is not None)
        return self._output(x, o)

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        o = o.flatten(1)
        return self.o_proj(o * numerics.sigmoid(self.g_proj(x)) if self.config.gate else o)

    def new_state(self, n: int) -> LayerState:
        c, weight = self.config, self.q_proj.weight
        cache = (n, c.kv_heads, c.window or 0, c.d_head)
        state = {"keys": weight.new_zeros(cache), "values": weight.new_zeros(cache)}
        state["position"] = torch.zeros(n, dtype=torch.int64, device=weight.device)
        if c.conv_taps:
            state |= {f"{name}_window": getattr(self, f"{name}_conv1d").window(n) for name in "qkv"}
        return state

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices with gain 2^-1/2, biases zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ShortConv):
                module.reset_parameters()
            elif isinstance(module, HeadNorm):
                nn.init.ones_(module.weight)

    def cost(self) -> Cost:
        c = self.config
        queries, keys = c.n_heads * c.d_head, c.kv_heads * c.d_head
        matrices = c.d_model * (2 * queries + 2 * keys + (queries if c.gate else 0))
        conv = c.conv_taps * (queries + 2 * keys)
        vectors = (queries + 2 * keys) * (bool(c.conv_taps) + c.qkv_bias) + (c.d_model if c.out_bias else 0)
        vectors += {"none": 0, "head": 2 * c.d_head, "all": queries + keys}[c.qk_norm]
        windows = max(c.conv_taps - 1, 0) * (queries + 2 * keys)
        seen = c.window or 0
        return Cost(
            params=matrices + conv + vectors,
            flops_per_token=2 * (matrices + conv) + 4 * queries * seen,
            state_bytes=2 * (2 * keys * seen + windows),
            flops_per_past_token=0 if c.window else 4 * queries,
            bytes_per_token=0 if c.window else 4 * keys,
        )


def grown(cache: Tensor, tokens: int) -> Tensor:
    """The cache [N, G, L, d] with slots for `tokens`: itself where it has them, else a longer copy."""
    if tokens <= cache.shape[2]:
        return cache
    return F.pad(cache, (0, 0, 0, -(-tokens // SLOTS) * SLOTS - cache.shape[2]))


def rotation(position: Tensor, width: int, base: float, bf16: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, width/2] of the rotation at `position` [T], in fp64: exact at any position."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width
    angle = position.double()[:, None] * base**-exponent
    cos, sin = angle.cos(), angle.sin()
    return (cos.bfloat16().double(), sin.bfloat16().double()) if bf16 else (cos, sin)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first channels of x [T, heads, d], first half against second half; the others stay."""
    cos, sin = (y[:, None].to(x.dtype if x.dtype == torch.float64 else torch.float32) for y in turn)
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)
