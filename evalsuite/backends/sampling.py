"""Which token comes next: the most likely one, or one drawn at random, the same in any batch.

A token is drawn as the largest of logit + temperature * noise, which has softmax's distribution if the noise is
Gumbel's. The noise of a token is a function of its request's seed, its position in the answer and its number in the
vocabulary; nothing is summed up over the vocabulary but integers, so no result depends on an order.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evalsuite.types import Sampling
from gdn2.kernels import noise

# Values of a table that noise is made for at once: some ten tensors of that size are needed meanwhile.
TABLE_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}

# exp2 on [0, 1], to 2e-7 of itself, made as the series of `gdn2.kernels.noise`.
_EXP2 = (
    0.001877552829682827, 0.00898932758718729, 0.05582640320062637, 0.24015355110168457, 0.6931530833244324,
    0.9999999403953552,
)  # fmt: skip
_LOG2E = 1.44269502162933349609375  # in fp32
_ONE = 1 << 30

# The work that choosing takes; "cut" where top_p or top_k leave tokens out.
Form = Literal["greedy", "drawn", "cut"]


@dataclass(frozen=True)
class Draws:
    """How the next token of each of N rows is chosen, on the device of the logits."""

    temperature: Tensor  # fp32 [N]; 0 takes the most likely
    top_p: Tensor  # fp64 [N]
    top_k: Tensor  # int64 [N], at most V
    counters: Tensor  # int64 [N], of `gdn2.kernels.noise`: seed and position

    def put(self, rows: Tensor, other: Draws) -> None:
        """Replace `rows` by those of `other`."""
        for mine, given in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[rows] = given

    def advance(self) -> None:
        """One position further."""
        self.counters.add_(noise.signed(noise.GAMMA))


def draws(asked: Sequence[Sampling | None], positions: Sequence[int], vocabulary: int, device: torch.device) -> Draws:
    """What `asked` says of the token at `positions` of each row's answer; None is greedy. Waits for no device."""
    rows = [Sampling(0.0, 0) if one is None else one for one in asked]
    counters = [noise.counter(one.seed, at) for one, at in zip(rows, positions, strict=True)]
    made = Draws(
        torch.tensor([one.temperature for one in rows], dtype=torch.float32),
        torch.tensor([one.top_p for one in rows], dtype=torch.float64),
        torch.tensor([min(one.top_k or vocabulary, vocabulary) for one in rows], dtype=torch.int64),
        torch.tensor(counters, dtype=torch.int64),
    )
    if device.type == "cpu":
        return made
    return Draws(*(x.pin_memory().to(device, non_blocking=True) for x in vars(made).values()))


def form(asked: Iterable[Sampling | None]) -> Form:
    """The work that choosing takes for `asked`."""
    sampled = [one for one in asked if one is not None and one.temperature > 0]
    if not sampled:
        return "greedy"
    return "cut" if any(one.top_k or one.top_p < 1 for one in sampled) else "drawn"


def choose(
    logits: Tensor, asked: Sequence[Sampling | None], positions: Sequence[int], rows: Tensor | None = None
) -> Tensor:
    """Tokens int64 [N] of rows of logits [., V]; -1 where they are not finite.

    Args:
        asked: how each is chosen.
        positions: where each stands in its answer.
        rows: the row of logits of each, int64 [N]; None is its own.
    """
    kind = form(asked)
    if kind == "greedy":
        best = greedy(logits)
        return best if rows is None else best[rows]
    made = draws(asked, positions, logits.shape[1], logits.device)
    size = max(TABLE_VALUES[logits.device.type] // logits.shape[1], 1)
    parts = []
    for at in range(0, len(asked), size):
        part = slice(at, at + size)
        table = logits[part] if rows is None else logits[rows[part]]
        parts.append(drawn(table, Draws(*(x[part] for x in vars(made).values())), kind))
    return torch.cat(parts)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits (or log-probabilities) [N, V], int64 [N]; -1 where not finite."""
    return torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1)


def drawn(logits: Tensor, how: Draws, kind: Form) -> Tensor:
    """A token drawn from each row of logits [N, V], int64 [N]; -1 where they are not finite."""
    table = noise.gumbel(how.counters, logits.shape[1]).mul_(how.temperature[:, None]).add_(logits)
    if kind == "cut":
        table.masked_fill_(logits < _lowest(logits, how), -torch.inf)
    return torch.where(torch.isfinite(logits).all(-1), table.argmax(-1), -1)


def _lowest(logits: Tensor, how: Draws) -> Tensor:
    """The smallest logit [N, 1] that top_k, and then top_p among what it leaves, let pass; equal ones pass together."""
    ordered = _descending(logits)
    kept = ordered >= ordered.gather(-1, how.top_k[:, None] - 1)
    weights = torch.where(kept, _weights(ordered - ordered[:, :1], how.temperature), 0)
    mass = weights.cumsum(-1)
    kept &= mass - weights < mass[:, -1:] * how.top_p[:, None]
    last = (kept.sum(-1, keepdim=True) - 1).clamp_min(0)  # of a row that is not finite none may be kept
    return ordered.gather(-1, last)


def _descending(logits: Tensor) -> Tensor:
    if logits.is_cuda:
        return logits.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)  # 4 to 6 times as fast as torch's on a CPU


def _weights(below: Tensor, temperature: Tensor) -> Tensor:
    """exp(below / temperature) for `below` [N, V] at most 0, as an integer part of 2^30; of greedy rows, anything."""
    scaled = below / torch.where(temperature > 0, temperature, 1)[:, None]
    power = scaled.mul_(_LOG2E).clamp_min_(-64.0)
    whole = power.floor()
    rest = power.sub_(whole)
    out = torch.full_like(rest, _EXP2[0])
    for coefficient in _EXP2[1:]:
        out.mul_(rest).add_(coefficient)
    scale = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
    return out.mul_(scale).mul_(_ONE).to(torch.int64)
