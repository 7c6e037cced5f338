"""Decoding: a few tokens for each of many sequences, each state updated in place in a pool.

One program owns a [K, BV] tile of one state, reads it once, runs its tokens and writes it once, so one token costs
the state's bytes twice and nothing else. Which tile, how many warps and the order of every sum depend on K, V and R:
a row's result does not depend on the rows beside it. Nothing here waits for the device or depends on data, so a call
can be captured in a CUDA graph.

Axes: N sequences, T rows, R rows a token, P slots of the pool, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton import refuse_fp64

NONE, HEAD, CHANNEL = 0, 1, 2  # width of the decay
WIDEST = 256  # K and V


@triton.jit
def delta_tokens_kernel(
    q, k, e, z, g, diag, o, state, cu_seqlens, slots,
    H: tl.constexpr, HV: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, DIAG: tl.constexpr, RAGGED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Programs: V tile fastest, then value head, then sequence."""
    NV: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0)
    tile_v = tile % NV
    hv = (tile // NV) % HV
    n = (tile // NV // HV).to(tl.int64)
    rk = tl.arange(0, BK)
    rv = tile_v * BV + tl.arange(0, BV)
    in_k = rk < K
    in_v = rv < V
    h = hv // (HV // H)
    he = hv // (HV // HE)
    hg = hv // (HV // HG)

    if RAGGED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        begin = n * RANK
        end = begin + RANK
    slot = n
    if SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0

    place = ((slot * HV + hv) * K + rk[:, None]) * V + rv[None, :]
    tile_mask = (rk < tl.where(live, K, 0))[:, None] & in_v[None, :]
    s = tl.load(state + place, mask=tile_mask, other=0.0).to(tl.float32)  # [BK, BV]
    for t in range(begin, end, RANK):
        if DECAY == 1:
            s *= tl.exp(tl.load(g + t * HG + hg).to(tl.float32))
        if DECAY == 2:
            decay = tl.load(g + (t * HG + hg) * K + rk, mask=in_k, other=0.0).to(tl.float32)
            s *= tl.exp(decay)[:, None]
        seen = s
        for r in tl.static_range(RANK):
            row = t + r
            write = tl.load(z + (row * HV + hv) * V + rv, mask=in_v, other=0.0).to(tl.float32)
            if ERASE:
                erase = tl.load(e + (row * HE + he) * K + rk, mask=in_k, other=0.0).to(tl.float32)
                write -= tl.sum(s * erase[:, None], 0)
            key = tl.load(k + (row * H + h) * K + rk, mask=in_k, other=0.0).to(tl.float32)
            if DIAG:
                own = tl.load(diag + row * HV + hv).to(tl.float32)
                seen += key[:, None] * (own * write)[None, :]
            s += key[:, None] * write[None, :]
        if not DIAG:
            seen = s
        for r in tl.static_range(RANK):
            row = t + r
            query = tl.load(q + (row * H + h) * K + rk, mask=in_k, other=0.0).to(tl.float32)
            out = tl.sum(seen * query[:, None], 0)
            out = tl.where(live, out, 0.0)
            tl.store(o + (row * HV + hv) * V + rv, out.to(o.dtype.element_ty), mask=in_v)
    tl.store(state + place, s.to(state.dtype.element_ty), mask=tile_mask)


def tiles(k: int, v: int, rank: int) -> dict[str, int]:
    """Tile sizes and compiler options for the widths k and v and rows a token; nothing else decides them."""
    bk = triton.next_power_of_2(k)
    bv = min(triton.next_power_of_2(v), max(4096 // bk, 16))
    warps = 1 if bk * bv < 1024 else 2 if bk * bv < 4096 or rank == 1 else 4
    return {"BK": bk, "BV": bv, "num_warps": warps, "enable_fp_fusion": True}


def delta_tokens(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, slots: Tensor | None, diag: Tensor | None = None, rank: int = 1,
) -> Tensor:  # fmt: skip
    """Run the rows of N sequences through their states and return every output.

    Args:
        q, k: [T, H, K]; e: [T, H or Hv, K] or None; z: [T, Hv, V]; g: [T, H or Hv, K], [T, H or Hv] or None.
        state: pool of states, fp32 or bf16, updated in place [P, Hv, K, V].
        cu_seqlens: boundaries of the sequences [N + 1]; None gives every sequence one token.
        slots: which state belongs to each sequence, -1 for none (its outputs are zero) [N]; None is 0, 1, 2, ...
        diag: factor on a token's own write in its own output [T, Hv].
        rank: rows a token; only the first row of a token carries a decay.

    Returns:
        o [T, Hv, V] in z's dtype. Rows outside `cu_seqlens` are not written.

    Raises:
        ValueError: fp64 rows, a pool that is not contiguous fp32 or bf16, or K and V above 256.
    """
    refuse_fp64(q, k, e, z, g)
    if state.dtype not in (torch.float32, torch.bfloat16) or not state.is_contiguous():
        raise ValueError(f"the pool must be contiguous float32 or bfloat16, got {state.dtype} at {state.stride()}")
    if max(state.shape[-2:]) > WIDEST:
        raise ValueError(f"the triton implementation takes K and V up to {WIDEST}, got {list(state.shape[-2:])}")
    rows, heads, width = q.shape
    value_heads, value_width = z.shape[1], z.shape[2]
    n = rows // rank if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty_like(z, memory_format=torch.contiguous_format)
    if n == 0 or rows == 0:
        return o
    shape = tiles(width, value_width, rank)
    grid = (triton.cdiv(value_width, shape["BV"]) * value_heads * n,)
    delta_tokens_kernel[grid](
        *(None if x is None else x.contiguous() for x in (q, k, e, z, g, diag)), o, state, cu_seqlens, slots,
        H=heads, HV=value_heads, HE=heads if e is None else e.shape[1], HG=heads if g is None else g.shape[1],
        K=width, V=value_width, RANK=rank,
        DECAY=NONE if g is None else HEAD if g.ndim == 2 else CHANNEL, ERASE=e is not None, DIAG=diag is not None,
        RAGGED=cu_seqlens is not None, SLOTS=slots is not None, **shape,
    )  # fmt: skip
    return o
