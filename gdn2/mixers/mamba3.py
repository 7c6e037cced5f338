"""Mamba-3: trapezoidal writes and rotating keys; SISO, or MIMO of rank R (arXiv 2605.22791, Eq. 16; mamba_ssm).

    z, v, B, C, dt, A, trap, angles = W x_t;  dt = softplus(dt + dt_bias);  A = -act(A), at most -A_floor
    alpha = exp(A dt);  lambda = sigmoid(trap);  theta_t = sum_{s <= t} dt_s pi tanh(angle_s)  (mod 2 pi)
    k, q = rotate(RMSNorm(B) + B_bias), rotate(RMSNorm(C) + C_bias)
    S_t = alpha S_{t-1} + (1 - lambda) dt alpha k_{t-1} v_{t-1}^T + lambda dt k_t v_t^T,  nothing before the first token
    y   = (S_t^T q + D v) * SiLU(z)                    or, with the output norm, RMSNorm over each head times SiLU(z)
    MIMO: v_r = v * mimo_x[r], the write summed over r, y = sum_r mimo_o[r] * (S_t^T q_r + D v_r) * SiLU(z * mimo_z[r])

A token is 2 R rows of the operator: the R writes of the token before it, then its own. So the carried state is S
itself, and a sequence read in pieces gives the bits of the whole. Training writes each token once, in advance:
c_t = lambda_t dt_t + (1 - lambda_{t+1}) dt_{t+1}, and a token sees lambda_t dt_t / c_t of its own write.

The phase theta is counted in 2^-32 turns by integers, which wrap by themselves and add up alike in any pieces and at
any length: 4e-7 radians off after a million tokens, where a sum in fp32 would have lost the phase. What surrounds the
operator is in `gdn2.kernels.mamba3`.

Axes: T tokens, N sequences, D model width, H heads, P head width, K state width, G groups, R rank, J rotating pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gdn2 import numerics
from gdn2.kernels import delta_rule, delta_step
from gdn2.kernels.mamba3 import Mixing, Shared, Turning, ranked, read, turn, write
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn2 import HeadNorm, reset_decay
from gdn2.mixers.linear import Linear
from gdn2.ragged import Ragged


@dataclass(frozen=True)
class Mamba3Config:
    """Every published option of the layer."""

    d_model: int
    n_heads: int = 64  # H; the inner width is H P
    d_head: int = 64  # P
    d_state: int = 128  # K
    n_groups: int = 1  # G, divides n_heads
    rank: int | None = None  # R of MIMO; None is SISO
    rope_fraction: float = 0.5  # 0.5 or 1: part of the state that rotates
    # Channel 2i with 2i + 1, or i with i + K/2. None is the published kernels': neighbours for SISO, halves for MIMO.
    pairing: Literal["neighbours", "halves"] | None = None
    a_activation: Literal["softplus", "heavy_tail"] = "softplus"  # no checkpoint says which of the two it needs
    a_floor: float = 1e-4
    out_norm: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("n_heads", "d_head", "d_state", "n_groups", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if 32 % self.rows:  # else the operator's chunks of 64 rows would not end where pieces of 64 tokens do
            raise ValueError(f"rank must divide 32, got {self.rank}")
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups must divide n_heads {self.n_heads}, got {self.n_groups}")
        if self.rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction must be 0.5 or 1, got {self.rope_fraction}")
        if self.d_state % 2:
            raise ValueError(f"d_state must be even, got {self.d_state}")
        if self.pairing not in (None, "neighbours", "halves"):
            raise ValueError(f"pairing must be neighbours or halves, got {self.pairing!r}")
        if self.a_activation not in ("softplus", "heavy_tail"):
            raise ValueError(f"a_activation must be softplus or heavy_tail, got {self.a_activation!r}")

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.d_head

    @property
    def rows(self) -> int:
        """R."""
        return self.rank or 1

    @property
    def pairs(self) -> int:
        """J."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def in_halves(self) -> bool:
        return (self.pairing or ("neighbours" if self.rank is None else "halves")) == "halves"

    @property
    def parts(self) -> list[int]:
        """Widths of z, v, B, C, dt, A, trap and angles in the input projection."""
        shared = self.d_state * self.n_groups * self.rows
        return [self.d_inner, self.d_inner, shared, shared, self.n_heads, self.n_heads, self.n_heads, self.pairs]


class _Token(NamedTuple):
    """What a token's projections come to."""

    z: Tensor  # [T, H, P]
    v: Tensor  # [T, H, P]
    b: Tensor  # [T, R G K]
    c: Tensor  # [T, R G K]
    dt: Tensor  # [T, H]
    angle: Tensor  # [T, J]
    g: Tensor  # log-decay A dt [T, H]
    own: Tensor  # lambda dt: weight of the token's own write [T, H]
    back: Tensor  # (1 - lambda) dt: weight of the write of the token before it [T, H]


class Mamba3(Mixer):
    """The Mamba-3 layer. Parameter names are mamba_ssm's. State: theta, memory, k_last (rotated) and v_last."""

    kind = "recurrent"

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = c = config
        self.in_proj = Linear(c.d_model, sum(c.parts))
        self.dt_bias = nn.Parameter(torch.empty(c.n_heads, dtype=torch.float32))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(c.n_heads, c.rows, c.d_state)) for _ in range(2))
        self.B_norm, self.C_norm = HeadNorm(c.d_state), HeadNorm(c.d_state)
        self.D = nn.Parameter(torch.ones(c.n_heads))
        if c.rank is not None:
            self.mimo_x, self.mimo_z, self.mimo_o = (
                nn.Parameter(torch.ones(c.n_heads, c.rank, c.d_head)) for _ in range(3)
            )  # fmt: skip
        if c.out_norm:
            self.norm = HeadNorm(c.d_inner)
        self.out_proj = Linear(c.d_inner, c.d_model)

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        begun = self.new_state(ragged.n_sequences) if state is None else state
        token = self._token(x)
        k, q, theta = self._turned(token, begun["theta"], ragged)
        if torch.is_grad_enabled():
            o, memory = self._write_ahead(token, q, k, ragged, state)
        else:
            order, here, _ = ragged.behind_windows(1)
            keys = torch.cat([k, begun["k_last"].to(k.dtype)])[order]
            values = torch.cat([token.v, begun["v_last"].to(token.v.dtype)])[order]
            q, keys, written, g = self._rows(token, q, k, keys[here - 1], values[here - 1])
            bounds = [2 * self.config.rows * n for n in ragged.starts]
            o, memory = delta_rule(
                q[None], keys[None], None, written[None], g[None], begun["memory"], bounds,
                rank=2 * self.config.rows, implementation=self.implementation,
            )  # fmt: skip
            o = self._own_rows(o[0])
        last = {
            name: begun[name].index_copy(0, ragged.begun, tokens[ragged.last].to(begun[name].dtype))
            for name, tokens in (("k_last", k), ("v_last", token.v))
        }
        return self._output(o, token), {"theta": theta, "memory": memory, **last}

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        token = self._token(x)
        k, q, theta = self._turned(token, state["theta"], None)
        queries, keys, written, g = self._rows(token, q, k, state["k_last"].to(k.dtype), state["v_last"].to(k.dtype))
        o = delta_step(
            queries, keys, None, written, g, state["memory"],
            rank=2 * self.config.rows, implementation=self.implementation,
        )  # fmt: skip
        state["theta"].copy_(theta)
        state["k_last"].copy_(k)
        state["v_last"].copy_(token.v)
        return self._output(self._own_rows(o), token)

    def _token(self, x: Tensor) -> _Token:
        c = self.config
        z, v, b, query, dt, a, trap, angle = self.in_proj(x).split(c.parts, dim=-1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dt = numerics.softplus(dt.to(wide) + self.dt_bias)
        a = a.to(wide)
        size = numerics.softplus(a) if c.a_activation == "softplus" else heavy_tail(a)
        share = numerics.sigmoid(trap.to(wide))
        z, v = (y.unflatten(-1, (c.n_heads, c.d_head)) for y in (z, v))
        return _Token(z, v, b, query, dt, angle, -size.clamp_min(c.a_floor) * dt, share * dt, (1 - share) * dt)

    def _turned(self, token: _Token, theta: Tensor, ragged: Ragged | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated keys and queries [T, R, H, K] in the activations' dtype, and the phases after them."""
        c = self.config
        how = Turning(c.n_heads, c.n_groups, c.rows, c.d_state, c.pairs, c.in_halves, c.norm_eps)
        key = Shared(token.b, self.B_norm.weight, self.B_bias)
        query = Shared(token.c, self.C_norm.weight, self.C_bias)
        return turn(key, query, token.dt, token.angle, theta, ragged, how, self.implementation)

    @property
    def _mimo_x(self) -> Tensor | None:
        return None if self.config.rank is None else self.mimo_x

    def _rows(self, token: _Token, q: Tensor, k: Tensor, k_last: Tensor, v_last: Tensor) -> tuple[Tensor, ...]:
        """The 2 R rows of each token, flattened: q and k [2 R T, H, K], what is written [2 R T, H, P], g [2 R T, H]."""
        dtype = token.v.dtype
        back = (token.g.exp() * token.back)[:, None, :, None] * ranked(v_last, self._mimo_x)
        own = token.own[:, None, :, None] * ranked(token.v, self._mimo_x)
        written = torch.cat([back, own], 1).to(dtype).flatten(0, 1)
        g = torch.zeros(
            token.g.shape[0], 2 * self.config.rows, *token.g.shape[1:], dtype=token.g.dtype, device=q.device
        )
        g[:, 0] = token.g
        return torch.cat([q, q], 1).flatten(0, 1), torch.cat([k_last, k], 1).flatten(0, 1), written, g.flatten(0, 1)

    def _own_rows(self, o: Tensor) -> Tensor:
        """Of 2 R outputs a token, the last R: what is read once its own write is in. [2 R T, H, P] to [T, R, H, P]."""
        rank = self.config.rows
        return o.unflatten(0, (-1, 2 * rank))[:, rank:]

    def _write_ahead(
        self, token: _Token, q: Tensor, k: Tensor, ragged: Ragged, state: LayerState | None
    ) -> tuple[Tensor, Tensor]:
        """Every token's write at once, with the weight the next token gives it: o [T, R, H, P] and the memory."""
        rank, live = self.config.rows, ragged.begun
        # A sequence's last token has none after it yet.
        later = torch.cat([token.back[1:], token.back[:1]]).index_fill(0, ragged.last, 0.0)
        weight = token.own + later
        written = write(token.v, weight, self._mimo_x, self.implementation)
        memory = None
        if state is not None:
            carried = torch.einsum(
                "nrhk,nrhv,nh->nhkv",
                state["k_last"][live], ranked(state["v_last"][live], self._mimo_x), token.back[ragged.cu_seqlens[live]],
            )  # fmt: skip
            memory = state["memory"].to(carried.dtype).index_add(0, live, carried)
        o, memory = delta_rule(
            q.flatten(0, 1)[None], k.flatten(0, 1)[None], None, written.flatten(0, 1)[None],
            nn.functional.pad(token.g[:, None], (0, 0, 0, rank - 1)).flatten(0, 1)[None],
            memory, [rank * n for n in ragged.starts],
            diag=(token.own / weight).repeat_interleave(rank, 0)[None], rank=rank, implementation=self.implementation,
        )  # fmt: skip
        return o.squeeze(0).unflatten(0, (-1, rank)), memory

    def _output(self, o: Tensor, token: _Token) -> Tensor:
        c = self.config
        x, z, out = (None, None, None) if c.rank is None else (self.mimo_x, self.mimo_z, self.mimo_o)
        norm = self.norm.weight.view(c.n_heads, c.d_head) if c.out_norm else None
        y = read(o, token.v, token.z, Mixing(self.D, x, z, out, norm), c.norm_eps, self.implementation)
        return self.out_proj(y.flatten(1))

    def new_state(self, n: int) -> LayerState:
        c, weight = self.config, self.in_proj.weight
        return {
            "theta": torch.zeros(n, c.n_heads, c.pairs, dtype=torch.int32, device=weight.device),
            "memory": weight.new_zeros(n, c.n_heads, c.d_state, c.d_head, dtype=torch.float32),
            "k_last": weight.new_zeros(n, c.rows, c.n_heads, c.d_state),
            "v_last": weight.new_zeros(n, c.n_heads, c.d_head),
        }

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices with gain 2^-2.5; dt log-uniform in (1e-3, 1e-1); MIMO weights 1/R, 1/R and 1."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        reset_decay(torch.empty_like(self.dt_bias), self.dt_bias)
        for parameter in (self.B_bias, self.C_bias, self.B_norm.weight, self.C_norm.weight, self.D):
            nn.init.ones_(parameter)
        if self.config.rank is not None:
            nn.init.constant_(self.mimo_x, 1 / self.config.rank)
            nn.init.constant_(self.mimo_o, 1 / self.config.rank)
            nn.init.ones_(self.mimo_z)
        if self.config.out_norm:
            nn.init.ones_(self.norm.weight)

    def cost(self) -> Cost:
        c = self.config
        matrices = c.d_model * (sum(c.parts) + c.d_inner)
        vectors = 2 * c.n_heads + 2 * c.n_heads * c.rows * c.d_state + 2 * c.d_state
        vectors += (3 * c.d_inner * c.rank if c.rank is not None else 0) + (c.d_inner if c.out_norm else 0)
        memory = c.n_heads * c.d_state * c.d_head
        flops = 2 * matrices + (1 + 6 * c.rows) * memory  # decay; R writes of two tokens, R reads
        state = 4 * (memory + c.n_heads * c.pairs) + 2 * (c.rows * c.n_heads * c.d_state + c.d_inner)
        return Cost(matrices + vectors, flops, state)


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x from zero on, 1 / (1 - x) below it."""
    return torch.where(x >= 0, 1 + x, 1 / (1 + x.abs()))
