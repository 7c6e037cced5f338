"""One step of the optimiser; on a GPU, for batches of one shape, captured once and replayed.

Axes: T tokens of all documents of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn2.models import Decoder
from gdn2.train.data import Batch
from gdn2.train.loss import Placed, place, weighted_loss

WARM_UP = 3  # steps before a capture: kernels are compiled, the optimiser has its moments


class Step(NamedTuple):
    """What a step saw."""

    loss: Tensor  # weighted mean before the step, nats
    norm: Tensor  # of the gradient, before clipping
    right: Tensor  # bool [n], whether each token of an answer was the most likely one


class Stepper:
    """Takes steps. `fixed` promises batches of one shape: the documents' lengths never change."""

    def __init__(self, model: Decoder, optimizer: torch.optim.Optimizer, clip: float, fixed: bool) -> None:
        self._model, self._optimizer, self._clip = model, optimizer, clip
        self._device = model.embed.weight.device
        self._capture = fixed and self._device.type == "cuda"
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: Placed | None = None
        self._out: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, batches: list[Batch]) -> Step:
        """Sum the gradients of the batches, each token weighing the same, clip them, and move."""
        if not self._capture:
            placed = [place(batch, self._device) for batch in batches]
            total = float(sum(batch.weights.sum(dtype="float64") for batch in batches))
            return _answers(*self._work(placed, torch.tensor(total)), torch.cat([p.weights for p in placed]))
        (batch,) = batches
        fresh = place(batch, self._device, every=True)
        if self._static is None:
            self._static = fresh
        for mine, other in zip(self._static[:4], fresh[:4], strict=True):
            mine.copy_(other)
        self._taken += 1
        if self._taken <= WARM_UP:
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                self._out = self._fixed()
            torch.cuda.current_stream(self._device).wait_stream(side)
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._out = self._fixed()
            self._graph.replay()
        assert self._out is not None
        return _answers(*self._out, self._static.weights)

    def _fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self._static is not None
        return self._work([self._static], self._static.weights.sum())

    def _work(self, batches: list[Placed], total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self._device)
        right = []
        total = total.to(loss)
        for batch in batches:
            part, hits = weighted_loss(self._model, batch)
            (part / total).backward()
            loss = loss + part.detach() / total
            right.append(hits)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        return loss, norm, torch.cat(right)


def _answers(loss: Tensor, norm: Tensor, right: Tensor, weights: Tensor) -> Step:
    return Step(loss, norm, right[weights == 1])
