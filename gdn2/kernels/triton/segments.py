"""Where chunks and segments lie, and the state before every segment.

A sequence is cut into chunks from its own first row, and into segments where few heads would leave the device idle,
longer ones further on. Where depends on the row alone, so neither packing nor a longer sequence changes a result.

Axes: N sequences, P chunks, Ns segments, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Index tables of one packing, all int64 on the device. Ns equals N when no sequence is split."""

    chunk_row: Tensor  # [P] first row of each chunk
    chunk_rows: Tensor  # [P] rows of each chunk
    segment_row: Tensor  # [Ns] first row of each segment
    segment_end: Tensor  # [Ns] row after its last
    segment_chunk: Tensor  # [Ns] its first chunk
    first: Tensor  # [N] first segment of each sequence
    count: Tensor  # [N] its segments; an empty sequence has one, empty
    last: Tensor  # [N] last segment of each sequence
    longest: Tensor  # [Ns] all segments, long ones first, for none to be left running alone
    but_first: Tensor  # [Ns - N] those that are not the first of their sequence
    but_last: Tensor  # [Ns - N] those that are not the last
    step: int  # rows of a full chunk

    @property
    def chunks(self) -> int:
        return self.chunk_row.shape[0]

    @property
    def segments(self) -> int:
        return self.segment_row.shape[0]

    @property
    def split(self) -> bool:
        return self.segments > self.first.shape[0]


@lru_cache(maxsize=64)
def layout(lengths: tuple[int, ...], step: int, segment: int, device: torch.device) -> Layout:
    """Cut sequences of `lengths` rows into chunks of `step` rows and segments of `segment` rows and more (0: never)."""
    shortest = max(segment // step, 1) * step if segment else max(lengths, default=0) + 1
    chunk_row: list[int] = []
    chunk_rows: list[int] = []
    segments: list[tuple[int, int, int]] = []
    first: list[int] = []
    start = 0
    for length in lengths:
        end = start + length
        first.append(len(segments))
        row = start
        while row < end or row == start:
            after = row + shortest * _longer((row - start) // shortest)
            segments.append((row, min(after, end), len(chunk_row) + (row - start) // step))
            row = after
        chunk_row.extend(range(start, end, step))
        chunk_rows.extend(min(step, end - row) for row in range(start, end, step))
        start = end
    count = [after - before for before, after in zip(first, [*first[1:], len(segments)], strict=True)]

    longest = sorted(range(len(segments)), key=lambda i: segments[i][0] - segments[i][1])
    last = [f + c - 1 for f, c in zip(first, count, strict=True)]
    starts, ends = set(first), set(last)

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Layout(
        table(chunk_row),
        table(chunk_rows),
        table([row for row, _, _ in segments]),
        table([end for _, end, _ in segments]),
        table([chunk for _, _, chunk in segments]),
        table(first),
        table(count),
        table(last),
        table(longest),
        table([i for i in longest if i not in starts]),
        table([i for i in longest if i not in ends]),
        step,
    )


def _longer(place: int) -> int:
    """Times the shortest that the segment has which begins `place` shortest ones into its sequence: enough of them to
    fill a device, few enough that each is long beside what it costs to join them."""
    return 1 if place < 4 else 2 if place < 16 else 4
