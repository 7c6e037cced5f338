"""What the mixers with one beta a head share: convolved q, k and v, one beta for erase and write, a norm a head.

    q, k = L2norm(SiLU(conv(W x))), q scaled by K^-1/2 after the norm;  v = SiLU(conv(W x))
    e_t = beta_t k_t,  z_t = beta_t v_t,  beta_t = beta_max * sigmoid(W_b x_t)
    y_t = W_o (RMSNorm(o_t) * act(gate_t))                                       gate: KDA and Gated DeltaNet

A mixer adds its decay, its gate and their parameters.

Axes: T tokens, N sequences, D model width, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gdn2 import numerics
from gdn2.kernels import delta_rule, delta_step
from gdn2.kernels.layer import Folded, Gates, Raw, fold_gates, gated_norm
from gdn2.mixers.conv import ShortConv
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn2 import HeadNorm
from gdn2.mixers.linear import Linear
from gdn2.ragged import Ragged

Activation = Literal["silu", "sigmoid"]


@dataclass(frozen=True)
class DeltaConfig:
    """Sizes every mixer with one beta a head has."""

    d_model: int
    n_heads: int = 16  # key heads, H
    d_key: int = 128  # K
    d_value: int = 128  # V
    n_value_heads: int | None = None  # Hv, a multiple of n_heads; None is n_heads
    conv_taps: int = 4
    beta_max: Literal[1, 2] = 1  # 2 allows negative eigenvalues; it doubles erase and write alike
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_key", "d_value", "conv_taps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.beta_max not in (1, 2):
            raise ValueError(f"beta_max must be 1 or 2, got {self.beta_max}")
        if self.value_heads % self.n_heads:
            raise ValueError(f"n_value_heads must be a multiple of n_heads {self.n_heads}, got {self.n_value_heads}")

    @property
    def value_heads(self) -> int:
        return self.n_value_heads or self.n_heads

    @property
    def keys(self) -> int:
        return self.n_heads * self.d_key

    @property
    def values(self) -> int:
        return self.value_heads * self.d_value


def check_gate(name: str) -> None:
    """Refuse an output gate activation that does not exist."""
    if name not in ("silu", "sigmoid"):
        raise ValueError(f"gate must be silu or sigmoid, got {name!r}")


class DeltaMixer(Mixer):
    """The common layer. Parameter names are fla's."""

    kind = "recurrent"

    def __init__(self, config: DeltaConfig, gates: Gates, *, beta_bias: bool = False) -> None:
        super().__init__()
        self.sizes = c = config
        self.gates = gates
        self.q_proj, self.k_proj = Linear(c.d_model, c.keys), Linear(c.d_model, c.keys)
        self.v_proj = Linear(c.d_model, c.values)
        self.b_proj = Linear(c.d_model, c.value_heads, bias=beta_bias)
        self.q_conv1d, self.k_conv1d = ShortConv(c.keys, c.conv_taps), ShortConv(c.keys, c.conv_taps)
        self.v_conv1d = ShortConv(c.values, c.conv_taps)
        self.o_norm = HeadNorm(c.d_value)
        self.o_proj = Linear(c.values, c.d_model)

    @abstractmethod
    def decay(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Decay logits [T, Hv, K] or [T, Hv] of tokens x, A_log [Hv] and dt_bias; None keeps everything."""

    @abstractmethod
    def gate(self, x: Tensor) -> tuple[Tensor, Activation] | None:
        """Output gate [T, Hv V] of tokens x before its activation, and that; None leaves the gate out."""

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        state = self.new_state(ragged.n_sequences) if state is None else state
        new: LayerState = {}
        q, new["q_window"] = self.q_conv1d(self.q_proj(x), state["q_window"], ragged)
        k, new["k_window"] = self.k_conv1d(self.k_proj(x), state["k_window"], ragged)
        v, new["v_window"] = self.v_conv1d(self.v_proj(x), state["v_window"], ragged)
        f = self._fold(x, q, k, v)
        o, new["memory"] = delta_rule(
            f.q[None], f.k[None], f.e[None], f.z[None], None if f.g is None else f.g[None],
            state["memory"], ragged.starts, implementation=self.implementation,
        )  # fmt: skip
        return self._output(x, o[0]), new

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        q = self.q_conv1d.step(self.q_proj(x), state["q_window"])
        k = self.k_conv1d.step(self.k_proj(x), state["k_window"])
        v = self.v_conv1d.step(self.v_proj(x), state["v_window"])
        o = delta_step(*self._fold(x, q, k, v), state["memory"], implementation=self.implementation)
        return self._output(x, o)

    def _fold(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Folded:
        heads, value_heads = (self.sizes.n_heads, self.sizes.d_key), (self.sizes.value_heads, self.sizes.d_value)
        f, A_log, dt_bias = self.decay(x) or (None, None, None)
        raw = Raw(
            q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, value_heads),
            self.b_proj(x), None, f, A_log, dt_bias,
        )  # fmt: skip
        return fold_gates(raw, self.gates, self.implementation)

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        eps, gate = self.sizes.norm_eps, self.gate(x)
        if gate is None:
            y = numerics.rms_norm(o, self.o_norm.weight, eps)
        else:
            logits, activation = gate
            logits = logits.unflatten(-1, (self.sizes.value_heads, self.sizes.d_value))
            y = gated_norm(o, logits, self.o_norm.weight, eps, activation, self.implementation)
        return self.o_proj(y.flatten(-2).to(x.dtype))

    def new_state(self, n: int) -> LayerState:
        c = self.sizes
        windows = {f"{name}_window": getattr(self, f"{name}_conv1d").window(n) for name in "qkv"}
        shape = (n, c.value_heads, c.d_key, c.d_value)
        return {**windows, "memory": self.o_norm.weight.new_zeros(shape, dtype=torch.float32)}

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices with gain 2^-2.5, as the paper's models; the rates are the mixer's own."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ShortConv):
                module.reset_parameters()
        nn.init.ones_(self.o_norm.weight)
        self.reset_rates()

    @abstractmethod
    def reset_rates(self) -> None:
        """Draw the parameters of the decay."""

    def shared_cost(self, matrices: int, vectors: int) -> Cost:
        """The layer's cost, given the parameters that decay and gate add: those in matrices, and the others."""
        c = self.sizes
        matrices += c.d_model * (2 * c.keys + 2 * c.values + c.value_heads)
        conv = c.conv_taps * (2 * c.keys + c.values)
        memory = c.value_heads * c.d_key * c.d_value
        windows = (c.conv_taps - 1) * (2 * c.keys + c.values)
        return Cost(matrices + vectors + conv + c.d_value, 2 * (matrices + conv) + 7 * memory, 4 * memory + 2 * windows)
