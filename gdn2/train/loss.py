"""The weighted next-token loss and the share of answers that come out right.

Axes: T tokens of all documents of a batch, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn2.models import Decoder
from gdn2.ragged import Ragged
from gdn2.train.data import Batch

PIECE = 1 << 15  # rows of logits held at once


class Placed(NamedTuple):
    """A batch on the model's device."""

    ids: Tensor  # int64 [T]
    targets: Tensor  # int64 [n], of the tokens that count
    rows: Tensor  # int64 [n], whose output predicts them
    weights: Tensor  # fp32 [n]
    ragged: Ragged


def place(batch: Batch, device: torch.device, every: bool = False) -> Placed:
    """Send a batch to `device`; only tokens of weight above 0 become targets, unless `every` token but the first is."""
    weights = torch.from_numpy(batch.weights)
    targets = torch.arange(1, len(weights)) if every else torch.nonzero(weights > 0).squeeze(1)
    ids = torch.from_numpy(batch.ids).long()
    tensors = (ids, ids[targets], targets - 1, weights[targets])
    ids, wanted, rows, weights = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Placed(ids, wanted, rows, weights, Ragged(batch.lengths, device))


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 products on a GPU; fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def weighted_loss(model: Decoder, batch: Placed) -> tuple[Tensor, Tensor]:
    """Sum over targets of weight * cross-entropy (nats), and whether each target is the most likely token, bool [n]."""
    with autocast(batch.ids.device):
        hidden, _ = model(batch.ids, batch.ragged)
        hidden = hidden[batch.rows]
        total = hidden.new_zeros((), dtype=torch.float32)
        right = []
        for at in range(0, len(hidden), PIECE):
            logits = model.logits(hidden[at : at + PIECE])
            targets = batch.targets[at : at + PIECE]
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            total = total + (losses * batch.weights[at : at + PIECE]).sum()
            right.append(logits.detach().argmax(-1) == targets)
    return total, torch.cat(right) if right else torch.empty(0, dtype=torch.bool, device=hidden.device)


@dataclass(frozen=True)
class HeldOut:
    """What a model makes of held-out documents."""

    loss: float  # weighted mean, nats a token
    exact: float | None  # share of answers whose every token is the most likely one; None without answers
    tokens: float | None  # share of answer tokens


@torch.no_grad()
def evaluate(model: Decoder, batches: list[Batch], device: torch.device) -> HeldOut:
    """Teacher-forced: an answer is exact when greedy decoding would give it."""
    total, weight, answers, exact, n_tokens, n_right = 0.0, 0.0, 0, 0, 0, 0
    for batch in batches:
        placed = place(batch, device)
        loss, right = weighted_loss(model, placed)
        total += loss.item()
        weight += float(batch.weights.sum())
        good = torch.zeros(len(batch.ids), dtype=torch.bool)
        good[placed.rows.cpu() + 1] = right.cpu()
        in_answer = torch.from_numpy(batch.weights == 1)
        n_tokens += int(in_answer.sum())
        n_right += int((good & in_answer).sum())
        starts = in_answer & ~torch.cat([torch.tensor([False]), in_answer[:-1]])
        span = (torch.cumsum(starts, 0) - 1)[in_answer]
        wrong = torch.zeros(int(starts.sum()), dtype=torch.int64).index_add_(0, span, (~good[in_answer]).long())
        answers += len(wrong)
        exact += int((wrong == 0).sum())
    if not answers:
        return HeldOut(total / max(weight, 1e-9), None, None)
    return HeldOut(total / weight, exact / answers, n_right / n_tokens)
