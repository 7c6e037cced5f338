"""Backward of the delta rule on the GPU, after the forward kernels have been run again for A, Aqk, S and R.

`reverse_kernel`, one program a (segment, value head, tile of V), the gradient of the state in registers, transposed:

    dR = Aqk^T dO + (tail K) dS      dZ = A^T dR      dS <- gamma_C dS + (gamma Q)^T dO - (gamma E)^T dZ

`pairs_kernel`, one program a (chunk, value head): dAqk = lower dO R^T and dT = -strictly lower dZ R^T. The latter is
the paper's -A^T dA A^T (Eq. 28), since R = A X and dA = dR X^T: neither A nor X is needed.

`inputs_kernel`, or `channel.channel_inputs_kernel`, one program a (chunk, value head, tile of K): gradients of q, k, e
and g from dO S^T, dZ S^T, R dS^T and the pairs, with the decays of the forward pass, exact on every pair.

Axes as in `forward`.
"""

import triton
import triton.language as tl

from gdn2.kernels.triton.forward import (
    CHANNEL,
    HEAD,
    add_product,
    between,
    gate_ends,
    load_again,
    load_gate,
    load_rows,
    load_square,
    load_state,
    load_whole,
    product,
    same_token,
    store_rows,
    store_square,
    store_state,
    with_rows,
)


@triton.jit
def reverse_kernel(
    q, k, e, decay, tails, scores, solved, do, dfinal,  # inputs
    dz, dstates, dinitial,  # outputs
    segment_row, segment_end, segment_chunk, chosen,
    HQ: tl.constexpr, HK: tl.constexpr, HE: tl.constexpr, HS: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, STORE: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of the state back over one of the `chosen` segments, in their order.

    STORE writes dz and the gradient after each chunk.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    segment = tl.load(chosen + tl.program_id(0) // (HV * tiles))
    head = tl.program_id(0) // tiles % HV
    v0 = tl.program_id(0) % tiles * BV
    row0 = tl.load(segment_row + segment)
    end = tl.load(segment_end + segment)
    chunk = tl.load(segment_chunk + segment)
    hs = head // (HV // HS)
    index = segment * HV + head
    ds = tl.trans(load_state(dfinal, index, 0, v0, K, V, BK, BV))
    n = tl.cdiv(end - row0, STEP)
    at = row0 + (n - 1) * STEP
    chunk += n - 1
    ahead = tl.trans(load_rows(do, at, tl.where(n > 0, end - at, 0), head, HV, V, v0, C, BV))
    if DECAY == CHANNEL:
        decay_ahead = load_whole(decay, chunk * HS + hs, n > 0, K, BK)
    for _ in tl.range(0, n, disable_licm=k.dtype.element_ty == tl.float32):
        rows = tl.minimum(end - at, STEP)
        if DECAY == CHANNEL:
            whole = tl.max(decay_ahead, 0)
            decay_ahead = load_whole(decay, (chunk - 1) * HS + hs, at > row0, K, BK)
        do_ = ahead
        operand = ds.to(k.dtype.element_ty)
        if STORE:
            store_state(dstates, tl.trans(operand), chunk * HV + head, 0, v0, K, V, BK, BV)
        dr = with_rows(operand, k, at, rows, head // (HV // HK), HK, K, 0, C, BK, PRECISION)
        if DECAY == HEAD:
            of = (chunk * HS + hs) * C
            gamma = tl.load(decay + of + tl.arange(0, C))[None, :]
            dr = dr * tl.load(tails + of + tl.arange(0, C))[None, :]
            ds = ds * tl.load(decay + of + C - 1)
        if DECAY == CHANNEL:
            ds = ds * whole[None, :]
        dr = add_product(dr, do_, load_square(scores, chunk, hs, HS, C, DENSE), PRECISION)
        scaled = (do_ * gamma).to(do_.dtype) if DECAY == HEAD else do_
        q_ = load_rows(q, at, rows, head // (HV // HQ), HQ, K, 0, C, BK)
        ds = add_product(ds, scaled, q_, PRECISION)
        ahead = tl.trans(load_rows(do, at - STEP, tl.where(at > row0, STEP, 0), head, HV, V, v0, C, BV))
        if ERASE:
            a = load_square(solved, chunk, hs, HS, C, False)
            dr = product(dr.to(do_.dtype), a, PRECISION)
            e_ = load_rows(e, at, rows, head // (HV // HE), HE, K, 0, C, BK)
            scaled = (-dr * load_again(decay + of, C) if DECAY == HEAD else -dr).to(do_.dtype)
            ds = add_product(ds, scaled, e_, PRECISION)
        if STORE:
            store_rows(dz, tl.trans(dr), at, rows, head, HV, V, v0, C, BV)
        at -= STEP
        chunk -= 1
    store_state(dinitial, tl.trans(ds), index, 0, v0, K, V, BK, BV)


@triton.jit
def pairs_kernel(
    q, k, g, diag, do, dz, written,  # inputs
    daqk, dt, own, ddiag,  # outputs
    chunk_row, chunk_rows,
    H: tl.constexpr, HG: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, DECAY: tl.constexpr,
    ERASE: tl.constexpr, DIAG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores and of T [P, Hv, C, C], with the decay of the pair folded in when it is per head.

    Per channel and at rank 1 those of a row with itself go to `own` [P, Hv, C] and are zero in daqk: their products
    with decays would only add rounding to dg.
    """
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    da = tl.zeros([C, C], dtype=tl.float32)
    d = tl.zeros([C, C], dtype=tl.float32)
    for v0 in range(0, V, BV):
        r_ = tl.trans(load_rows(written, row0, rows, head, HV, V, v0, C, BV))
        da += product(load_rows(do, row0, rows, head, HV, V, v0, C, BV), r_, PRECISION)
        if ERASE:
            d -= product(load_rows(dz, row0, rows, head, HV, V, v0, C, BV), r_, PRECISION)
    r = tl.arange(0, C)
    token = same_token(C, RANK)
    earlier = (r[:, None] > r[None, :]) & (token == 0)
    if DIAG:
        pair = tl.zeros([C, C], dtype=tl.float32)
        for col0 in range(0, K, BK):
            q_ = load_rows(q, row0, rows, head // (HV // H), H, K, col0, C, BK)
            pair += product(q_, tl.trans(load_rows(k, row0, rows, head // (HV // H), H, K, col0, C, BK)), PRECISION)
        at = (row0 + r).to(tl.int64) * HV + head
        tl.store(ddiag + at, tl.sum(tl.where(token, pair * da, 0.0), 0), mask=r < rows)
        da = tl.where(token, da * tl.load(diag + at, mask=r < rows, other=0.0)[None, :], da)
    if DECAY == HEAD:
        g_ = load_gate(g, row0, rows, head // (HV // HG), HG, C)
        pair_decay = between(g_, C, k.dtype.element_ty == tl.float32)
        da = tl.where(earlier, da * pair_decay, da)
        d = d * pair_decay
    if DECAY == CHANNEL and RANK == 1:
        tl.store(own + (chunk.to(tl.int64) * HV + head) * C + r, tl.sum(tl.where(token, da, 0.0), 1))
        da = tl.where(earlier, da, 0.0)
    da = tl.where(earlier | token, da, 0.0)
    store_square(daqk, da, chunk, head, HV, C, 16 % RANK != 0)
    if ERASE:
        store_square(dt, tl.where(earlier, d, 0.0), chunk, head, HV, C, False)


@triton.jit
def through_state(
    do, dz, written, states, dstates, row0, rows, chunk, head, col0,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO S^T, -dZ S^T and R dS^T [C, B], and the rows' sums of S * dS [B], for one tile of K."""
    dq = tl.zeros([C, B], dtype=tl.float32)
    de = tl.zeros([C, B], dtype=tl.float32)
    dk = tl.zeros([C, B], dtype=tl.float32)
    dwhole = tl.zeros([B], dtype=tl.float32)
    for v0 in range(0, V, BV):
        s = load_state(states, chunk * HV + head, col0, v0, K, V, B, BV)
        ds = load_state(dstates, chunk * HV + head, col0, v0, K, V, B, BV)
        dwhole += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        dq += product(load_rows(do, row0, rows, head, HV, V, v0, C, BV), tl.trans(s), PRECISION)
        if ERASE:
            de -= product(load_rows(dz, row0, rows, head, HV, V, v0, C, BV), tl.trans(s), PRECISION)
        dk += product(load_rows(written, row0, rows, head, HV, V, v0, C, BV), tl.trans(ds), PRECISION)
    return dq, de, dk, dwhole


@triton.jit
def inputs_kernel(
    q, k, e, g, do, dz, written, states, dstates, daqk, dt,  # inputs
    dq, dk, de, dg,  # outputs [T, Hv, K]; dg [tiles of K, T, Hv]
    chunk_row, chunk_rows, total,
    H: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    B: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs on the key side for one (chunk, value head, tile of K), with decay per head or none.

    Every use of a decay is weighted by its own gradient, so dg is a sum over the rows on the far side of each gate:
    reads and erasures after it count up, writes after it count down, and what reaches the chunk's end counts once.
    """
    tiles: tl.constexpr = (K + B - 1) // B
    chunk = tl.program_id(0) // (HV * tiles)
    head = tl.program_id(0) // tiles % HV
    tile = tl.program_id(0) % tiles
    col0 = tile * B
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    dq_, de_, dk_, dwhole = through_state(
        do, dz, written, states, dstates, row0, rows, chunk, head, col0, HV, K, V, B, BV, C, ERASE, PRECISION
    )
    if DECAY == HEAD:
        gamma, tail = gate_ends(g, row0, rows, head // (HV // HG), HG, C)
        dwhole *= tl.sum(tl.where(tl.arange(0, C) == C - 1, gamma, 0.0), 0)
        dq_ *= gamma[:, None]
        de_ *= gamma[:, None]
        dk_ *= tail[:, None]
    q_ = load_rows(q, row0, rows, head // (HV // H), H, K, col0, C, B)
    k_ = load_rows(k, row0, rows, head // (HV // H), H, K, col0, C, B)
    da = load_square(daqk, chunk, head, HV, C, DENSE)
    kept = tl.sum(k_ * dk_, 1)
    near_q = product(da, k_, PRECISION)
    near_k = product(tl.trans(da), q_, PRECISION)
    counted = q_ * dq_
    counted += q_ * near_q - k_ * near_k
    store_rows(dq, dq_ + near_q, row0, rows, head, HV, K, col0, C, B)
    dk_ += near_k
    if ERASE:
        e_ = load_rows(e, row0, rows, head // (HV // HE), HE, K, col0, C, B)
        d = load_square(dt, chunk, head, HV, C, False)
        de_ += product(d, k_, PRECISION)
        near_k = product(tl.trans(d), e_, PRECISION)
        counted -= k_ * near_k
        counted += e_ * de_
        dk_ += near_k
        store_rows(de, de_, row0, rows, head, HV, K, col0, C, B)
    store_rows(dk, dk_, row0, rows, head, HV, K, col0, C, B)
    if DECAY == HEAD:
        # A gate of row t lies before the reads of rows r >= t, and inside the tails of rows s < t.
        counted_ = tl.sum(counted, 1)
        slope = tl.cumsum(counted_, 0, reverse=True) + tl.cumsum(kept, 0) - kept + tl.sum(dwhole, 0)
        r = tl.arange(0, C)
        at = (tile.to(tl.int64) * total + row0 + r) * HV + head
        tl.store(dg + at, slope, mask=r < rows)
