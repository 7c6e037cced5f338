"""What a decoder remembers of N sequences: one set of tensors a layer, N first.

The whole past of a recurrent model is in here, so a prefix is computed once, its state selected or copied, and every
continuation goes on from the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gdn2.mixers import LayerState


class State:
    """States of N sequences. `seen` counts the tokens each has read, int64 [N]."""

    def __init__(self, layers: list[LayerState], seen: Tensor) -> None:
        self.layers = layers
        self.seen = seen

    @property
    def n_sequences(self) -> int:
        return self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def select(self, index: Sequence[int] | Tensor) -> State:
        """A copy of the sequences at `index`, which may repeat."""
        at = torch.as_tensor(index, dtype=torch.int64, device=self.seen.device)
        return State([{k: t[at] for k, t in layer.items()} for layer in self.layers], self.seen[at])

    def write(self, index: Sequence[int] | Tensor, other: State) -> None:
        """Overwrite the sequences at `index` with those of `other`."""
        at = torch.as_tensor(index, dtype=torch.int64, device=self.seen.device)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for key, tensor in mine.items():
                mine[key], new = _alike([tensor, theirs[key].to(tensor.dtype)])
                mine[key][at] = new
        self.seen[at] = other.seen

    @staticmethod
    def concat(states: Sequence[State]) -> State:
        """The sequences of several states, one after the other."""
        layers = [
            {key: torch.cat(_alike([s.layers[i][key] for s in states])) for key in states[0].layers[i]}
            for i in range(len(states[0].layers))
        ]
        return State(layers, torch.cat([s.seen for s in states]))


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """Caches that have grown to different lengths [N, ..., L, ...], the shorter ones filled up with zeros."""
    shapes = [t.shape[1:] for t in tensors]
    if len(set(shapes)) == 1:
        return tensors
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    missing = [[want - have for want, have in zip(longest, shape, strict=True)] for shape in shapes]
    return [pad(t, [x for n in reversed(gap) for x in (0, n)]) for t, gap in zip(tensors, missing, strict=True)]
