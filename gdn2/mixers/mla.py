"""Multi-head latent attention without rotation: keys and values of all heads out of one small vector (Kimi-Linear).

    q_h, p_h = W_q x                 of each head: what meets its own keys, and what meets the key that heads share
    c, r     = RMSNorm(W_a x), W_r x the latent, and the shared key: all that is kept of a token
    k_h, v_h = W_k c, W_v c
    o_h      = sum_s softmax_s((q_h . k_h,s + p_h . r_s) / sqrt(d)) v_h,s,   s <= t,   d = width of q_h and p_h together
    y        = W_o o

Since W_k and W_v are linear, q_h . W_k c = (W_k^T q_h) . c and the sum of W_v c_s is W_v times the sum: attention runs
on the latents themselves, one key head for all queries, and no key or value is ever written out. Parameter names are
the checkpoints'.

Axes: T tokens, N sequences, D model width, H heads, C latent width, S shared key width, L cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdn2 import numerics
from gdn2.mixers.attention import grown
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn2 import HeadNorm
from gdn2.mixers.linear import Linear, blocked
from gdn2.mixers.softmax import attend, attend_cached
from gdn2.ragged import Ragged


@dataclass(frozen=True)
class LatentConfig:
    """The defaults are Kimi-Linear's."""

    d_model: int
    n_heads: int = 32  # H
    d_latent: int = 512  # C
    d_key: int = 128  # of a head's own keys
    d_shared: int = 64  # S
    d_value: int = 128
    norm_eps: float = 1e-6  # of the latent

    def __post_init__(self) -> None:
        for name in ("n_heads", "d_latent", "d_key", "d_shared", "d_value"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class LatentAttention(Mixer):
    """The layer. State: latent and shared key of each token, `latents` [N, 1, L, C + S], and `position` [N]."""

    kind = "attention"

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.d_model, c.n_heads * (c.d_key + c.d_shared))
        self.kv_a_proj_with_mqa = Linear(c.d_model, c.d_latent + c.d_shared)
        self.kv_a_layernorm = HeadNorm(c.d_latent)
        self.kv_b_proj = Linear(c.d_latent, c.n_heads * (c.d_key + c.d_value))
        self.o_proj = Linear(c.n_heads * c.d_value, c.d_model)

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        state = self.new_state(ragged.n_sequences) if state is None else state
        begun = state["position"].tolist()
        q, latents = self._queries(x), self._latents(x)
        cache = grown(state["latents"], max((b + n for b, n in zip(begun, ragged.lengths, strict=True)), default=0))
        cache = cache.clone()
        out = []
        for n, start in enumerate(begun):
            rows = slice(ragged.starts[n], ragged.starts[n + 1])
            seen = torch.cat([state["latents"][n, :, :start].transpose(0, 1).to(x.dtype), latents[rows]])
            out.append(attend(q[rows], seen, seen[..., : self.config.d_latent], start, None))
            cache[n, :, start : start + ragged.lengths[n]] = latents[rows].transpose(0, 1).to(cache.dtype)
        position = state["position"] + ragged.counts
        mixed = torch.cat(out) if out else q[..., : self.config.d_latent]
        return self._output(mixed), {"latents": cache, "position": position}

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        position = state["position"]
        longest = int(position.max()) + 1 if position.numel() else 0
        state["latents"] = cache = grown(state["latents"], longest)
        cache[torch.arange(x.shape[0], device=x.device), :, position] = self._latents(x).to(cache.dtype)
        position += 1
        seen = cache.to(x.dtype)
        return self._output(
            attend_cached(self._queries(x), seen, seen[..., : self.config.d_latent], position, ring=False)
        )

    def _queries(self, x: Tensor) -> Tensor:
        """Queries of the latents and of the shared key [T, 1, H, C + S], with the layer's own scale."""
        c = self.config
        own, shared = self.q_proj(x).unflatten(-1, (c.n_heads, -1)).split([c.d_key, c.d_shared], -1)
        q = torch.cat([each_head(own, self._expansions()[0].mT), shared], -1)
        scale = ((c.d_latent + c.d_shared) / (c.d_key + c.d_shared)) ** 0.5  # attention divides by its own width's root
        return (q * scale)[:, None]

    def _latents(self, x: Tensor) -> Tensor:
        """[T, 1, C + S]."""
        latent, shared = self.kv_a_proj_with_mqa(x).split([self.config.d_latent, self.config.d_shared], -1)
        latent = numerics.rms_norm(latent, self.kv_a_layernorm.weight, self.config.norm_eps)
        return torch.cat([latent, shared], -1)[:, None]

    def _expansions(self) -> tuple[Tensor, Tensor]:
        """W_k [H, d_key, C] and W_v [H, d_value, C]."""
        c = self.config
        keys, values = self.kv_b_proj.weight.unflatten(0, (c.n_heads, -1)).split([c.d_key, c.d_value], 1)
        return keys, values

    def _output(self, o: Tensor) -> Tensor:
        """y [T, D] from the mixed latents [T, 1, H, C]."""
        return self.o_proj(each_head(o[:, 0], self._expansions()[1]).flatten(1))

    def new_state(self, n: int) -> LayerState:
        weight = self.q_proj.weight
        latents = weight.new_zeros(n, 1, 0, self.config.d_latent + self.config.d_shared)
        return {"latents": latents, "position": torch.zeros(n, dtype=torch.int64, device=weight.device)}

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices with gain 2^-1/2."""
        for linear in (self.q_proj, self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
        nn.init.ones_(self.kv_a_layernorm.weight)

    def cost(self) -> Cost:
        c = self.config
        kept = c.d_latent + c.d_shared
        matrices = c.d_model * (c.n_heads * (c.d_key + c.d_shared + c.d_value) + kept)
        matrices += c.d_latent * c.n_heads * (c.d_key + c.d_value)
        return Cost(
            params=matrices + c.d_latent,
            flops_per_token=2 * matrices,
            state_bytes=0,
            flops_per_past_token=2 * c.n_heads * (kept + c.d_latent),
            bytes_per_token=2 * kept,
        )


def each_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, D] times weight [H, E, D] of its own head: [T, H, E]; batch-invariant wherever gradients are off."""
    if torch.is_grad_enabled() or x.shape[0] == 0:
        return torch.einsum("thd,hed->the", x, weight)
    return torch.stack([blocked(x[:, h], weight[h]) for h in range(weight.shape[0])], 1)
