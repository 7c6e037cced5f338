"""Causal softmax attention over one sequence at a time, in blocks of queries, so memory stays flat in the length.

Without gradients on a CPU every product has a shape that depends on the tokens' own positions alone: queries come in
blocks of `BLOCK` positions, counted from the sequence's first token, keys in segments that start where such a block
does. A result is then the same, bit for bit, in any batch and in any pieces. Elsewhere torch's own attention does it.
(Where Triton serves, `gdn2.kernels.triton.attention` takes the place of all this.)

Axes: T tokens, S keys, G key heads, R query heads a key head, d head width, v value width, N sequences, L cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn2.kernels import numba

BLOCK = 64  # queries of one product
SEGMENT = 1024  # keys of one product
SLOTS = 256  # a cache that grows does so by this many slots
WIDE_BLOCK = 256  # queries of one call of torch's attention
FLOOR = -1e30  # below every score, but finite: a row whose keys are all hidden stays zero instead of becoming NaN


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """Attention of the last T of the sequence's tokens read so far.

    Args:
        q: queries of positions start, start + 1, ...                              [T, G, R, d]
        k, v: keys and values that end at the last query's position; as many as its window or the past has
            [S, G, d], [S, G, v]
        start: tokens of the sequence before q.
        window: tokens a query sees, itself included; None is all before it.

    Returns:
        [T, G, R, v]
    """
    if q.shape[0] == 0:
        return q.new_empty(*q.shape[:-1], v.shape[-1])
    if torch.is_grad_enabled() or q.is_cuda:
        return _in_wide_blocks(q, k, v, start, window)
    return _in_blocks(q, k, v, start, window)


def first_key(block_start: int, window: int | None) -> int:
    """The first key position that queries from `block_start` on are multiplied with: a multiple of `BLOCK`."""
    return 0 if window is None else max(0, (block_start - window + 1) // BLOCK * BLOCK)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    tokens, groups, share, width = q.shape
    dtype = q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    begin, end = start // BLOCK * BLOCK, -(-(start + tokens) // BLOCK) * BLOCK
    base, last = first_key(begin, window), start + tokens
    q = F.pad((q * width**-0.5).to(wide).flatten(1), (0, 0, start - begin, end - last))
    q = q.view(-1, BLOCK, groups, share, width).permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()  # [blocks, G, R C, d]
    first = last - k.shape[0]
    k, v = (_span(x.to(wide), first, base, end) for x in (k, v))  # [G, S, d]
    run = _compiled if wide == torch.float32 and numba.available() else _plain
    out = run(q, k, v, range(begin, end, BLOCK), window)
    out = out.view(-1, groups, share, BLOCK, out.shape[-1]).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return out[start - begin : last - begin].to(dtype)


def _plain(q: Tensor, k: Tensor, v: Tensor, blocks: range, window: int | None) -> Tensor:
    """Attention of blocks of queries q [blocks, G, R C, d] that begin at `blocks` over k [G, S, d], v [G, S, v]."""
    base = first_key(blocks.start, window)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    row = torch.arange(BLOCK, device=q.device).repeat(q.shape[2] // BLOCK)[:, None]
    for i, block in enumerate(blocks):
        state = _empty(q[i], v.shape[-1])
        for low in range(first_key(block, window), block + BLOCK, SEGMENT):
            high = min(low + SEGMENT, block + BLOCK)
            key = torch.arange(low, high, device=q.device)
            hidden = key > block + row
            if window is not None:
                hidden = hidden | (key <= block + row - window)
            keys, values = k[:, low - base : high - base], v[:, low - base : high - base]
            state = _fold(state, (q[i] @ keys.mT).masked_fill(hidden, -torch.inf), values)
        out[i] = state[2] / state[1]
    return out


def _compiled(q: Tensor, k: Tensor, v: Tensor, blocks: range, window: int | None) -> Tensor:
    """The same; what lies between the two products is a compiled loop that leaves hidden keys out."""
    base, (groups, rows) = first_key(blocks.start, window), q.shape[1:3]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    seen = 1 + torch.arange(BLOCK).repeat(groups * (rows // BLOCK))
    for i, block in enumerate(blocks):
        top = q.new_full((groups * rows,), FLOOR)
        total, sums = torch.zeros_like(top), q.new_zeros(groups, rows, v.shape[-1])
        for low in range(first_key(block, window), block + BLOCK, SEGMENT):
            part = slice(low - base, min(low + SEGMENT, block + BLOCK) - base)
            weights = q[i] @ k[:, part].mT
            lasts = block - low + seen
            firsts = torch.zeros_like(lasts) if window is None else lasts - window
            firsts, lasts = (x.clamp(0, weights.shape[-1]) for x in (firsts, lasts))
            shrink = numba.attend(weights.view(groups * rows, -1), firsts, lasts, top, total)
            sums.mul_(shrink.view(groups, rows, 1)).baddbmm_(weights, v[:, part])
        out[i] = sums / total.view(groups, rows, 1)
    return out


def _span(x: Tensor, first: int, low: int, high: int) -> Tensor:
    """Positions low to high of x [S, G, d], which starts at position `first`; zeros where it has none: [G, S', d]."""
    if first < low:
        x, first = x[low - first :], low
    x = F.pad(x.flatten(1), (0, 0, first - low, high - first - x.shape[0])).view(high - low, *x.shape[1:])
    return x.transpose(0, 1).contiguous()


def _empty(q: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Highest score, sum of weights and weighted values, `width` wide, of no keys at all."""
    top = q.new_full((*q.shape[:-1], 1), FLOOR)
    return top, torch.zeros_like(top), q.new_zeros(*q.shape[:-1], width)


def _fold(state: tuple[Tensor, Tensor, Tensor], scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take further keys in, scores [..., C, S] and values [..., S, v]. Hidden keys change nothing, not even a bit."""
    top, total, sums = state
    higher = torch.maximum(top, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores - higher)
    shrink = torch.exp(top - higher)
    return higher, total * shrink + weights.sum(-1, keepdim=True), sums * shrink + weights @ values


def _in_wide_blocks(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """torch's own attention, in blocks whose shapes depend on their positions alone."""
    tokens, groups, share, width = q.shape
    begin, last = start // WIDE_BLOCK * WIDE_BLOCK, start + tokens
    end = -(-last // WIDE_BLOCK) * WIDE_BLOCK
    base = first_key(begin, window)
    q = F.pad(q.flatten(1), (0, 0, start - begin, end - last)).view(end - begin, groups * share, width)
    q = q.transpose(0, 1)[None]
    k, v = (_span(x, last - x.shape[0], base, end).repeat_interleave(share, 0)[None] for x in (k, v))  # [1, H, S, d]
    out = []
    for block in range(begin, end, WIDE_BLOCK):
        oldest, stop = first_key(block, window), block + WIDE_BLOCK
        keys, values = (x[:, :, oldest - base : stop - base] for x in (k, v))
        query, key = (torch.arange(a, stop, device=q.device) for a in (block, oldest))
        visible = key <= query[:, None]
        if window is not None:
            visible = visible & (key > query[:, None] - window)
        mine = q[:, :, block - begin : stop - begin]
        out.append(F.scaled_dot_product_attention(mine, keys, values, attn_mask=visible))
    return torch.cat(out, 2)[0, :, start - begin : last - begin].transpose(0, 1).unflatten(1, (groups, share))


def attend_together(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Training's case: N sequences of one length, none begun. q [N, T, G, R, d], k, v [N, T, G, d] to q's shape."""
    _, tokens, groups, share, _ = q.shape
    k, v = (x.transpose(1, 2).repeat_interleave(share, 1) for x in (k, v))
    q = q.flatten(2, 3).transpose(1, 2)
    if window is None or window >= tokens:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        o = _in_bands(q, k, v, window)
    return o.transpose(1, 2).unflatten(2, (groups, share))


def _in_bands(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Of q, k, v [N, H, T, d], half a window of queries B at once, over their own and the two blocks before."""
    n, _, tokens, _ = q.shape
    size = -(-window // 2)
    blocks = -(-tokens // size)
    rest = blocks * size - tokens
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, size))  # [N, H, P, B, d]
    k, v = (_three(F.pad(x, (0, 0, 2 * size, rest)).unflatten(2, (-1, size)), blocks) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    query = torch.arange(size, device=q.device)[:, None]
    key = torch.arange(3 * size, device=q.device) - 2 * size  # from the first query of the block
    block = torch.arange(blocks, device=q.device)[:, None, None, None]
    visible = (key <= query) & (key > query - window) & (key >= -size * block)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.repeat(n, 1, 1, 1))  # [N P, H, B, d]
    return o.unflatten(0, (n, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _three(x: Tensor, blocks: int) -> Tensor:
    """Blocks x [N, H, P + 2, B, d], each behind the two before it: [N, H, P, 3 B, d]."""
    return torch.cat([x[:, :, i : i + blocks] for i in range(3)], 3)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, filled: Tensor, ring: bool) -> Tensor:
    """One query a sequence over the slots of its cache, in whatever order they are.

    Args:
        q: [N, G, R, d]; k: [N, G, L, d]; v: [N, G, L, v]; filled: how many of the first slots hold tokens, int64 [N].
        ring: the cache has one fixed size; else it grows, by `SLOTS` at a time.

    Returns:
        [N, G, R, v]. A row depends on no other row, nor on how far the others' caches have grown.
    """
    if not q.is_cuda and q.dtype != torch.float64 and not torch.is_grad_enabled() and numba.available():
        return numba.attend_cached(q, k, v, filled)
    slots = k.shape[2]
    hidden = torch.arange(slots, device=q.device) >= filled[:, None, None, None]  # [N, 1, 1, L]
    if q.is_cuda:
        share = q.shape[2]
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        o = F.scaled_dot_product_attention(q.flatten(1, 2)[:, :, None], k, v, attn_mask=~hidden)
        return o.view(*q.shape[:-1], v.shape[-1])
    dtype = q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = (q * q.shape[-1] ** -0.5).to(wide)
    single = q.shape[2] == 1  # a product with a vector rounds by the size of the batch, one with a matrix does not
    q = q.expand(-1, -1, 2, -1).contiguous() if single else q.contiguous()
    state = _empty(q, v.shape[-1])
    for low in range(0, slots, slots if ring else SLOTS):
        part = slice(low, low + (slots if ring else SLOTS))
        keys, values = (x[:, :, part].to(wide).contiguous() for x in (k, v))
        state = _fold(state, (q @ keys.mT).masked_fill(hidden[..., part], -torch.inf), values)
    o = (state[2] / state[1]).to(dtype)
    return o[:, :, :1] if single else o
