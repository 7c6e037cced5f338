"""Mamba-1: a decay of its own for every channel and state (arXiv 2312.00752, Algorithm 2; the layers of Samba).

    x, z = W x_t;  x = SiLU(conv(x));  dt, B, C = W_x x;  dt = softplus(W_dt dt + bias)
    S_t = exp(-exp(A_log) dt) S_{t-1} + dt x B^T;  y = S_t C + D x
    y_t = W_o (y * SiLU(z))

In the operator's terms each channel is a head with one value, and all share key B and query C. Chunks would need a
64 x 64 matrix of every channel, so the recurrence runs token by token, for all sequences at once.

Axes: T tokens, N sequences, D model width, E inner channels, K states, R width of dt's bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdn2 import numerics
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
        dt, b, c = self._token(u)
        memory = state["memory"].clone()
        parts, rows = [u.new_empty(0, self.config.inner, dtype=dt.dtype)], []
        for t in range(max(ragged.lengths, default=0)):
            live = [n for n, length in enumerate(ragged.lengths) if length > t]
            at = torch.tensor([ragged.starts[n] + t for n in live], device=x.device)
            moved = self._moved(memory[live], dt[at], b[at], u[at])
            memory = memory.index_copy(0, torch.tensor(live, device=x.device), moved)
            parts.append(_read(moved, c[at]))
            rows.append(at)
        order = torch.argsort(torch.cat(rows)) if rows else torch.empty(0, dtype=torch.int64, device=x.device)
        return self._output(torch.cat(parts)[order], u, z), {"window": window, "memory": memory}

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d.step(u, state["window"])
        dt, b, c = self._token(u)
        state["memory"].copy_(self._moved(state["memory"], dt, b, u))
        return self._output(_read(state["memory"], c), u, z)

    def _token(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt [T, E], key B and query C [T, K] of convolved tokens u [T, E], in fp32 or wider."""
        dt, b, c = self.x_proj(u).split([self.config.rank, self.config.d_state, self.config.d_state], dim=-1)
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        return numerics.softplus(self.dt_proj(dt).to(wide)), b.to(wide), c.to(wide)

    def _moved(self, memory: Tensor, dt: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The memory [N, E, K, 1] after one token of each sequence: dt, u [N, E], b [N, K]."""
        decay = torch.exp(-self.A_log.exp() * dt[..., None])
        written = (dt * u.to(dt.dtype))[..., None] * b[:, None]
        return (decay * memory[..., 0] + written).to(memory.dtype)[..., None]

    def _output(self, o: Tensor, u: Tensor, z: Tensor) -> Tensor:
        y = (o + self.D.to(o.dtype) * u.to(o.dtype)).to(z.dtype)
        return self.out_proj(y * numerics.silu(z))

    def new_state(self, n: int) -> LayerState:
        memory = self.A_log.new_zeros(n, self.config.inner, self.config.d_state, 1, dtype=self.A_log.dtype)
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


def _read(memory: Tensor, c: Tensor) -> Tensor:
    """S C [N, E] of memory [N, E, K, 1] and queries c [N, K]."""
    return (memory[..., 0] * c[:, None].to(memory.dtype)).sum(-1)
