"""Mamba-1: a decay of its own for every channel and state (arXiv 2312.00752, Algorithm 2; the layers of Samba).

    x, z = W x_t;  x = SiLU(conv(x));  dt, B, C = W_x x;  dt = softplus(W_dt dt + bias)
    S_t = exp(-exp(A_log) dt) S_{t-1} + dt x B^T;  y = S_t C + D x
    y_t = W_o (y * SiLU(z))

In the operator's terms each channel is a value head one wide, and all of them share one key head: key B and query C.

Axes: T tokens, N sequences, D model width, E inner channels, K states, R width of dt's bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdn2 import numerics
from gdn2.kernels import delta_rule, delta_step
from gdn2.mixers.conv import ShortConv
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn2 import reset_decay
from gdn2.mixers.linear import Linear
from gdn2.ragged import Ragged


@dataclass(frozen=True)
class Mamba1Config:
    """Every published option of the layer."""

    d_model: int
    d_inner: int | None = None  # E; None is twice d_model
    d_state: int = 16  # K
    dt_rank: int | None = None  # R; None is d_model / 16, rounded up
    conv_taps: int = 4
    proj_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("d_inner", "d_state", "dt_rank", "conv_taps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def inner(self) -> int:
        return self.d_inner or 2 * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or -(-self.d_model // 16)


class Mamba1(Mixer):
    """The Mamba-1 layer. Parameter names are mamba_ssm's. State: memory [N, E, K, 1] and the convolution's window."""

    kind = "recurrent"

    def __init__(self, config: Mamba1Config) -> None:
        super().__init__()
        self.config = c = config
        self.in_proj = Linear(c.d_model, 2 * c.inner, bias=c.proj_bias)
        self.conv1d = ShortConv(c.inner, c.conv_taps, bias=True)
        self.x_proj = Linear(c.inner, c.rank + 2 * c.d_state)
        self.dt_proj = Linear(c.rank, c.inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(c.inner, c.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(c.inner))
        self.out_proj = Linear(c.inner, c.d_model, bias=c.proj_bias)

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        state = self.new_state(ragged.n_sequences) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, window = self.conv1d(u, state["window"], ragged)
        q, k, written, g = self._fold(u)
        o, memory = delta_rule(
            q[None], k[None], None, written[None], g[None], state["memory"], ragged.starts,
            implementation=self.implementation,
        )  # fmt: skip
        return self._output(o[0, ..., 0], u, z), {"window": window, "memory": memory}

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d.step(u, state["window"])
        q, k, written, g = self._fold(u)
        o = delta_step(q, k, None, written, g, state["memory"], implementation=self.implementation)
        return self._output(o[..., 0], u, z)

    def _fold(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [T, 1, K], what is written, dt x [T, E, 1], and the log-decay [T, E, K] of convolved tokens u [T, E]."""
        dt, b, c = self.x_proj(u).split([self.config.rank, self.config.d_state, self.config.d_state], dim=-1)
        dt = numerics.softplus(self.dt_proj(dt).to(self.A_log.dtype))
        written = (dt * u.to(dt.dtype)).to(u.dtype)
        return c[:, None], b[:, None], written[..., None], -self.A_log.exp() * dt[..., None]

    def _output(self, o: Tensor, u: Tensor, z: Tensor) -> Tensor:
        y = (o + self.D.to(o.dtype) * u).to(z.dtype)
        return self.out_proj(y * numerics.silu(z))

    def new_state(self, n: int) -> LayerState:
        memory = self.A_log.new_zeros(n, self.config.inner, self.config.d_state, 1, dtype=torch.float32)
        return {"window": self.conv1d.window(n), "memory": memory}

    def reset_parameters(self) -> None:
        """A = 1, 2, ..., K in every channel, dt log-uniform in (1e-3, 1e-1), D one; matrices Xavier-uniform, 2^-2.5."""
        for linear in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv1d.reset_parameters()
        reset_decay(torch.empty(1), self.dt_proj.bias)
        nn.init.ones_(self.D)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.config.d_state + 1).log().expand_as(self.A_log))

    def cost(self) -> Cost:
        c = self.config
        matrices = 3 * c.d_model * c.inner + c.inner * (2 * c.rank + 2 * c.d_state)
        conv, memory = c.inner * c.conv_taps, c.inner * c.d_state
        vectors = 3 * c.inner + (2 * c.inner + c.d_model if c.proj_bias else 0)
        flops = 2 * (matrices + conv + c.inner) + 7 * memory  # decay 3, write 2, read 2
        return Cost(matrices + conv + vectors + memory, flops, 4 * memory + 2 * c.inner * (c.conv_taps - 1))
