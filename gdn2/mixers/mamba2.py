"""Mamba-2: a state-space layer with one decay a head (arXiv 2405.21060; 2605.22791, Eq. 4; mamba_ssm's layer).

    z, x, B, C, dt = W x_t;  x, B, C = SiLU(conv(x, B, C));  dt = clamp(softplus(dt + dt_bias))
    S_t = exp(-exp(A_log) dt) S_{t-1} + dt B x^T;  y = S_t^T C + D x
    y_t = W_o RMSNorm(y * SiLU(z)), the norm over each of the groups

No L2 norm and no scale on B and C, which the heads of a group share.

Axes: T tokens, N sequences, D model width, H heads, P head width, G groups, K state width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdn2 import numerics
from gdn2.kernels import choose, delta_rule, delta_step, numba
from gdn2.kernels.watch import WATCHER
from gdn2.mixers.conv import ShortConv
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn2 import HeadNorm, reset_decay
from gdn2.mixers.linear import Linear
from gdn2.ragged import Ragged


@dataclass(frozen=True)
class Mamba2Config:
    """Every published option of the layer."""

    d_model: int
    n_heads: int = 64  # H; the inner width is H P
    d_head: int = 64  # P
    d_state: int = 128  # K
    n_groups: int = 1  # G, divides n_heads
    conv_taps: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_limit: tuple[float, float] | None = None  # lowest and highest dt, in prefill and in decoding; None is no limit
    norm: bool = True  # without it the layer ends in y * SiLU(z)
    norm_groups: int | None = None  # parts of the inner width normalised on their own; None is n_groups
    norm_before_gate: bool = False  # RMSNorm(y) * SiLU(z)
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("n_heads", "d_head", "d_state", "n_groups", "conv_taps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups must divide n_heads {self.n_heads}, got {self.n_groups}")
        if self.d_inner % self.normed_groups:
            raise ValueError(f"norm_groups must divide the inner width {self.d_inner}, got {self.norm_groups}")
        if self.dt_limit is not None:
            low, high = self.dt_limit
            if not 0 <= low < high:
                raise ValueError(f"dt_limit must be two rising numbers >= 0, got {list(self.dt_limit)}")

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.d_head

    @property
    def normed_groups(self) -> int:
        return self.norm_groups or self.n_groups

    @property
    def convolved(self) -> int:
        """Channels of x, B and C together."""
        return self.d_inner + 2 * self.n_groups * self.d_state


class Mamba2(Mixer):
    """The Mamba-2 layer. Parameter names are mamba_ssm's."""

    kind = "recurrent"

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = c = config
        self.in_proj = Linear(c.d_model, c.d_inner + c.convolved + c.n_heads, bias=c.proj_bias)
        self.conv1d = ShortConv(c.convolved, c.conv_taps, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(c.n_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(c.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(c.n_heads))
        if c.norm:
            self.norm = HeadNorm(c.d_inner)
        self.out_proj = Linear(c.d_inner, c.d_model, bias=c.proj_bias)

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        state = self.new_state(ragged.n_sequences) if state is None else state
        if self._in_loops(x):
            window = torch.empty(state["window"].shape, dtype=torch.float32)
            memory = state["memory"].clone(memory_format=torch.contiguous_format)
            y = numba.mamba2(self.in_proj(x), self._parts(), (state["window"], window), memory, ragged.starts)
            return self.out_proj(y), {"window": window.to(state["window"].dtype), "memory": memory}
        z, u, dt = self._split(x)
        u, window = self.conv1d(u, state["window"], ragged)
        q, k, v, written, g = self._fold(u, dt)
        o, memory = delta_rule(
            q[None], k[None], None, written[None], g[None], state["memory"], ragged.starts,
            implementation=self.implementation,
        )  # fmt: skip
        return self._output(o[0], v, z), {"window": window, "memory": memory}

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        if self._in_loops(x):
            window = state["window"].float().contiguous()
            rows = range(x.shape[0] + 1)
            y = numba.mamba2(self.in_proj(x), self._parts(), (window, window), state["memory"], rows)
            if window is not state["window"]:
                state["window"].copy_(window)
            return self.out_proj(y)
        z, u, dt = self._split(x)
        q, k, v, written, g = self._fold(self.conv1d.step(u, state["window"]), dt)
        o = delta_step(q, k, None, written, g, state["memory"], implementation=self.implementation)
        return self._output(o, v, z)

    def _in_loops(self, x: Tensor) -> bool:
        """Whether compiled loops do all that lies between the projections."""
        return x.dtype != torch.float64 and choose(x.device, self.implementation) == "numba" and WATCHER.get() is None

    def _parts(self) -> numba.Mamba2:
        c = self.config
        low, high = c.dt_limit or (0.0, math.inf)
        return numba.Mamba2(
            self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, self.A_log, self.D,
            self.norm.weight if c.norm else None, c.normed_groups, c.norm_before_gate, c.norm_eps, low, high,
        )  # fmt: skip

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [T, H P], (x, B, C) together [T, H P + 2 G K] and dt [T, H] before their activations."""
        c = self.config
        z, u, dt = self.in_proj(x).split([c.d_inner, c.convolved, c.n_heads], dim=-1)
        return z, u, dt

    def _fold(self, u: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k [T, G, K], v and what is written, dt v [T, H, P], and the log-decay [T, H]."""
        c = self.config
        v, b, query = u.split([c.d_inner, c.n_groups * c.d_state, c.n_groups * c.d_state], dim=-1)
        wide = torch.float64 if dt.dtype == torch.float64 else torch.float32
        dt = numerics.softplus(dt.to(wide) + self.dt_bias)
        if c.dt_limit is not None:
            dt = dt.clamp(*c.dt_limit)
        v = v.unflatten(-1, (c.n_heads, c.d_head))
        g = -self.A_log.exp() * dt
        k, q = (y.unflatten(-1, (c.n_groups, c.d_state)) for y in (b, query))
        return q, k, v, (dt[..., None] * v).to(v.dtype), g

    def _output(self, o: Tensor, v: Tensor, z: Tensor) -> Tensor:
        c = self.config
        y = (o + self.D[:, None].to(o.dtype) * v).flatten(-2)
        gate = numerics.silu(z)
        if not c.norm:
            return self.out_proj(y * gate)
        y = y if c.norm_before_gate else y * gate
        groups = (c.normed_groups, -1)
        y = numerics.rms_norm(y.unflatten(-1, groups), self.norm.weight.view(groups), c.norm_eps).flatten(-2)
        return self.out_proj(y * gate if c.norm_before_gate else y)

    def new_state(self, n: int) -> LayerState:
        c = self.config
        memory = self.A_log.new_zeros(n, c.n_heads, c.d_state, c.d_head, dtype=torch.float32)
        return {"window": self.conv1d.window(n), "memory": memory}

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices with gain 2^-2.5; A uniform in (1, 16), dt log-uniform in (1e-3, 1e-1); D one."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv1d.reset_parameters()
        reset_decay(self.A_log, self.dt_bias)
        nn.init.ones_(self.D)
        if self.config.norm:
            nn.init.ones_(self.norm.weight)

    def cost(self) -> Cost:
        c = self.config
        projected = c.d_inner + c.convolved + c.n_heads
        matrices = c.d_model * (projected + c.d_inner)
        conv = c.convolved * c.conv_taps
        vectors = 3 * c.n_heads + (c.d_inner if c.norm else 0) + (c.convolved if c.conv_bias else 0)
        vectors += projected + c.d_model if c.proj_bias else 0
        memory = c.n_heads * c.d_state * c.d_head
        window = c.convolved * (c.conv_taps - 1)
        flops = 2 * (matrices + conv + c.d_inner) + 5 * memory
        return Cost(matrices + conv + vectors, flops, 4 * memory + 2 * window)
