"""Gated DeltaNet: one beta and one decay a head (arXiv 2605.22791, Eq. 6; fla's layer and the authors' first version).

    e_t = beta_t k_t,  z_t = beta_t v_t,  beta_t = beta_max * sigmoid(W_b x_t [+ bias])    a value head
    g_t = -exp(A_log) * softplus(W_a x_t + dt_bias)                                        a value head
    y_t = W_o (RMSNorm(o_t) * act(W_g x_t))

The authors' first version is the same layer with a bias on beta: `beta_bias`. For a scalar decay, decaying before and
after the erase is one thing, so both orders of the literature agree.

Axes: T tokens, D model width, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdn2.kernels.layer import Gates
from gdn2.mixers.delta import Activation, DeltaConfig, DeltaMixer, check_gate
from gdn2.mixers.frame import Cost
from gdn2.mixers.gdn2 import reset_decay
from gdn2.mixers.linear import Linear


@dataclass(frozen=True)
class GDNConfig(DeltaConfig):
    """Every published option of the layer. Any head width: 192/384 and 200/400 are the authors' first version's."""

    gate: Activation = "silu"  # output gate
    beta_bias: bool = False  # the authors' first version has it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gate(self.gate)


class GatedDeltaNet(DeltaMixer):
    """The Gated DeltaNet layer."""

    def __init__(self, config: GDNConfig) -> None:
        super().__init__(config, Gates(config.d_key**-0.5, config.beta_max), beta_bias=config.beta_bias)
        self.config = c = config
        self.a_proj = Linear(c.d_model, c.value_heads)
        self.g_proj = Linear(c.d_model, c.values)
        self.A_log = nn.Parameter(torch.empty(c.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(c.value_heads, dtype=torch.float32))

    def decay(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a_proj(x), self.A_log, self.dt_bias

    def gate(self, x: Tensor) -> tuple[Tensor, Activation]:
        return self.g_proj(x), self.config.gate

    def reset_rates(self) -> None:
        reset_decay(self.A_log, self.dt_bias)
        with torch.no_grad():  # A is uniform in (0, 16) here; zero itself has no logarithm
            self.A_log.uniform_(0, 16).clamp_(min=1e-6).log_()

    def cost(self) -> Cost:
        c = self.config
        matrices = c.d_model * (c.value_heads + c.values)
        return self.shared_cost(matrices, 2 * c.value_heads + (c.value_heads if c.beta_bias else 0))
