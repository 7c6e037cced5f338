"""DeltaNet: one beta a head, nothing decays, no output gate (arXiv 2605.22791, Eq. 5; fla's layer).

    e_t = beta_t k_t,  z_t = beta_t v_t,  beta_t = beta_max * sigmoid(W_b x_t);  y_t = W_o RMSNorm(o_t)

Axes: T tokens, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gdn2.kernels.layer import Gates
from gdn2.mixers.delta import DeltaConfig, DeltaMixer
from gdn2.mixers.frame import Cost


@dataclass(frozen=True)
class DeltaNetConfig(DeltaConfig):
    """Every published option of the layer; it has as many value heads as key heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_heads != self.n_heads:
            raise ValueError(f"DeltaNet has one value head a key head ({self.n_heads}), got {self.n_value_heads}")


class DeltaNet(DeltaMixer):
    """The DeltaNet layer."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config, Gates(config.d_key**-0.5, config.beta_max))

    def decay(self, x: Tensor) -> None:
        return None

    def gate(self, x: Tensor) -> None:
        return None

    def reset_rates(self) -> None:
        """Nothing decays."""

    def cost(self) -> Cost:
        c = self.sizes
        shared = self.shared_cost(0, 0)
        return shared._replace(flops_per_token=shared.flops_per_token - c.n_heads * c.d_key * c.d_value)
