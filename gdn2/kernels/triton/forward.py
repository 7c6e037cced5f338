"""Forward of the delta rule on the GPU, in two kernels.

`scores_kernel`, or `channel.channel_scores_kernel`, one program a (chunk, head), all that does not depend on the state:

    Aqk = visible part of q_r . (decay(s -> r) * k_s)      T = earlier part of e_r . (decay(s -> r) * k_s)
    A   = (I + T)^-1                                       and, per channel, gamma * q, gamma * e and tail * k

`carry_kernel`, one program a (segment, value head, tile of V), the state in registers (arXiv 2605.22791, Eq. 23-25):

    R = A (Z - (gamma * E) S)     O = (gamma * Q) S + Aqk R     S <- gamma_C * S + (tail * K)^T R

all of it transposed, so that what one product makes is the first operand of the next, which comes from registers.

Decays are exact at any strength: sums of log-decays run over the very rows they stand for, never as differences of
longer sums, save where `channel` and `between` say so.

Axes: T rows of all sequences, P chunks, C rows a chunk, H key heads, Hv value heads, Hs heads of the scores, K and V
widths.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
CHANNEL = tl.constexpr(2)
LEAST = tl.constexpr(-160.0)
"""Stands for every stronger log2-decay, -inf included: 2 to its power is zero in fp32, zero times it is still zero, and
sums of it are small enough to subtract."""


@triton.jit
def load_rows(base, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Tile [C, B] of x [T, heads, width]: rows row0 + SHIFT ..., zero past the chunk's rows and past the width."""
    r = tl.arange(0, C) + SHIFT
    col = col0 + tl.arange(0, B)
    at = (row0 + r).to(tl.int64)[:, None] * (heads * width) + head * width + col[None, :]
    return tl.load(base + at, mask=(r < rows)[:, None] & (col < width)[None, :], other=0.0)


@triton.jit
def with_rows(
    s, x, row0, rows, head, heads, width, col0, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """s x^T [BV, C] of a state s [BV, BK] and the tile [C, BK] of x that `load_rows` loads.

    fp32 operands in pieces of 64 columns: the terms of wider ones are more than the registers.
    """
    if x.dtype.element_ty == tl.float32 and BK > 64:
        half: tl.constexpr = BK // 2
        first, second = tl.split(tl.permute(tl.reshape(s, [s.shape[0], 2, half]), (0, 2, 1)))
        y = with_rows(first, x, row0, rows, head, heads, width, col0, C, half, PRECISION)
        return y + with_rows(second, x, row0, rows, head, heads, width, col0 + half, C, half, PRECISION)
    else:
        return product(s, tl.trans(load_rows(x, row0, rows, head, heads, width, col0, C, BK)), PRECISION)


@triton.jit
def store_rows(base, x, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr):
    """The reverse of `load_rows`, cast to the pointer's type."""
    r = tl.arange(0, C)
    col = col0 + tl.arange(0, B)
    at = (row0 + r).to(tl.int64)[:, None] * (heads * width) + head * width + col[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=(r < rows)[:, None] & (col < width)[None, :])


@triton.jit
def load_gate(g, row0, rows, head, heads, C: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Per-head log2-decays [C] of g [T, heads], zero past the chunk's rows."""
    r = tl.arange(0, C) + SHIFT
    return tl.load(g + (row0 + r).to(tl.int64) * heads + head, mask=r < rows, other=0.0) * LOG2E


@triton.jit
def gate_ends(g, row0, rows, head, heads, C: tl.constexpr):
    """Per-head decay from the chunk's start through each row, and after each row to the chunk's end [C]."""
    last = tl.arange(0, C) == C - 1
    after = tl.where(last, 0.0, load_gate(g, row0, rows, head, heads, C, 1))
    down = tl.cumsum(load_gate(g, row0, rows, head, heads, C), 0)
    return tl.exp2(down), tl.exp2(tl.cumsum(after, 0, reverse=True))


@triton.jit
def square(base, chunk, head, heads, C: tl.constexpr, DENSE: tl.constexpr):
    """Pointers to the [C, C] tile of x [P, heads, C, C], and a mask of what is kept of it.

    Of what is zero above its diagonal, blocks of 16 that lie there are neither written nor read, unless DENSE: rows of
    one token see each other, and some tokens reach across such blocks.
    """
    i = tl.arange(0, C)
    at = base + (chunk.to(tl.int64) * heads + head) * (C * C) + i[:, None] * C + i[None, :]
    return at, (i[:, None] // 16 >= i[None, :] // 16) | DENSE


@triton.jit
def load_square(base, chunk, head, heads, C: tl.constexpr, DENSE: tl.constexpr):
    """The tile of `square`."""
    at, kept = square(base, chunk, head, heads, C, DENSE)
    return tl.load(at, mask=kept, other=0.0)


@triton.jit
def store_square(base, x, chunk, head, heads, C: tl.constexpr, DENSE: tl.constexpr):
    """The reverse of `load_square`, cast to the pointer's type."""
    at, kept = square(base, chunk, head, heads, C, DENSE)
    tl.store(at, x.to(base.dtype.element_ty), mask=kept)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """fp32 product of two tiles; PRECISION matters for fp32 operands only."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def add_product(x, a, b, PRECISION: tl.constexpr):
    """x + a b in fp32."""
    return tl.dot(a, b, x, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def halves(level, C: tl.constexpr):
    """Mask [C, C] of the pairs (r, s) with r in the second and s in the first half of a block of 2 ** (level + 1)."""
    r = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    return ((r >> (level + 1)) == (s >> (level + 1))) & ((r >> level) > (s >> level))


@triton.jit
def same_token(C: tl.constexpr, RANK: tl.constexpr):
    """Mask [C, C] of the pairs of rows of one token."""
    r = tl.arange(0, C)
    return (r // RANK)[:, None] == (r // RANK)[None, :]


@triton.jit
def between(g, C: tl.constexpr, EXACT: tl.constexpr):
    """Decay exp2(sum of g over (s, r]) for r > s, and 1 elsewhere [C, C].

    Unless EXACT from differences of sums over at most C rows, each no less than `LEAST`: 16-bit operands lose more.
    """
    r = tl.arange(0, C)
    later = r[:, None] > r[None, :]
    if EXACT:
        return tl.exp2(tl.cumsum(tl.where(later, g[:, None], 0.0), 0))
    else:
        upto = tl.cumsum(tl.maximum(g, LEAST), 0)
        return tl.exp2(tl.where(later, tl.minimum(upto[:, None] - upto[None, :], 0.0), 0.0))


@triton.jit
def after(x, y):
    """x, and what is made of it not before there is y: the compiler would make and hold it while registers are short.

    It cannot know that y never has these bits, of a NaN that no operation makes.
    """
    return tl.where(y.to(tl.int32, bitcast=True) != 0x7F812345, x, 0.0)


@triton.jit
def newton(inverse, t, C: tl.constexpr):
    """A step of Newton's method, X + X (I - (I + t) X), by products of fp16 with 22 bits of t."""
    t = after(t, inverse)
    known, coarse = inverse.to(tl.float16), t.to(tl.float16)
    i = tl.arange(0, C)
    over = known - tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    over = add_product(add_product(over, (t - coarse).to(tl.float16), known, "tf32"), coarse, known, "tf32")
    return add_product(known.to(tl.float32), known, (-over).to(tl.float16), "tf32")


@triton.jit
def invert(t, C: tl.constexpr, SOLVE: tl.constexpr):
    """(I + t)^-1 for strictly lower t [C, C], Eq. 21: the inverses of two halves and the block below give the whole.

    Only inverses of diagonal blocks are multiplied, never powers of t, which grow for equal keys and erase up to 2.
    SOLVE is the precision of the products: three terms of tf32, or fp16, which needs no shuffles between products. With
    fp16 a step of Newton's method, exact between two halves, takes the place of the last block; "refined" is one more.
    """
    operand: tl.constexpr = tl.float32 if SOLVE == "tf32x3" else tl.float16
    precision: tl.constexpr = "tf32x3"
    n: tl.constexpr = C // 16
    b = tl.arange(0, n)
    diagonal = (b[:, None] == b[None, :])[:, None, :, None]
    near = tl.sum(tl.where(diagonal, tl.reshape(t, [n, 16, n, 16]), 0.0), 2)  # [C // 16, 16, 16]
    r = tl.arange(0, 16)
    small = tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :] - tl.where(halves(0, 16)[None, :, :], near, 0.0)
    for level in tl.static_range(1, 4):
        below = tl.where(halves(level, 16)[None, :, :], near, 0.0).to(operand)
        known = small.to(operand)
        small -= product(known, product(below, known, precision).to(operand), precision)
    inverse = tl.reshape(tl.where(diagonal, small[:, :, None, :], 0.0), [C, C])
    last: tl.constexpr = 5 if C == 64 else 4
    for level in tl.static_range(4, last + 1 if SOLVE == "tf32x3" else last):
        below = tl.where(halves(level, C), t, 0.0).to(operand)
        known = inverse.to(operand)
        inverse -= product(known, product(below, known, precision).to(operand), precision)
    if SOLVE != "tf32x3":
        inverse = newton(inverse, t, C)
    if SOLVE == "refined":
        inverse = newton(inverse, t, C)
    return inverse


@triton.jit
def scores_kernel(
    q, k, e, g, diag,  # inputs
    decay, tails, scores, solved,  # outputs
    chunk_row, chunk_rows,
    H: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, HS: tl.constexpr, K: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, DECAY: tl.constexpr,
    ERASE: tl.constexpr, DIAG: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Scores and inverse of one (chunk, head of the scores), with decay per head or none.

    `decay` and `tails` [P, Hs, C] are gamma and the decay to the chunk's end; `carry_kernel` reads q, e and k raw.
    """
    chunk = tl.program_id(0) // HS
    head = tl.program_id(0) % HS
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    hk = head // (HS // H)
    aqk = tl.zeros([C, C], dtype=tl.float32)
    t = tl.zeros([C, C], dtype=tl.float32)
    for col0 in range(0, K, B):
        q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
        k_ = tl.trans(load_rows(k, row0, rows, hk, H, K, col0, C, B))
        aqk += product(q_, k_, PRECISION)
        if ERASE:
            t += product(load_rows(e, row0, rows, head // (HS // HE), HE, K, col0, C, B), k_, PRECISION)
    r = tl.arange(0, C)
    token = same_token(C, RANK)
    earlier = (r[:, None] > r[None, :]) & (token == 0)
    pair_decay = tl.where(earlier, 1.0, 0.0)
    if DECAY == HEAD:
        g_ = load_gate(g, row0, rows, head // (HS // HG), HG, C)
        pair_decay = tl.where(earlier, between(g_, C, k.dtype.element_ty == tl.float32), 0.0)
        gamma, tail = gate_ends(g, row0, rows, head // (HS // HG), HG, C)
        at = (chunk.to(tl.int64) * HS + head) * C + r
        tl.store(decay + at, gamma)
        tl.store(tails + at, tail)
    own = aqk  # pairs inside one token have no decay between them
    if DIAG:
        own = own * tl.load(diag + (row0 + r).to(tl.int64) * HS + head, mask=r < rows, other=0.0)[None, :]
    aqk = tl.where(token, own, aqk * pair_decay)
    store_square(scores, aqk, chunk, head, HS, C, 16 % RANK != 0)
    if ERASE:
        store_square(solved, invert(after(t * pair_decay, aqk), C, SOLVE), chunk, head, HS, C, False)


@triton.jit
def load_state(base, index, k0, v0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Tile [BK, BV] of states [N * Hv, K, V], zero past the widths."""
    ki = k0 + tl.arange(0, BK)
    vi = v0 + tl.arange(0, BV)
    base += index.to(tl.int64) * (K * V)
    at = ki[:, None] * V + vi[None, :]
    return tl.load(base + at, mask=(ki < K)[:, None] & (vi < V)[None, :], other=0.0)


@triton.jit
def store_state(base, x, index, k0, v0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The reverse of `load_state`, cast to the pointer's type."""
    ki = k0 + tl.arange(0, BK)
    vi = v0 + tl.arange(0, BV)
    base += index.to(tl.int64) * (K * V)
    at = ki[:, None] * V + vi[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=(ki < K)[:, None] & (vi < V)[None, :])


@triton.jit
def load_whole(decay, index, some, K: tl.constexpr, BK: tl.constexpr):
    """Decay of a whole chunk from [P * Hs, K] where there is `some`, twice [2, BK], for a thread to hold one element.

    With fewer elements than threads Triton has each load all that it uses, too many to hold until the next chunk.
    """
    ki = tl.arange(0, BK)[None, :] + tl.zeros([2, 1], dtype=tl.int32)
    return tl.load(decay + index * K + ki, mask=ki < tl.where(some, K, 0), other=0.0)


@triton.jit
def load_again(x, C: tl.constexpr):
    """C numbers as a row [1, C] that were loaded before and would take too many registers until now.

    Its policy keeps the compiler from taking it for the load before; the numbers come from the first-level cache.
    """
    return tl.load(x + tl.arange(0, C), eviction_policy="evict_last")[None, :]


@triton.jit
def carry_kernel(
    q, k, e, z, decay, tails, scores, solved, initial,  # inputs
    o, written, states, final,  # outputs
    segment_row, segment_end, segment_chunk, chosen,
    HQ: tl.constexpr, HK: tl.constexpr, HE: tl.constexpr, HS: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, START: tl.constexpr, OUTPUT: tl.constexpr, STORE: tl.constexpr,
    TRANSITION: tl.constexpr, APART: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state over one segment of STEP-row chunks, for one value head and one tile of V.

    START begins with `initial`. OUTPUT writes o. STORE writes what the backward pass needs: the state before each
    chunk, and R. TRANSITION starts from the identity with nothing to write, tile by tile of K, so that `written`
    [Ns, Hv, K, K] is the segment's transition; APART then does the tiles of V too, from no state, in the same launch
    since they read the same. The `chosen` segments are done, in that order.
    """
    dtype: tl.constexpr = k.dtype.element_ty
    identities: tl.constexpr = (K + BV - 1) // BV if TRANSITION else 0
    tiles: tl.constexpr = identities + ((V + BV - 1) // BV if APART or not TRANSITION else 0)
    segment = tl.load(chosen + tl.program_id(0) // (HV * tiles))
    head = tl.program_id(0) // tiles % HV
    tile = tl.program_id(0) % tiles
    v0 = (tile - identities) * BV
    row0 = tl.load(segment_row + segment)
    end = tl.load(segment_end + segment)
    chunk = tl.load(segment_chunk + segment)
    hs = head // (HV // HS)
    index = segment * HV + head
    z_end = end  # of the rows of z that count
    if TRANSITION:
        s = tl.where(tl.arange(0, BK)[None, :] == tile * BV + tl.arange(0, BV)[:, None], 1.0, 0.0)
        z_end = tl.where(tile < identities, row0, end)
    elif START:
        s = tl.trans(load_state(initial, index, 0, v0, K, V, BK, BV))
    else:
        s = tl.zeros([BV, BK], dtype=tl.float32)
    # z comes a chunk ahead, in registers: in shared memory there is no room for a third stage with it.
    ahead = tl.trans(load_rows(z, row0, tl.minimum(z_end - row0, STEP), head, HV, V, v0, C, BV))
    n = tl.cdiv(end - row0, STEP)
    if DECAY == CHANNEL:
        decay_ahead = load_whole(decay, chunk * HS + hs, n > 0, K, BK)
    for i in tl.range(0, n, disable_licm=True):  # what would be hoisted has no registers
        at = row0 + i * STEP
        rows = tl.minimum(end - at, STEP)
        x = ahead.to(tl.float32)
        if DECAY == CHANNEL:
            whole = tl.max(decay_ahead, 0)
            decay_ahead = load_whole(decay, (chunk + i + 1) * HS + hs, i + 1 < n, K, BK)
        operand = s.to(dtype)
        if STORE:
            store_state(states, tl.trans(operand), (chunk + i) * HV + head, 0, v0, K, V, BK, BV)
        if DECAY == HEAD:
            of = ((chunk + i) * HS + hs) * C
            gamma = tl.load(decay + of + tl.arange(0, C))[None, :]
            tail = tl.load(tails + of + tl.arange(0, C))[None, :]
        if ERASE:
            seen = with_rows(operand, e, at, rows, head // (HV // HE), HE, K, 0, C, BK, PRECISION)
        if OUTPUT and dtype == tl.float32:  # else the pieces of the state would be held till later
            y = with_rows(operand, q, at, rows, head // (HV // HQ), HQ, K, 0, C, BK, PRECISION)
        if OUTPUT:  # early where more products are left to wait for it, else it is in the way of the first
            more = tl.minimum(z_end - at - STEP, STEP)
            ahead = tl.trans(load_rows(z, at + STEP, more, head, HV, V, v0, C, BV))
        if ERASE:
            x -= seen * gamma if DECAY == HEAD else seen
            a = load_square(solved, chunk + i, hs, HS, C, False)
            x = product(x.to(dtype), tl.trans(a), PRECISION)  # R, Eq. 35
        r_ = x.to(dtype)
        kept = (x * tail).to(dtype) if DECAY == HEAD else r_
        if STORE:
            store_rows(written, tl.trans(r_), at, rows, head, HV, V, v0, C, BV)
        if OUTPUT:
            if dtype != tl.float32:
                y = with_rows(operand, q, at, rows, head // (HV // HQ), HQ, K, 0, C, BK, PRECISION)
            if DECAY == HEAD:
                y *= load_again(decay + of, C)
            pairs = load_square(scores, chunk + i, hs, HS, C, DENSE)
            y = add_product(y, r_, tl.trans(pairs), PRECISION)  # Eq. 24
            store_rows(o, tl.trans(y), at, rows, head, HV, V, v0, C, BV)
        else:
            more = tl.minimum(z_end - at - STEP, STEP)
            ahead = tl.trans(load_rows(z, at + STEP, more, head, HV, V, v0, C, BV))
        if DECAY == HEAD:
            s = s * tl.load(decay + of + C - 1)
        if DECAY == CHANNEL:
            s = s * whole[None, :]
        k_ = load_rows(k, at, rows, head // (HV // HK), HK, K, 0, C, BK)
        s = add_product(s, kept, k_, PRECISION)  # Eq. 23
    if TRANSITION and tile < identities:
        store_state(written, tl.trans(s), index, 0, tile * BV, K, K, BK, BV)
    else:
        store_state(final, tl.trans(s), index, 0, v0, K, V, BK, BV)


@triton.jit
def merge_kernel(
    transitions, added, initial, starts, first, count,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, INNER: tl.constexpr,
    START: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State before every segment of one sequence: S <- M S + added, in fp32. BACKWARD runs from the end with M^T.

    START begins with `initial`, not from nothing.

    M comes in tiles of INNER along the sum, for shared memory holds 128 x 128 of it at most; S then comes from memory.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    sequence = tl.program_id(0) // (HV * tiles)
    head = tl.program_id(0) // tiles % HV
    v0 = tl.program_id(0) % tiles * BV
    n = tl.load(count + sequence)
    step = -1 if BACKWARD else 1
    segment = tl.load(first + sequence) + (n - 1 if BACKWARD else 0)
    if START:
        s = load_state(initial, sequence * HV + head, 0, v0, K, V, BK, BV)
    else:
        s = tl.zeros([BK, BV], dtype=tl.float32)
    store_state(starts, s, segment * HV + head, 0, v0, K, V, BK, BV)
    for i in range(1, n):
        index = (segment + (i - 1) * step) * HV + head
        if INNER == BK:
            m = load_state(transitions, index, 0, 0, K, K, BK, BK)
            m = tl.trans(m) if BACKWARD else m
            s = product(m, s, PRECISION) + load_state(added, index, 0, v0, K, V, BK, BV)
        else:
            tl.debug_barrier()
            s = load_state(added, index, 0, v0, K, V, BK, BV)
            for k0 in range(0, K, INNER):
                if BACKWARD:
                    m = tl.trans(load_state(transitions, index, k0, 0, K, K, INNER, BK))
                else:
                    m = load_state(transitions, index, 0, k0, K, K, BK, INNER)
                s = add_product(s, m, load_state(starts, index, k0, v0, K, V, INNER, BV), PRECISION)
        store_state(starts, s, (segment + i * step) * HV + head, 0, v0, K, V, BK, BV)
