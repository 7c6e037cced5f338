"""Softmax attention for inference: packed sequences that go on from caches, and one token each over a cache.

Tiles of queries and keys begin at multiples of `BLOCK` positions of their own sequence, and keys of the past come from
the cache to the same places as they would from the batch: a row's result depends neither on the sequences beside it nor
on where its sequence was cut. No index is read by the host, so nothing waits for the device.

Position p of a sequence lies in slot p mod L of a ring (a window of L tokens), and in slot p of a cache that grows.

Axes: T tokens, N sequences, H query heads, G key heads, D head width, L cache slots, P programs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton import refuse_fp64

BLOCK = 64  # queries and keys of one product, tokens of one copy
LOG2E = 1.4426950408889634
FLOOR = tl.constexpr(-1e30)  # below every score, but finite: a tile whose keys are all hidden changes nothing


class Grid(NamedTuple):
    """Which sequence, and which of its tiles, each program has: int64 [P]. A sequence may begin within a tile."""

    sequence: Tensor
    tile: Tensor


@lru_cache(maxsize=64)
def grid(lengths: tuple[int, ...], device: torch.device) -> Grid:
    """Programs for sequences of `lengths` new tokens, wherever in a tile they begin."""
    pairs = [(n, i) for n, length in enumerate(lengths) if length for i in range(-(-length // BLOCK) + 1)]
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return Grid(table[:, 0].contiguous(), table[:, 1].contiguous())


@triton.jit
def _tile(cache, new, position, begin, end, first, n, g, G, L, D: tl.constexpr, BD: tl.constexpr, RING: tl.constexpr):
    """Keys or values [B, BD] at `position` [B] of a sequence: from its cache before `begin`, else from the new ones."""
    col = tl.arange(0, BD)
    past = (position >= 0) & (position < begin)
    fresh = (position >= begin) & (position < end)
    slot = position % L if RING else position
    at = ((n * G + g) * L + slot)[:, None] * D + col[None, :]
    x = tl.load(cache + at, mask=past[:, None] & (col < D)[None, :], other=0.0)
    at = ((first + position - begin) * G + g)[:, None] * D + col[None, :]
    y = tl.load(new + at, mask=fresh[:, None] & (col < D)[None, :], other=0.0)
    return tl.where(past[:, None], x.to(y.dtype), y)


@triton.jit
def attend_kernel(
    q, k, v, keys, values, o, position_of, starts, sequence_of, tile_of, scale, G, L, W,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
    RING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head over every key tile that one of them may see."""
    program = tl.program_id(0)
    n = tl.load(sequence_of + program)
    h = tl.program_id(1)
    g = h // SHARE
    begin = tl.load(position_of + n)
    first = tl.load(starts + n)
    end = begin + tl.load(starts + n + 1) - first
    low = (begin // B + tl.load(tile_of + program)) * B
    if low < end:
        row = low + tl.arange(0, B)
        col = tl.arange(0, BD)
        own = ((row >= begin) & (row < end))[:, None] & (col < D)[None, :]
        at = ((first + row - begin) * H + h)[:, None] * D + col[None, :]
        query = tl.load(q + at, mask=own, other=0.0)
        top = tl.full([B], FLOOR, tl.float32)
        total = tl.zeros([B], tl.float32)
        sums = tl.zeros([B, BD], tl.float32)
        oldest = tl.maximum(low - W + 1, 0) // B * B
        for key_low in range(oldest, low + B, B):
            key = key_low + tl.arange(0, B)
            x = _tile(keys, k, key, begin, end, first, n, g, G, L, D, BD, RING)
            scores = tl.dot(query, tl.trans(x), input_precision=PRECISION) * scale
            seen = (key[None, :] <= row[:, None]) & (key[None, :] > row[:, None] - W)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            x = _tile(values, v, key, begin, end, first, n, g, G, L, D, BD, RING)
            sums = sums * shrink[:, None] + tl.dot(weights.to(x.dtype), x, input_precision=PRECISION)
            total = total * shrink + tl.sum(weights, 1)
            top = higher
        out = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(o + at, out.to(o.dtype.element_ty), mask=own)


@triton.jit
def cache_kernel(
    k, v, keys, values, new_keys, new_values, position_of, starts, G, OLD, L,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Slots [B] of one head of one sequence's caches after its new tokens; the old ones have OLD slots."""
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    slot = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    col = tl.arange(0, BD)
    begin = tl.load(position_of + n)
    first = tl.load(starts + n)
    end = begin + tl.load(starts + n + 1) - first
    position = slot
    if RING:  # the last position before `end` that lies in the slot
        position = end - 1 - (end - 1 - slot + L) % L
    fresh = (position >= begin) & (position < end)
    old = (~fresh) & (slot < OLD)
    in_d = (col < D)[None, :]
    source = ((first + position - begin) * G + g)[:, None] * D + col[None, :]
    before = ((n * G + g) * OLD + slot)[:, None] * D + col[None, :]
    at = ((n * G + g) * L + slot)[:, None] * D + col[None, :]
    here = (slot < L)[:, None] & in_d
    x = tl.load(keys + before, mask=old[:, None] & in_d, other=0.0)
    y = tl.load(k + source, mask=fresh[:, None] & here, other=0.0).to(x.dtype)
    tl.store(new_keys + at, tl.where(fresh[:, None], y, x), mask=here)
    x = tl.load(values + before, mask=old[:, None] & in_d, other=0.0)
    y = tl.load(v + source, mask=fresh[:, None] & here, other=0.0).to(x.dtype)
    tl.store(new_values + at, tl.where(fresh[:, None], y, x), mask=here)


@triton.jit
def attend_cached_kernel(
    q, keys, values, o, filled, scale, G, L,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One query of one head over the slots that are filled, in their order."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    g = h // SHARE
    col = tl.arange(0, BD)
    in_d = col < D
    count = tl.load(filled + n)
    query = tl.load(q + (n * H + h) * D + col, mask=in_d, other=0.0).to(tl.float32) * scale
    top = tl.full([1], FLOOR, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([BD], tl.float32)
    for low in range(0, count, B):
        slot = low + tl.arange(0, B)
        at = ((n * G + g) * L + slot)[:, None] * D + col[None, :]
        mask = (slot < count)[:, None] & in_d[None, :]
        x = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(slot < count, tl.sum(x * query[None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - higher)
        shrink = tl.exp2(top - higher)
        x = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        sums = sums * shrink + tl.sum(weights[:, None] * x, 0)
        total = total * shrink + tl.sum(weights, 0)
        top = higher
    out = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(o + (n * H + h) * D + col, out.to(o.dtype.element_ty), mask=in_d)


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, starts: Tensor,
    lengths: tuple[int, ...], window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of the new tokens of N sequences over their pasts and themselves.

    Args:
        q: [T, H, D]; k, v: [T, G, D], in one dtype.
        keys, values: caches before the new tokens, rings where there is a window [N, G, L, D].
        position: tokens each sequence had read before, int64 [N].
        starts: first new token of each sequence, then T, int64 [N + 1]; lengths: the same as N integers of the host.
        window: tokens a query sees, itself included; None is all before it.

    Returns:
        [T, H, D].
    """
    refuse_fp64(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o = torch.empty_like(q)
    table = grid(lengths, q.device)
    if not table.sequence.shape[0]:
        return o
    heads, width = q.shape[1:]
    attend_kernel[(table.sequence.shape[0], heads)](
        q, k, v, keys, values, o, position, starts, *table, width**-0.5 * LOG2E, k.shape[1], keys.shape[2],
        window or 1 << 62, H=heads, SHARE=heads // k.shape[1], RING=window is not None, **_shape(width),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return o


def cached(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, starts: Tensor, slots: int, ring: bool
) -> tuple[Tensor, Tensor]:
    """The caches after new tokens k, v [T, G, D], with `slots` slots [N, G, slots, D]; see `attend`."""
    n, groups, old, width = keys.shape
    out = [x.new_empty(n, groups, slots, width) for x in (keys, values)]
    if n and slots:
        cache_kernel[(n, groups, triton.cdiv(slots, BLOCK))](
            k.contiguous(), v.contiguous(), keys, values, *out, position, starts, groups, old, slots,
            **_shape(width), RING=ring, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out[0], out[1]


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
    """One query a sequence, q [N, H, D], over the first `filled` [N] slots of caches [N, G, L, D]: [N, H, D]."""
    refuse_fp64(q, keys, values)
    q = q.contiguous()
    o = torch.empty_like(q)
    n, heads, width = q.shape
    if n:
        attend_cached_kernel[(n, heads)](
            q, keys, values, o, filled, width**-0.5 * LOG2E, keys.shape[1], keys.shape[2],
            H=heads, SHARE=heads // keys.shape[1], **_shape(width), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return o


def _shape(width: int) -> dict[str, int]:
    """Tiles for heads of `width`."""
    return {"D": width, "BD": max(16, triton.next_power_of_2(width)), "B": BLOCK}
