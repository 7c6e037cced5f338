"""The recurrence in chunks of matrix products, in plain torch: the CPU backend, differentiable in every input.

For the rows r of one chunk with start state S_0 (arXiv 2605.22791, Eq. 18-25 and 35):

    T   = strictly lower part of e_r . (decay(s -> r) * k_s)          R   = (I + T)^-1 (Z - (gamma * E) S_0)
    Aqk = lower part of q_r . (decay(s -> r) * k_s)                   O   = (gamma * Q) S_0 + Aqk R
    gamma_r = decay(start -> r)                                       S_C = gamma_C * S_0 + (decay(r -> end) * K)^T R

Decays only ever meet as products over the rows between s and r, never as a quotient or a difference of cumulative
sums, so strong decay (down to exp(-inf) = 0) next to weak decay loses nothing and overflows nowhere.

Axes: N sequences, T rows, P chunks of all sequences, C rows a chunk, H value heads, K key width, V value width.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gdn2.kernels.contract import Rows

CHANNEL_CHUNK = 16  # rows; per-channel decay costs C products a row and channel
HEAD_CHUNK = 64  # rows; per-head decay is one C x C mask
GPU_HEAD_CHUNK = 32  # of 64 rows, up to 8 triangles would be solved one by one and more of them together, to other bits


class _Chunks(NamedTuple):
    """Where the rows of each chunk lie. Chunks are ordered by their step, then by sequence, longest sequence first."""

    rows: Tensor  # int64 [P, C], index into the packed rows; T stands for a row of zeros
    active: list[int]  # sequences that still have a chunk at each step
    order: Tensor  # int64 [N], sequences, longest first
    back: Tensor  # int64 [N], where each sequence stands in `order`
    sorted: bool  # whether that is the order they came in


def delta_rule(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_delta_rule` in the dtype of its inputs, also where autocast is on: decays and the solve need it."""
    with torch.autocast(rows.q.device.type, enabled=False):
        return _delta_rule(rows, state)


def _delta_rule(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, V] of all packed rows, and the last state [N, H, K, V] of every sequence, from `state`.

    The rows come repeated to the value heads (`Rows.repeated`). A sequence's result depends on no other sequence.
    """
    if rows.q.shape[0] == 0:
        return rows.z, state
    size = CHANNEL_CHUNK if rows.per_channel else GPU_HEAD_CHUNK if rows.q.is_cuda else HEAD_CHUNK
    size = max(size - size % rows.rank, rows.rank)
    chunks = _split(rows.lengths, size, rows.q.device)
    q, k, z, e, g, diag = (_gather(x, chunks.rows) for x in (rows.q, rows.k, rows.z, rows.e, rows.g, rows.diag))
    assert q is not None and k is not None and z is not None
    if g is not None and g.ndim == 4:
        scores, erased, tail = _scores_channel(q, k, e, g.exp(), rows.rank)
    else:
        scores, erased, tail = _scores_head(q, k, e, g, rows.rank)
    if diag is not None:
        scores = scores * torch.where(_same_token(size, rows.rank, q.device), diag[..., None, :], 1.0)
    gamma = None if g is None else _wide(g.cumsum(2).exp())  # [P, H, C, K or 1]
    read = q if gamma is None else gamma * q
    keep = None if gamma is None else gamma[:, :, -1, :, None]  # [P, H, K or 1, 1]
    if e is None:
        written, readouts, last = _carry(read, None, z, tail, keep, state, chunks)
    else:
        solved = torch.cat([z, e if gamma is None else gamma * e], dim=-1)
        solved = torch.linalg.solve_triangular(erased, solved, upper=False, unitriangular=True)
        u, y = solved.split([z.shape[-1], e.shape[-1]], dim=-1)  # Eq. 22
        written, readouts, last = _carry(read, y, u, tail, keep, state, chunks)
    o = readouts + scores @ written  # Eq. 24
    flat = o.transpose(1, 2).flatten(0, 1)  # [P * C, H, V]
    place = torch.empty(rows.q.shape[0] + 1, dtype=torch.int64, device=q.device)
    place[chunks.rows.flatten()] = torch.arange(chunks.rows.numel(), device=q.device)
    return flat[place[:-1]], last


@lru_cache(maxsize=16)  # every layer of a pass asks for the same cut
@torch.inference_mode(False)  # a cut first made in inference may serve training later
def _split(lengths: tuple[int, ...], size: int, device: torch.device) -> _Chunks:
    """Cut every sequence into chunks from its own first row."""
    firsts = [0, *itertools.accumulate(lengths)]
    total = firsts[-1]
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    counts = [-(-lengths[n] // size) for n in order]
    active = [sum(count > step for count in counts) for step in range(counts[0] if counts else 0)]
    starts = torch.tensor([firsts[n] for n in order], device=device)
    ends = torch.tensor([firsts[n] + lengths[n] for n in order], device=device)
    sequence = torch.cat([torch.arange(n, device=device) for n in active])
    step = torch.repeat_interleave(
        torch.arange(len(active), device=device), torch.tensor(active, device=device), output_size=sum(active)
    )
    index = starts[sequence, None] + step[:, None] * size + torch.arange(size, device=device)
    place = torch.tensor(order, dtype=torch.int64, device=device)
    back = torch.empty_like(place).index_copy_(0, place, torch.arange(len(order), device=device))
    rows = torch.where(index < ends[sequence, None], index, total)
    return _Chunks(rows, active, place, back, order == list(range(len(order))))


def _gather(x: Tensor | None, index: Tensor) -> Tensor | None:
    """Rows [T, H, ...] to chunks [P, H, C, ...]; the rows past a sequence's end are zero."""
    if x is None:
        return None
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded[index].transpose(1, 2).contiguous()


def _wide(x: Tensor) -> Tensor:
    """Per-head factors [P, H, C] get a key axis of one."""
    return x if x.ndim == 4 else x.unsqueeze(-1)


def _scores_channel(
    q: Tensor, k: Tensor, e: Tensor | None, a: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores Aqk and T [P, H, C, C] and tail keys [P, H, C, K] for per-channel decay factors a [P, H, C, K].

    Row by row: `decayed` holds every earlier key of the chunk, decayed up to the present row.
    """
    size = q.shape[2]
    decayed = k[:, :, :0]
    read_rows, erase_rows = [], []
    for i in range(size):
        decayed = torch.cat([decayed * a[:, :, i : i + 1], k[:, :, i : i + 1]], dim=2)
        probes = q[:, :, i, :, None] if e is None else torch.stack([q[:, :, i], e[:, :, i]], dim=-1)
        row = decayed @ probes  # [P, H, i + 1, 1 or 2]
        read_rows.append(torch.nn.functional.pad(row[..., 0], (0, size - i - 1)))
        if e is not None:
            erase_rows.append(torch.nn.functional.pad(row[:, :, :i, 1], (0, size - i)))
    scores = torch.stack(read_rows, dim=2)
    if rank > 1:  # a row reads the later writes of its own token too, which no decay is before
        scores = scores + (_same_token(size, rank, q.device).triu(1) * (q @ k.transpose(-1, -2)))
    return scores, torch.stack(erase_rows, dim=2) if erase_rows else scores, decayed


def _scores_head(q: Tensor, k: Tensor, e: Tensor | None, g: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one log-decay a head, g [P, H, C], or none: a mask on plain products."""
    size = q.shape[2]
    row = torch.arange(size, device=q.device)
    later = row[:, None] > row[None, :]
    visible = later | _same_token(size, rank, q.device)
    tail = k
    if g is None:
        decay = visible.to(q.dtype)
    else:
        between = torch.where(later, g[..., :, None], 0.0).cumsum(2)  # sum of g over (s, r]
        decay = torch.where(visible, between.exp(), 0.0)
        tail = decay[:, :, -1, :, None] * k
    scores = (q @ k.transpose(-1, -2)) * decay
    if e is None:
        return scores, scores, tail
    return scores, (e @ k.transpose(-1, -2)) * torch.where(later, decay, 0.0), tail


def _same_token(size: int, rank: int, device: torch.device) -> Tensor:
    token = torch.arange(size, device=device) // rank
    return token[:, None] == token[None, :]


def _carry(
    read: Tensor, y: Tensor | None, u: Tensor, tail: Tensor, keep: Tensor | None, state: Tensor, chunks: _Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass the state from chunk to chunk: what each chunk writes, what it reads from its start state, last states."""
    size = read.shape[2]
    probes = read if y is None else torch.cat([read, y], dim=2)
    tail = tail.transpose(-1, -2).contiguous()
    carried = state if chunks.sorted else state[chunks.order]
    finished: list[Tensor] = []
    readouts, written = [], []
    begin = 0
    for count in chunks.active:
        if count < carried.shape[0]:
            finished.append(carried[count:])
            carried = carried[:count]
        now = slice(begin, begin + count)
        begin += count
        seen = probes[now] @ carried  # [n, H, C or 2 C, V]
        w = u[now] if y is None else u[now] - seen[:, :, size:]  # Eq. 35
        readouts.append(seen[:, :, :size])
        written.append(w)
        carried = tail[now] @ w + (carried if keep is None else keep[now] * carried)  # Eq. 23
    last = torch.cat([carried, *reversed(finished)])
    return torch.cat(written), torch.cat(readouts), last[chunks.back]
