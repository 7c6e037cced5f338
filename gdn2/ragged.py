"""Rows of unequal length, packed end to end. Padding would be written into a recurrent state, so there is none.

Axes: N sequences, T tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Ragged:
    """The boundaries of N packed sequences; empty ones are allowed.

    Args:
        lengths: tokens of each sequence.
        device: where the index tensors below live.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if any(n < 0 for n in lengths):
            raise ValueError(f"sequence lengths must be >= 0, got {min(lengths)}")
        self.lengths = tuple(int(n) for n in lengths)
        self.device = torch.device(device)
        self._windows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each sequence, then T: N + 1 integers."""
        out = [0]
        for n in self.lengths:
            out.append(out[-1] + n)
        return tuple(out)

    @property
    def n_sequences(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`starts` as int64 [N + 1]."""
        return torch.tensor(self.starts, dtype=torch.int64, device=self.device)

    @cached_property
    def counts(self) -> Tensor:
        """`lengths` as int64 [N]."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @cached_property
    def begun(self) -> Tensor:
        """Which sequences have any tokens, int64."""
        live = [n for n, length in enumerate(self.lengths) if length]
        return torch.tensor(live, dtype=torch.int64, device=self.device)

    @cached_property
    def sequence(self) -> Tensor:
        """Which sequence each token belongs to, int64 [T]."""
        index = torch.arange(self.n_sequences, device=self.device)
        return torch.repeat_interleave(index, self.counts, output_size=self.n_tokens)

    @cached_property
    def position(self) -> Tensor:
        """Position of each token in its own sequence, int64 [T]."""
        tokens = torch.arange(self.n_tokens, device=self.device)
        return tokens - self.cu_seqlens[self.sequence]

    def behind_windows(self, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where things lie when every sequence stands behind `past` earlier tokens of its own.

        Returns:
            order: which row of (the T tokens, then the N * past earlier ones) each place takes, int64 [T + N * past].
            here: the place of each token, int64 [T].
            ends: the last `past` places of each sequence, int64 [N, past].
        """
        if past not in self._windows:
            earlier = torch.arange(past, device=self.device)
            begin = self.cu_seqlens[:-1] + past * torch.arange(self.n_sequences, device=self.device)
            here = begin[self.sequence] + past + self.position
            order = torch.empty(self.n_tokens + past * self.n_sequences, dtype=torch.int64, device=self.device)
            order[here] = torch.arange(self.n_tokens, device=self.device)
            order[(begin[:, None] + earlier).flatten()] = self.n_tokens + torch.arange(
                past * self.n_sequences, device=self.device
            )
            ends = (begin + self.cu_seqlens.diff())[:, None] + earlier
            self._windows[past] = order, here, ends
        return self._windows[past]

    @cached_property
    def last(self) -> Tensor:
        """Index of the last token of each non-empty sequence, int64."""
        ends = [start + n - 1 for start, n in zip(self.starts, self.lengths, strict=False) if n]
        return torch.tensor(ends, dtype=torch.int64, device=self.device)
