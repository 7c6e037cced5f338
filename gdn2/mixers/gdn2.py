"""Gated DeltaNet-2: erase and write gated separately, per channel (arXiv 2605.22791, Sec. 3).

    q, k = L2norm(SiLU(conv(W x))), v = SiLU(conv(W x)); q scaled by K^-1/2
    e_t  = b_t * k_t,  b_t = erase_max * sigmoid(W_b x_t)          erase, key side      Eq. 8, 11
    z_t  = w_t * v_t,  w_t = sigmoid(W_w x_t)                      write, value side    Eq. 8, 11
    g_t  = -exp(A_log) * softplus(W_f x_t + dt_bias)               log-decay, fp32      Eq. 12
    y_t  = W_o (RMSNorm(o_t) * act(W_g x_t))                                            Sec. 3.4, Fig. 1

Tying b = w = beta gives KDA; tying g across a head's channels as well gives Gated DeltaNet.

Axes: T tokens, N sequences, D model width, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gdn2 import numerics
from gdn2.kernels import delta_rule, delta_step
from gdn2.kernels.layer import Folded, Gates, Raw, fold_gates, gated_norm
from gdn2.mixers.conv import ShortConv
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.linear import Linear
from gdn2.ragged import Ragged


@dataclass(frozen=True)
class GDN2Config:
    """Every published option of the layer. The defaults are those of the published 1.3B configurations."""

    d_model: int
    n_heads: int = 16  # key heads, H
    d_key: int = 128  # K
    d_value: int = 128  # V
    n_value_heads: int | None = None  # Hv, a multiple of n_heads; None is n_heads
    conv_taps: int = 4  # 0 leaves the convolution out
    erase_max: Literal[1, 2] = 1  # 2 allows negative eigenvalues (Table 5); the write gate is never doubled
    gate: Literal["silu", "sigmoid"] = "silu"  # output gate: SiLU in the paper and its code, sigmoid in fla's layer
    scalar_erase: bool = False  # Table 5: b averaged over its channels
    scalar_write: bool = False  # Table 5: w averaged over its channels
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.erase_max not in (1, 2):
            raise ValueError(f"erase_max must be 1 or 2, got {self.erase_max}")
        if self.gate not in ("silu", "sigmoid"):
            raise ValueError(f"gate must be silu or sigmoid, got {self.gate!r}")
        if self.value_heads % self.n_heads:
            raise ValueError(f"n_value_heads must be a multiple of n_heads {self.n_heads}, got {self.n_value_heads}")

    @property
    def value_heads(self) -> int:
        return self.n_value_heads or self.n_heads


class GatedDeltaNet2(Mixer):
    """The GDN-2 layer. Parameter names are those of the published checkpoints."""

    kind = "recurrent"

    def __init__(self, config: GDN2Config) -> None:
        super().__init__()
        self.config = c = config
        self.gates = Gates(c.d_key**-0.5, c.erase_max, mean_erase=c.scalar_erase, mean_write=c.scalar_write)
        keys, values = c.n_heads * c.d_key, c.value_heads * c.d_value
        self.q_proj, self.k_proj = Linear(c.d_model, keys), Linear(c.d_model, keys)
        self.v_proj = Linear(c.d_model, values)
        self.b_proj, self.w_proj = Linear(c.d_model, keys), Linear(c.d_model, values)
        self.f_proj = nn.Sequential(Linear(c.d_model, c.d_value), Linear(c.d_value, keys))
        self.g_proj = nn.Sequential(Linear(c.d_model, c.d_value), Linear(c.d_value, values, bias=True))
        self.o_proj = Linear(values, c.d_model)
        if c.conv_taps:
            self.q_conv1d, self.k_conv1d = ShortConv(keys, c.conv_taps), ShortConv(keys, c.conv_taps)
            self.v_conv1d = ShortConv(values, c.conv_taps)
        self.A_log = nn.Parameter(torch.empty(c.n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(keys, dtype=torch.float32))
        self.o_norm = HeadNorm(c.d_value)

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        state = self.new_state(ragged.n_sequences) if state is None else state
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        new: LayerState = {}
        if self.config.conv_taps:
            q, new["q_window"] = self.q_conv1d(q, state["q_window"], ragged)
            k, new["k_window"] = self.k_conv1d(k, state["k_window"], ragged)
            v, new["v_window"] = self.v_conv1d(v, state["v_window"], ragged)
        else:
            q, k, v = numerics.silu(q), numerics.silu(k), numerics.silu(v)
        q, k, e, z, g = self._fold(x, q, k, v)
        o, new["memory"] = delta_rule(
            q[None], k[None], e[None], z[None], None if g is None else g[None], state["memory"], ragged.starts,
            implementation=self.implementation,
        )  # fmt: skip
        return self._output(x, o[0]), new

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.conv_taps:
            q = self.q_conv1d.step(q, state["q_window"])
            k = self.k_conv1d.step(k, state["k_window"])
            v = self.v_conv1d.step(v, state["v_window"])
        else:
            q, k, v = numerics.silu(q), numerics.silu(k), numerics.silu(v)
        q, k, e, z, g = self._fold(x, q, k, v)
        o = delta_step(q, k, e, z, g, state["memory"], implementation=self.implementation)
        return self._output(x, o)

    def _fold(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Folded:
        """The operator's inputs for tokens x: q, k, e, g [T, H, K] and z [T, Hv, V]."""
        c = self.config
        heads, value_heads = (c.n_heads, c.d_key), (c.value_heads, c.d_value)
        raw = Raw(
            q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, value_heads),
            self.b_proj(x).unflatten(-1, heads), self.w_proj(x).unflatten(-1, value_heads),
            self.f_proj(x).unflatten(-1, heads), self.A_log, self.dt_bias,
        )  # fmt: skip
        return fold_gates(raw, self.gates, self.implementation)

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        c = self.config
        gate = self.g_proj(x).unflatten(-1, (c.value_heads, c.d_value))
        y = gated_norm(o, gate, self.o_norm.weight, c.norm_eps, c.gate, self.implementation)
        return self.o_proj(y.flatten(-2).to(x.dtype))

    def new_state(self, n: int) -> LayerState:
        c = self.config
        memory = self.A_log.new_zeros(n, c.value_heads, c.d_key, c.d_value, dtype=torch.float32)
        if not c.conv_taps:
            return {"memory": memory}
        windows = {f"{name}_window": getattr(self, f"{name}_conv1d").window(n) for name in "qkv"}
        return {**windows, "memory": memory}

    def reset_parameters(self) -> None:
        """The published initialisation: Xavier-uniform with gain 2^-2.5, rates log-uniform."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ShortConv):
                nn.init.uniform_(module.weight, -(self.config.conv_taps**-0.5), self.config.conv_taps**-0.5)
        nn.init.ones_(self.o_norm.weight)
        reset_decay(self.A_log, self.dt_bias)

    def cost(self) -> Cost:
        c = self.config
        keys, values = c.n_heads * c.d_key, c.value_heads * c.d_value
        matrices = c.d_model * (3 * keys + 3 * values) + 2 * c.d_model * c.d_value + c.d_value * (keys + values)
        vectors = values + c.n_heads + keys + c.d_value  # gate bias, A_log, dt_bias, o_norm
        conv = c.conv_taps * (2 * keys + values)
        memory = c.value_heads * c.d_key * c.d_value
        windows = max(c.conv_taps - 1, 0) * (2 * keys + values)
        return Cost(matrices + vectors + conv, 2 * (matrices + conv) + 7 * memory, 4 * memory + 2 * windows)


class HeadNorm(nn.Module):
    """The weight [V] of a normalisation over each head, under the name published checkpoints give it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def reset_decay(A_log: Tensor, dt_bias: Tensor) -> None:
    """A_log = log U(1, 16); dt_bias = inverse softplus of a rate log-uniform in [1e-3, 1e-1], at least 1e-4."""
    with torch.no_grad():
        A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
