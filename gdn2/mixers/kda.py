"""Kimi Delta Attention: one beta a head for erase and write, decay per channel (arXiv 2605.22791, Eq. 7; fla's layer).

    e_t = beta_t k_t,  z_t = beta_t v_t,  beta_t = beta_max * sigmoid(W_b x_t)             a value head
    g_t = -exp(A_log) * softplus(f_t + dt_bias),  f_t = W_2 W_1 x_t                        a value head and key channel
    g_t = lower_bound * sigmoid(exp(A_log) * (f_t + dt_bias))                              with a lower bound
    y_t = W_o (RMSNorm(o_t) * sigmoid(W_4 W_3 x_t + bias))

Axes: T tokens, D model width, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdn2.kernels.layer import Gates
from gdn2.mixers.delta import Activation, DeltaConfig, DeltaMixer
from gdn2.mixers.frame import Cost
from gdn2.mixers.gdn2 import reset_decay
from gdn2.mixers.linear import Linear


@dataclass(frozen=True)
class KDAConfig(DeltaConfig):
    """Every published option of the layer."""

    lower_bound: float | None = None  # the lowest log-decay, published as -5; None leaves it unbounded
    gate_bias: bool = True  # of the output gate: fla's layer has it, Kimi-Linear does not

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise ValueError(f"lower_bound must be negative, got {self.lower_bound}")


class KimiDeltaAttention(DeltaMixer):
    """The KDA layer."""

    def __init__(self, config: KDAConfig) -> None:
        super().__init__(config, Gates(config.d_key**-0.5, config.beta_max, config.lower_bound))
        self.config = c = config
        self.f_proj = nn.Sequential(Linear(c.d_model, c.d_value), Linear(c.d_value, c.value_heads * c.d_key))
        self.g_proj = nn.Sequential(Linear(c.d_model, c.d_value), Linear(c.d_value, c.values, bias=c.gate_bias))
        self.A_log = nn.Parameter(torch.empty(c.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(c.value_heads * c.d_key, dtype=torch.float32))

    def decay(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.f_proj(x).unflatten(-1, (self.config.value_heads, self.config.d_key))
        return f, self.A_log, self.dt_bias

    def gate(self, x: Tensor) -> tuple[Tensor, Activation]:
        return self.g_proj(x), "sigmoid"

    def reset_rates(self) -> None:
        reset_decay(self.A_log, self.dt_bias)
        if self.config.lower_bound is not None:
            nn.init.zeros_(self.A_log)  # the bounded gate starts with slope one

    def cost(self) -> Cost:
        c = self.config
        decays = c.value_heads * c.d_key
        matrices = 2 * c.d_model * c.d_value + c.d_value * (decays + c.values)
        return self.shared_cost(matrices, c.value_heads + decays + (c.values if c.gate_bias else 0))
