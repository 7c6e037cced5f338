"""The two kernels that meet decay per channel inside a chunk: its scores, and the gradients of its inputs.

A chunk of 64 rows is two blocks of 32. q and e decay from the start of their block. Keys of the first block decay up to
its end for the rows of the second. Keys of the row's own block are divided by their decay since its start where that is
in `REACH`; the others (`rest`) are anchored in the middle of the smallest aligned block of 2, 4, 8, 16 or 32 rows that
holds the pair. Which way a key takes depends on gates up to its own row only, so a later gate never changes an earlier
score.

Sums of log-decays are products of 0/1 matrices with them on the tensor cores. Those matrices come from a table in
memory (`selections`): made in the kernel, their masks alone took more registers than there are.

Axes as in `forward`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton.forward import FORGET, LOG2E, halves, invert, product, same_token, square

BLOCK = tl.constexpr(32)
REACH = tl.constexpr(90.0)
"""Decays below 2 ** -90 are not divided by: bf16 and fp32 reach 2 ** 127, and keys and queries need room too."""
LEVELS = tl.constexpr(5)
"""Blocks of 2 ** (level + 1) rows, the largest being `BLOCK`."""

# Rows of the table: what row r selects, all of it in the chunk (UPTO ...) or in r's block (SINCE, UNTIL).
UPTO = tl.constexpr(0)  # up to r
BEYOND = tl.constexpr(1)  # after r
SINCE = tl.constexpr(2)  # up to r, in its block
UNTIL = tl.constexpr(3)  # after r, in its block
FROM = tl.constexpr(4)  # from r on
MIDDLE = tl.constexpr(5)  # + level: between r and the middle of its aligned block of 2 ** (level + 1) rows


@cache
def selections(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrices of ones and zeros that `sums` multiplies by, [5 + levels, rows, rows]."""
    r = torch.arange(rows, device=device)[:, None]
    t = torch.arange(rows, device=device)[None, :]
    same = r // BLOCK.value == t // BLOCK.value
    out = [t <= r, t > r, same & (t <= r), same & (t > r), t >= r]
    for level in range(LEVELS.value):
        # Rows of the second half: from the middle through r. Rows of the first half: after r up to the middle.
        second = (r >> level) % 2 == 1
        out.append((r >> level == t >> level) & ((t > r) ^ second))
    return torch.stack(out).to(dtype)


@triton.jit
def sums(table, which, x, C: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix `which` of the table times x [C, B] in fp32. 16-bit tables: x is split in two, so that 16 bits count."""
    i = tl.arange(0, C)
    select = tl.load(table + which * (C * C) + i[:, None] * C + i[None, :])
    if select.dtype == tl.float32:
        return tl.dot(select, x, input_precision=PRECISION, out_dtype=tl.float32)
    else:
        coarse = x.to(select.dtype)
        fine = tl.dot(select, (x - coarse).to(select.dtype), out_dtype=tl.float32)
        return tl.dot(select, coarse, fine, out_dtype=tl.float32)


@triton.jit
def load_rows(base, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr):
    """As `forward.load_rows`, with 32-bit offsets inside the tile: here they save registers, there they cost some."""
    r = tl.arange(0, C)
    col = col0 + tl.arange(0, B)
    base += row0.to(tl.int64) * (heads * width) + head * width
    at = r[:, None] * (heads * width) + col[None, :]
    return tl.load(base + at, mask=(r < rows)[:, None] & (col < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, x, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr):
    """The reverse of `load_rows`, cast to the pointer's type."""
    r = tl.arange(0, C)
    col = col0 + tl.arange(0, B)
    base += row0.to(tl.int64) * (heads * width) + head * width
    at = r[:, None] * (heads * width) + col[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=(r < rows)[:, None] & (col < width)[None, :])


@triton.jit
def load_state(base, index, k0, v0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """As `forward.load_state`, with 32-bit offsets inside the state."""
    ki = k0 + tl.arange(0, BK)
    vi = v0 + tl.arange(0, BV)
    base += index.to(tl.int64) * (K * V)
    at = ki[:, None] * V + vi[None, :]
    return tl.load(base + at, mask=(ki < K)[:, None] & (vi < V)[None, :], other=0.0)


@triton.jit
def load_decays(g, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr):
    """log2-decays [C, B], zero past the chunk's rows."""
    return tl.maximum(load_rows(g, row0, rows, head, heads, width, col0, C, B) * LOG2E, FORGET)


@triton.jit
def reached(since, DIRECT: tl.constexpr):
    """One over the decay 2 ** since where that is in REACH (DIRECT: bf16 and fp32 have the exponents), else zero."""
    return tl.exp2(tl.where(since > -REACH, -since, FORGET)) if DIRECT else tl.zeros(since.shape, dtype=tl.float32)


@triton.jit
def unreached(since, DIRECT: tl.constexpr):
    """One where `reached` is zero."""
    return tl.where(since > -REACH, 0.0, 1.0) if DIRECT else tl.full(since.shape, 1.0, dtype=tl.float32)


@triton.jit
def in_second(C: tl.constexpr):
    """Mask [C, 1] of the rows of the second block."""
    return (tl.arange(0, C) >= BLOCK)[:, None]


@triton.jit
def add_scores(score, xf, kn, kf, C: tl.constexpr, PRECISION: tl.constexpr):
    """Add one tile of K to the scores of x (q or e), decayed since its block's start, with the keys.

    kn: keys for the rows of the first block. kf: for those of the second. Entries above the diagonal are meaningless.
    """
    second = in_second(C)
    score = tl.dot(tl.where(second, 0.0, xf).to(xf.dtype), tl.trans(kn), score, input_precision=PRECISION)
    return tl.dot(tl.where(second, xf, 0.0).to(xf.dtype), tl.trans(kf), score, input_precision=PRECISION)


@triton.jit
def add_rest(
    aqk, t, q_, k_, e_, g_, table,
    C: tl.constexpr, ERASE: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of K of the pairs of one block whose key is out of reach."""
    operand: tl.constexpr = k_.dtype
    rest = unreached(sums(table, SINCE, g_, C, PRECISION), DIRECT)
    for level in range(0, LEVELS):
        f = tl.exp2(sums(table, MIDDLE + level, g_, C, PRECISION))
        kf = tl.trans((k_ * (f * rest)).to(operand))
        aqk += tl.where(halves(level, C), product((q_ * f).to(operand), kf, PRECISION), 0.0)
        if ERASE:
            t += tl.where(halves(level, C), product((e_ * f).to(operand), kf, PRECISION), 0.0)
    return aqk, t


@triton.jit
def channel_scores_kernel(
    q, k, e, g, diag, table,  # inputs
    qg, eg, kt, decay, scores, solved,  # outputs
    chunk_row, chunk_rows,
    H: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, HS: tl.constexpr, K: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr,
    ERASE: tl.constexpr, DIAG: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Scores, inverse and decayed operands of one (chunk, head of the scores).

    `decay` [P, Hs, K] is the whole chunk's decay; qg, eg and kt [T, Hs, K] are gamma * q, gamma * e and tail * k.
    """
    chunk = tl.program_id(0) // HS
    head = tl.program_id(0) % HS
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    hk = head // (HS // H)
    operand: tl.constexpr = k.dtype.element_ty
    # Pairs inside one token have no decay between them.
    inside = tl.zeros([C, C], dtype=tl.float32)
    own = tl.zeros([C], dtype=tl.float32)
    aqk = tl.zeros([C, C], dtype=tl.float32)
    t = tl.zeros([C, C], dtype=tl.float32)
    strong = tl.zeros([C], dtype=tl.float32)
    for col0 in range(0, K, B):
        g_ = load_decays(g, row0, rows, head // (HS // HG), HG, K, col0, C, B)
        q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
        k_ = load_rows(k, row0, rows, hk, H, K, col0, C, B)
        e_ = load_rows(e, row0, rows, head // (HS // HE), HE, K, col0, C, B) if ERASE else q_
        since = sums(table, SINCE, g_, C, PRECISION)
        kn = (k_ * reached(since, DIRECT)).to(operand)
        kf = tl.where(in_second(C), kn, (k_ * tl.exp2(sums(table, UNTIL, g_, C, PRECISION))).to(operand))
        aqk = add_scores(aqk, (q_ * tl.exp2(since)).to(operand), kn, kf, C, PRECISION)
        if ERASE:
            t = add_scores(t, (e_ * tl.exp2(since)).to(operand), kn, kf, C, PRECISION)
        if RANK == 1:
            own += tl.sum(q_.to(tl.float32) * k_, 1)
        else:
            inside += product(q_, tl.trans(k_), PRECISION)
        strong = tl.maximum(strong, tl.max(unreached(since, DIRECT), 1))
        # Read again, from a place the compiler cannot know to be the same: kept, they would not fit in the registers.
        again = col0 + rows // 4096 * B
        k_ = load_rows(k, row0, rows, hk, H, K, again, C, B)
        store_rows(kt, k_ * tl.exp2(sums(table, BEYOND, g_, C, PRECISION)), row0, rows, head, HS, K, col0, C, B)
        gamma = tl.exp2(sums(table, UPTO, g_, C, PRECISION))
        q_ = load_rows(q, row0, rows, hk, H, K, again, C, B)
        store_rows(qg, q_ * gamma, row0, rows, head, HS, K, col0, C, B)
        if ERASE:
            e_ = load_rows(e, row0, rows, head // (HS // HE), HE, K, again, C, B)
            store_rows(eg, e_ * gamma, row0, rows, head, HS, K, col0, C, B)
        last = (tl.arange(0, C) == C - 1)[:, None]
        col = col0 + tl.arange(0, B)[None, :]
        at = decay + (chunk.to(tl.int64) * HS + head) * K + tl.zeros([C, 1], dtype=tl.int32) + col
        tl.store(at, gamma, mask=last & (col < K))
    if tl.max(strong, 0) > 0:
        for col0 in range(0, K, B):
            g_ = load_decays(g, row0, rows, head // (HS // HG), HG, K, col0, C, B)
            q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
            k_ = load_rows(k, row0, rows, hk, H, K, col0, C, B)
            e_ = load_rows(e, row0, rows, head // (HS // HE), HE, K, col0, C, B) if ERASE else q_
            aqk, t = add_rest(aqk, t, q_, k_, e_, g_, table, C, ERASE, DIRECT, PRECISION)
    r = tl.arange(0, C)
    token = same_token(C, RANK)
    earlier = (r[:, None] > r[None, :]) & (token == 0)
    if RANK == 1:
        inside = own[None, :]
    if DIAG:
        inside = inside * tl.load(diag + (row0 + r).to(tl.int64) * HS + head, mask=r < rows, other=0.0)[None, :]
    aqk = tl.where(token, inside, tl.where(earlier, aqk, 0.0))
    tl.store(square(scores, chunk, head, HS, C), aqk.to(scores.dtype.element_ty))
    if ERASE:
        t = tl.where(earlier, t, 0.0)
        tl.store(square(solved, chunk, head, HS, C), invert(t, C, SOLVE).to(solved.dtype.element_ty))


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
def inner_pairs(
    q_, k_, e_, g_, daqk, dt, table,
    C: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients [C, B] of q, e and k from the pairs of one chunk with decay between them: `add_scores` mirrored.

    daqk and dt are pointers to [C, C] tiles, zero above the diagonal.
    """
    operand: tl.constexpr = k_.dtype
    second = in_second(C)
    apart = same_token(C, RANK) == 0
    since = sums(table, SINCE, g_, C, PRECISION)
    down = tl.exp2(since)
    up = reached(since, DIRECT)
    up_far = tl.where(second, up, tl.exp2(sums(table, UNTIL, g_, C, PRECISION)))
    kn = (k_ * up).to(operand)
    kf = (k_ * up_far).to(operand)
    xf = (q_ * down).to(operand)
    x = tl.load(daqk, mask=apart & (second == 0), other=0.0)
    dq = product(x, kn, PRECISION)
    near = product(tl.trans(x), xf, PRECISION)
    x = tl.load(daqk, mask=apart & second, other=0.0)
    dq = tl.dot(x, kf, dq, input_precision=PRECISION) * down
    far = product(tl.trans(x), xf, PRECISION)
    de = dq
    if ERASE:
        xf = (e_ * down).to(operand)
        x = tl.load(dt, mask=(second == 0) & apart, other=0.0)
        de = product(x, kn, PRECISION)
        near = tl.dot(tl.trans(x), xf, near, input_precision=PRECISION)
        x = tl.load(dt, mask=second & apart, other=0.0)
        de = tl.dot(x, kf, de, input_precision=PRECISION) * down
        far = tl.dot(tl.trans(x), xf, far, input_precision=PRECISION)
    dk = up * near + up_far * far
    return dq, de, dk, tl.max(tl.max(unreached(since, DIRECT), 1), 0) > 0


@triton.jit
def rest_pairs(
    dq, de, dk, q_, k_, e_, g_, daqk, dt, table,
    C: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the pairs of one block whose key is out of reach give: `add_rest` mirrored."""
    operand: tl.constexpr = k_.dtype
    rest = unreached(sums(table, SINCE, g_, C, PRECISION), DIRECT)
    for level in range(0, LEVELS):
        f = tl.exp2(sums(table, MIDDLE + level, g_, C, PRECISION))
        kf = (k_ * (f * rest)).to(operand)
        pairs = halves(level, C) & (same_token(C, RANK) == 0)
        x = tl.load(daqk, mask=pairs, other=0.0)
        dq += f * product(x, kf, PRECISION)
        near = product(tl.trans(x), (q_ * f).to(operand), PRECISION)
        if ERASE:
            x = tl.load(dt, mask=pairs, other=0.0)
            de += f * product(x, kf, PRECISION)
            near = tl.dot(tl.trans(x), (e_ * f).to(operand), near, input_precision=PRECISION)
        dk += (f * rest) * near
    return dq, de, dk


@triton.jit
def gate_gradient(counted, kept, table, C: tl.constexpr, PRECISION: tl.constexpr):
    """Sum of `counted` over each row and those after it, plus the sum of `kept` over the rows before it [C, B]."""
    if table.dtype.element_ty == tl.bfloat16:
        return sums(table, FROM, counted - kept, C, PRECISION) + tl.sum(kept, 0)[None, :]
    else:  # products of gradients leave the exponents of fp16
        return tl.cumsum(counted, 0, reverse=True) + tl.cumsum(kept, 0) - kept


@triton.jit
def channel_inputs_kernel(
    q, k, e, g, do, dz, written, states, dstates, daqk, dt, table,  # inputs
    dq, dk, de, dg,  # outputs [T, Hv, K]
    chunk_row, chunk_rows,
    H: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    B: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr,
    ERASE: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs on the key side for one (chunk, value head, tile of K).

    Every use of a decay is weighted by its own gradient, so dg is a sum over the rows on the far side of each gate:
    reads and erasures after it count up, writes after it count down, and what reaches the chunk's end counts once.
    """
    tiles: tl.constexpr = (K + B - 1) // B
    chunk = tl.program_id(0) // (HV * tiles)
    head = tl.program_id(0) // tiles % HV
    col0 = tl.program_id(0) % tiles * B
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    hk = head // (HV // H)
    daqk, dt = square(daqk, chunk, head, HV, C), square(dt, chunk, head, HV, C)
    g_ = load_decays(g, row0, rows, head // (HV // HG), HG, K, col0, C, B)
    q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
    k_ = load_rows(k, row0, rows, hk, H, K, col0, C, B)
    e_ = load_rows(e, row0, rows, head // (HV // HE), HE, K, col0, C, B) if ERASE else q_
    near_q, near_e, near_k, strong = inner_pairs(
        q_, k_, e_, g_, daqk, dt, table, C, RANK, ERASE, DIRECT, PRECISION
    )
    # Read again, from a place the compiler cannot know to be the same: kept, they would not fit in the registers.
    again = col0 + rows // 4096 * B
    if strong:
        g_ = load_decays(g, row0, rows, head // (HV // HG), HG, K, again, C, B)
        q_ = load_rows(q, row0, rows, hk, H, K, again, C, B)
        k_ = load_rows(k, row0, rows, hk, H, K, again, C, B)
        e_ = load_rows(e, row0, rows, head // (HV // HE), HE, K, again, C, B) if ERASE else q_
        near_q, near_e, near_k = rest_pairs(
            near_q, near_e, near_k, q_, k_, e_, g_, daqk, dt, table, C, RANK, ERASE, DIRECT, PRECISION
        )
    dq_, de_, dk_, dwhole = through_state(
        do, dz, written, states, dstates, row0, rows, chunk, head, col0, HV, K, V, B, BV, C, ERASE, PRECISION
    )
    again = col0 + rows // 8192 * B
    table += rows // 8192 * (C * C)
    g_ = load_decays(g, row0, rows, head // (HV // HG), HG, K, again, C, B)
    gamma = tl.exp2(sums(table, UPTO, g_, C, PRECISION))
    # The decay of the whole chunk counts once for every gate, as if its last row had read it.
    counted = tl.where((tl.arange(0, C) == C - 1)[:, None], gamma * dwhole[None, :], 0.0)
    if ERASE:
        de_ = de_ * gamma + near_e
        store_rows(de, de_, row0, rows, head, HV, K, col0, C, B)
        counted += load_rows(e, row0, rows, head // (HV // HE), HE, K, again, C, B) * de_
    q_ = load_rows(q, row0, rows, hk, H, K, again, C, B)
    k_ = load_rows(k, row0, rows, hk, H, K, again, C, B)
    dq_ = dq_ * gamma + near_q
    dk_ *= tl.exp2(sums(table, BEYOND, g_, C, PRECISION))
    counted += q_ * dq_ - k_ * near_k
    kept = k_ * dk_
    if RANK == 1:
        own = tl.sum(tl.where(same_token(C, 1), tl.load(daqk).to(tl.float32), 0.0), 1)[:, None]
        dq_ += own * k_
        dk_ += near_k + own * q_
    else:
        x = tl.load(daqk, mask=same_token(C, RANK), other=0.0)
        dq_ += product(x, k_, PRECISION)
        dk_ += near_k + product(tl.trans(x), q_, PRECISION)
    store_rows(dq, dq_, row0, rows, head, HV, K, col0, C, B)
    store_rows(dk, dk_, row0, rows, head, HV, K, col0, C, B)
    # A gate of row t lies before the reads of rows r >= t, and inside the tails of rows s < t.
    store_rows(dg, gate_gradient(counted, kept, table, C, PRECISION), row0, rows, head, HV, K, col0, C, B)
