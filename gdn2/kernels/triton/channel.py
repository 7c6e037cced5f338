"""The two kernels that meet decay per channel inside a chunk: its scores, and the gradients of its inputs.

A chunk is two halves. Keys are divided by their decay since the start of their half where that is in `REACH`; q and e
meet those of the first half decayed since the chunk's start, and those of the second since that half's. What is lost
so, where q or e have decayed below 2 ** -126, is a pair weaker than 2 ** -36. The other keys (`rest`) meet the rows of
each 16 decayed to their start, or divided, within them, where that is in reach. What remains then (`deep`) is anchored
in the middle of the smallest aligned block of 2, 4, 8 or 16 rows that holds the pair. Which way a key takes depends on
gates up to its own row only, so a later gate never changes an earlier score. Gradients need no such care: there both
sides are anchored in the middle of the chunk, where that is in reach.

Chunks with a key out of reach are rare, and what they need does not fit in the registers beside the rest: they have
launches of their own (REST), whose programs stop at once where `strong` says that there is nothing to do.

Sums of log-decays are products of 0/1 matrices with them on the tensor cores. Those matrices come from tables in
memory (`selections`, `spans_of`): made in the kernel, their masks alone took more registers than there are. With 16-bit
operands they take log-decays of 11 bits, with fp32 ones of 22: all sums are of the same numbers, so that a pair is
weighted as if its gates were rounded, by no more than 2 ** -11 or 2 ** -22. Gradients of gates are summed from 16 bits,
or all of fp32's.

Axes as in `forward`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.kernels.triton.forward import (
    LEAST,
    LOG2E,
    add_product,
    invert,
    load_square,
    load_state,
    product,
    same_token,
    store_square,
)

REACH = tl.constexpr(90.0)
"""Decays below 2 ** -90 are not divided by: bf16 and fp32 reach 2 ** 127, and keys and queries need room too."""
FINE = tl.constexpr(256.0)
"""What fp16 log2-decays are multiplied by, for their 11 bits from `LEAST` down to 2 ** -22."""
NEAR = tl.constexpr(16)
"""Rows of the blocks at whose starts pairs are anchored whose key is beyond reach from the start of its half."""
DEEP = tl.constexpr(4)
"""Levels of blocks of 2 ** (level + 1) rows, the largest being `NEAR`."""

# What row r of the matrices of `spans_of` selects.
UPTO = tl.constexpr(0)  # up to r
BEYOND = tl.constexpr(1)  # after r
SINCE = tl.constexpr(2)  # up to r, in its half of the chunk
CENTRE = tl.constexpr(3)  # between r and the middle of the chunk
ITSELF = tl.constexpr(4)  # none
MIDDLE = tl.constexpr(5)  # + level: between r and the middle of its aligned block of 2 ** (level + 1) rows
CLOSE = tl.constexpr(9)  # up to r, in its `NEAR` rows
QUARTER = tl.constexpr(10)  # between r and the middle of its half of the chunk
STARTS = tl.constexpr(11)  # + i: after r up to the start of the i-th `NEAR` rows, and less those from there up to r

# And of those of `selections`.
FROM = tl.constexpr(0)  # from r on
HALVES = tl.constexpr(1)  # + level: those in the first half of the block of `MIDDLE` where r is in the second
# then those before r in its `NEAR` rows
ACROSS = tl.constexpr(6)  # those in the first part of its half of the chunk where r is in the second


@cache
def selections(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrices of ones and zeros, [matrices, rows, rows]: of `sum_from`, and the pairs of `rest_pairs`."""
    r, t = _rows_and_columns(rows, device)
    halves = [_halves(r, t, level) for level in range(DEEP.value)]
    near = (r // NEAR.value == t // NEAR.value) & (t < r)
    return torch.stack([t >= r, *halves, near, _halves(r, t, _quarter(rows))]).to(dtype)


@cache
def spans_of(rows: int, device: torch.device) -> Tensor:
    """The matrices that `rounded_sums` multiplies by, over FINE, [matrices, rows, rows] in fp16."""
    r, t = _rows_and_columns(rows, device)
    upto = t <= r
    since, close = ((r // n == t // n) & upto for n in (rows // 2, NEAR.value))
    starts = [
        (((t > r) & (t < start)).float() - ((t <= r) & (t >= start)).float()) for start in range(0, rows, NEAR.value)
    ]
    middle = [_middle(r, t, level) for level in range(DEEP.value)]
    quarter, centre = (_middle(r, t, _quarter(rows) + i) for i in (0, 1))
    out = [upto, ~upto, since, centre, upto & ~upto, *middle, close, quarter, *starts]
    return (torch.stack([x.float() for x in out]) / FINE.value).half()


def _quarter(rows: int) -> int:
    """The level of the blocks that are half a chunk."""
    return rows.bit_length() - 3


def _halves(r: Tensor, t: Tensor, level: int) -> Tensor:
    """Rows t in the first half of the block where r is in the second."""
    return (r >> (level + 1) == t >> (level + 1)) & (r >> level > t >> level)


def _middle(r: Tensor, t: Tensor, level: int) -> Tensor:
    """Rows t between r, in one half of its block, and the middle: with r in the second half, without in the first."""
    return (r >> level == t >> level) & ((t > r) ^ ((r >> level) % 2 == 1))


def _rows_and_columns(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    r = torch.arange(rows, device=device)
    return r[:, None], r[None, :]


@triton.jit
def parts(x):
    """x as a sum of two bf16 tiles, so that 16 bits count.

    Rounded as an integer, since the unit that converts is the one that makes exponentials.
    """
    bits = x.to(tl.int32, bitcast=True)
    coarse = ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return coarse.to(tl.bfloat16), (x - coarse).to(tl.bfloat16)


@triton.jit
def selection(table, which, C: tl.constexpr, COUNT: tl.constexpr = 1):
    """Matrix `which` of the table [C, C], or COUNT of them one above the other."""
    row, col = tl.arange(0, COUNT * C), tl.arange(0, C)
    return tl.load(table + which * (C * C) + row[:, None] * C + col[None, :])


@triton.jit
def above(a, b):
    """Two tiles, a above b."""
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [2 * a.shape[0], a.shape[1]])


@triton.jit
def apart_again(x):
    """The two tiles of `above`."""
    return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), (1, 2, 0)))


@triton.jit
def rounded_sums(select, g, like: tl.constexpr):
    """The sums over the rows that `select` of `spans_of` names, of log2-decays times FINE g [C, B], in fp32.

    Beside 16-bit operands (like) of their first 11 bits, beside fp32 ones of 22.
    """
    coarse = g.to(select.dtype)
    if like == tl.float32:
        fine = tl.dot(select, (g - coarse).to(select.dtype), out_dtype=tl.float32)
        return tl.dot(select, coarse, fine, out_dtype=tl.float32)
    else:
        return tl.dot(select, coarse, out_dtype=tl.float32)


@triton.jit
def spans(select, g, like: tl.constexpr):
    """Sums up to each row, after it, and up to it in its block. In one product: each is waited for."""
    first, second = apart_again(rounded_sums(select, g, like))
    upto, beyond = apart_again(first)
    since, _ = apart_again(second)
    return upto, beyond, since


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
def load_decays(g, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr, TIMES: tl.constexpr = 1.0):
    """log2-decays [C, B], zero past the chunk's rows, TIMES a power of two.

    Loaded as [2, C / 2, B]: tiles of one shape share a layout, and that of 16-bit ones is not one for fp32.
    """
    r = tl.arange(0, 2)[:, None, None] * (C // 2) + tl.arange(0, C // 2)[None, :, None]
    col = col0 + tl.arange(0, B)[None, None, :]
    g += row0.to(tl.int64) * (heads * width) + head * width
    x = tl.load(g + r * (heads * width) + col, mask=(r < rows) & (col < width), other=0.0)
    return tl.maximum(tl.reshape(x, [C, B]) * (LOG2E * TIMES), LEAST * TIMES)


@triton.jit
def reached(since, REST: tl.constexpr, DIRECT: tl.constexpr):
    """One over the decay 2 ** since where that is in REACH. Elsewhere something finite, or with REST zero (all is,
    where exponents do not go so far: not DIRECT)."""
    if REST:
        return tl.exp2(tl.where(since > -REACH, -since, LEAST)) if DIRECT else tl.zeros(since.shape, dtype=tl.float32)
    else:
        return tl.exp2(tl.minimum(-since, REACH))


@triton.jit
def unreached(since, DIRECT: tl.constexpr):
    """One where `reached` is zero."""
    return tl.where(since > -REACH, 0.0, 1.0) if DIRECT else tl.full(since.shape, 1.0, dtype=tl.float32)


@triton.jit
def is_strong(strong, some, at):
    """Whether a key of the chunk and head `at` is out of reach. Where none is, `some`, one number for all, says so."""
    found = tl.load(some)
    if found != 0:
        found = tl.load(strong + at)
    return found != 0


@triton.jit
def found(x):
    """Whether a tile has anything but zeros."""
    return tl.max(tl.max(tl.abs(x), 1), 0) > 0.0


@triton.jit
def tile_is_strong(g, row0, rows, head, heads, width, col0, C: tl.constexpr, B: tl.constexpr):
    """Whether the decay of a block of one tile of a chunk may be beyond reach."""
    block = tl.sum(tl.reshape(load_decays(g, row0, rows, head, heads, width, col0, C, B), [2, C // 2, B]), 1)
    return tl.min(tl.min(block, 1), 0) < 1.0 - REACH  # one less, for sums of rounded decays may be less


@triton.jit
def in_second(C: tl.constexpr):
    """Mask [C, 1] of the rows of the second half."""
    return (tl.arange(0, C) >= C // 2)[:, None]


@triton.jit
def add_scores(score, whole, near, early, later, PRECISION: tl.constexpr):
    """Add one tile of K to the scores of q or e with the keys. Entries above the diagonal are meaningless.

    whole, near: q or e, decayed since the chunk's start and since its block's. early, later: keys of either block.
    """
    return add_product(add_product(score, whole, tl.trans(early), PRECISION), near, tl.trans(later), PRECISION)


@triton.jit
def both(q_, e_, ERASE: tl.constexpr):
    """q above e, whose scores with the keys are one product, or q alone."""
    return above(q_, e_) if ERASE else q_


@triton.jit
def add_rest(
    score, q_, k_, e_, g_, first,
    C: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of K of the pairs whose key is out of reach. Entries above the diagonal are meaningless.

    In loops, for masks of unrolled ones would stay in registers from one tile to the next.
    """
    rest = unreached(rounded_sums(selection(first, SINCE, C), g_, k_.dtype), DIRECT)
    if found(rest):
        keys = (k_ * rest).to(k_.dtype)
        deep = tl.zeros(k_.shape, dtype=k_.dtype)
        reach: tl.constexpr = REACH if DIRECT else 0.0
        for start in tl.range(0, C // NEAR, disable_licm=True):
            decay = rounded_sums(selection(first, STARTS + start, C), g_, k_.dtype)
            block = (tl.arange(0, C) // NEAR - start)[:, None]
            ours = block == 0
            deep = tl.where(ours & (decay >= reach), keys, deep)
            down = tl.exp2(tl.where(ours, -decay, LEAST))
            up = tl.exp2(tl.where((block < 0) | (ours & (decay < reach)), decay, LEAST))
            x = both((q_ * down).to(q_.dtype), (e_ * down).to(q_.dtype), ERASE)
            score = add_product(score, x, tl.trans((keys * up).to(x.dtype)), PRECISION)
        if found(deep):
            score = add_deep(score, q_, deep, e_, g_, first, C, RANK, ERASE, PRECISION)
    return score


@triton.jit
def add_deep(
    score, q_, k_, e_, g_, first, C: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the pairs of one token, and those of the halves of 2, 4, 8 and 16, decayed from the middle between them."""
    r = tl.arange(0, score.shape[0]) % C
    s = tl.arange(0, C)
    for step in tl.range(0, DEEP + 1, disable_licm=True):
        f = tl.exp2(rounded_sums(selection(first, ITSELF + step, C), g_, k_.dtype))
        level = tl.maximum(step - 1, 0)
        size = tl.where(step == 0, RANK, 1 << level)
        half = s // size
        apart = size >= RANK if NEAR % RANK == 0 else True  # or halves of this size are inside a token
        partner = tl.where(step == 0, half, tl.where((half % 2 == 0) & apart, half + 1, -1))
        x = both((q_ * f).to(q_.dtype), (e_ * f).to(q_.dtype), ERASE)
        pairs = product(x, tl.trans((k_ * f).to(q_.dtype)), PRECISION)
        score += tl.where((r // size)[:, None] == partner[None, :], pairs, 0.0)
    return score


@triton.jit
def channel_scores_kernel(
    q, k, e, g, diag, first,  # inputs
    qg, eg, kt, decay, scores, solved, strong, some,  # outputs
    chunk_row, chunk_rows,
    H: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, HS: tl.constexpr, K: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, DIAG: tl.constexpr,
    REST: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Scores, inverse and decayed operands of one (chunk, head of the scores).

    `decay` [P, Hs, K] is the whole chunk's decay; qg, eg and kt [T, Hs, K] are gamma * q, gamma * e and tail * k. The
    first launch writes to `strong` [P, Hs] where a key is out of reach, and to `some` [1], zero before, if any is; its
    scores are right elsewhere. The second, REST, then does those again.
    """
    chunk = tl.program_id(0) // HS
    head = tl.program_id(0) % HS
    if REST and DIRECT:  # noqa: SIM102 - a condition on its own, so that it is gone from the other variants
        if not is_strong(strong, some, tl.program_id(0)):
            return
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    hk = head // (HS // H)
    operand: tl.constexpr = k.dtype.element_ty
    inside = tl.zeros([C, C], dtype=tl.float32)
    score = tl.zeros([2 * C if ERASE else C, C], dtype=tl.float32)  # of q, and below it of e
    least = tl.zeros([C], dtype=tl.float32)
    second = in_second(C)
    select = selection(first, UPTO, C, 4)
    for col0 in range(0, K, B):
        g_ = load_decays(g, row0, rows, head // (HS // HG), HG, K, col0, C, B, FINE)
        q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
        k_ = load_rows(k, row0, rows, hk, H, K, col0, C, B)
        if ERASE:
            e_ = load_rows(e, row0, rows, head // (HS // HE), HE, K, col0, C, B)
        upto, beyond, since = spans(select, g_, operand)
        gamma, down, up = tl.exp2(upto), tl.exp2(since), reached(since, REST, DIRECT)
        if not REST:
            least = tl.minimum(least, tl.min(since, 1))
        if NEAR % RANK != 0:
            inside += product(q_, tl.trans(k_), PRECISION)
        early, later = (k_ * tl.where(second, 0.0, up)).to(operand), (k_ * tl.where(second, up, 0.0)).to(operand)
        whole, near = (q_ * gamma).to(operand), (q_ * down).to(operand)
        if ERASE:
            x = (e_ * gamma).to(operand)
        if not (REST and DIRECT):  # else the first launch has made them
            store_rows(kt, k_ * tl.exp2(beyond), row0, rows, head, HS, K, col0, C, B)
            store_rows(qg, whole, row0, rows, head, HS, K, col0, C, B)
            if ERASE:
                store_rows(eg, x, row0, rows, head, HS, K, col0, C, B)
            last = (tl.arange(0, C) == C - 1)[:, None]
            col = col0 + tl.arange(0, B)[None, :]
            at = decay + (chunk.to(tl.int64) * HS + head) * K + tl.zeros([C, 1], dtype=tl.int32) + col
            tl.store(at, gamma, mask=last & (col < K))
        if ERASE:
            whole, near = above(whole, x), above(near, (e_ * down).to(operand))
        if DIRECT:
            score = add_scores(score, whole, near, early, later, PRECISION)
    if REST:
        for col0 in tl.range(0, K, B, num_stages=1, disable_licm=True):
            g_ = load_decays(g, row0, rows, head // (HS // HG), HG, K, col0, C, B, FINE)
            q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
            k_ = load_rows(k, row0, rows, hk, H, K, col0, C, B)
            e_ = load_rows(e, row0, rows, head // (HS // HE), HE, K, col0, C, B) if ERASE else q_
            g_ = g_ if operand == tl.float32 else g_.to(first.dtype.element_ty)
            score = add_rest(score, q_, k_, e_, g_, first, C, RANK, ERASE, DIRECT, PRECISION)
    else:
        beyond_reach = tl.min(least, 0) <= -REACH
        tl.store(strong + tl.program_id(0), tl.where(beyond_reach, 1, 0))
        tl.store(some, 1, mask=beyond_reach)
    aqk, t = apart_again(score) if ERASE else (score, score)
    r = tl.arange(0, C)
    token = same_token(C, RANK)
    earlier = (r[:, None] > r[None, :]) & (token == 0)
    # Pairs inside one token have no decay between them.
    own = aqk if NEAR % RANK == 0 else inside
    if DIAG:
        own = own * tl.load(diag + (row0 + r).to(tl.int64) * HS + head, mask=r < rows, other=0.0)[None, :]
    aqk = tl.where(token, own, tl.where(earlier, aqk, 0.0))
    store_square(scores, aqk, chunk, head, HS, C, 16 % RANK != 0)
    if ERASE:
        t = tl.where(earlier, t, 0.0)
        store_square(solved, invert(t, C, SOLVE), chunk, head, HS, C, False)


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
def diagonal(base, C: tl.constexpr, N: tl.constexpr):
    """The blocks of N rows on the diagonal of a matrix of `square`, [C / N, N, N]."""
    i, j = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    block = tl.arange(0, C // N)[:, None, None]
    return tl.load(base + block * (N * (C + 1)) + i * C + j, mask=i // 16 >= j // 16, other=0.0)


@triton.jit
def in_blocks(x, N: tl.constexpr):
    """A tile of rows as blocks of N of them."""
    return tl.reshape(x, [x.shape[0] // N, N, x.shape[1]])


@triton.jit
def add_pairs(
    dq, de, dk, q_, k_, e_, fq, fk, daqk, dt, selected,
    C: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients [C, B] of q, e and k from the `selected` pairs in blocks of N rows, weighted by fq and fk."""
    operand: tl.constexpr = k_.dtype
    kf = in_blocks((k_ * fk).to(operand), N)
    pairs = diagonal(selected, C, N)
    if RANK > 1:
        token = in_blocks(tl.arange(0, C)[:, None] // RANK, N)
        pairs = tl.where(token == tl.trans(token, (0, 2, 1)), 0.0, pairs).to(operand)
    x = diagonal(daqk, C, N) * pairs
    dq += fq * tl.reshape(product(x, kf, PRECISION), dq.shape)
    near = product(tl.trans(x, (0, 2, 1)), in_blocks((q_ * fq).to(operand), N), PRECISION)
    if ERASE:
        x = diagonal(dt, C, N) * pairs
        de += fq * tl.reshape(product(x, kf, PRECISION), de.shape)
        near = add_product(near, tl.trans(x, (0, 2, 1)), in_blocks((e_ * fq).to(operand), N), PRECISION)
    dk += fk * tl.reshape(near, dk.shape)
    return dq, de, dk


@triton.jit
def rest_pairs(
    dq, de, dk, q_, k_, e_, g_, rest, daqk, dt, table, first,
    C: tl.constexpr, RANK: tl.constexpr, ERASE: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients [C, B] of q, e and k from the pairs of one half that the chunk's middle does not reach.

    In `NEAR` rows those whose key is reached from their start, and of the others those of the halves of 2, 4, 8 and 16
    rows. Then those of the two parts of a half.
    """
    second = in_second(C)
    of_q, of_k = tl.where(second, 1.0, rest), tl.where(second, rest, 1.0)
    deep = unreached(rounded_sums(selection(first, CLOSE, C), g_, k_.dtype), DIRECT)
    for level in tl.range(tl.where(found(deep), 0, DEEP), DEEP + 1 if DIRECT else DEEP, disable_licm=True):
        decay = rounded_sums(selection(first, MIDDLE + level, C), g_, k_.dtype)
        fk = tl.where(level == DEEP, reached(decay, True, True), tl.exp2(decay) * deep)
        dq, de, dk = add_pairs(
            dq, de, dk, q_, k_, e_, tl.exp2(decay) * of_q, fk * of_k, daqk, dt, table + (HALVES + level) * (C * C),
            C, NEAR, RANK, ERASE, PRECISION
        )  # fmt: skip
    if C // 2 > NEAR:
        f = tl.exp2(rounded_sums(selection(first, QUARTER, C), g_, k_.dtype))
        dq, de, dk = add_pairs(
            dq, de, dk, q_, k_, e_, f * of_q, f * of_k, daqk, dt, table + ACROSS * (C * C),
            C, C // 2, RANK, ERASE, PRECISION
        )  # fmt: skip
    return dq, de, dk


@triton.jit
def sum_from(x, table, C: tl.constexpr):
    """Sums of each row and those after it [C, B]."""
    if table.dtype.element_ty == tl.bfloat16:
        coarse, fine = parts(x)
        select = selection(table, FROM, C)
        return tl.dot(select, coarse, tl.dot(select, fine, out_dtype=tl.float32), out_dtype=tl.float32)
    else:  # products of gradients leave the exponents of fp16
        return tl.cumsum(x, 0, reverse=True)


@triton.jit
def channel_inputs_kernel(
    q, k, e, g, do, dz, written, states, dstates, daqk, dt, own, table, first, strong, some,  # inputs
    dq, dk, de, dg,  # outputs [T, Hv, K]
    chunk_row, chunk_rows,
    H: tl.constexpr, HE: tl.constexpr, HG: tl.constexpr, HS: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RANK: tl.constexpr, ERASE: tl.constexpr, REST: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs on the key side for one (chunk, value head, tile of K).

    Every use of a decay is weighted by its own gradient, so dg is a sum over the rows on the far side of each gate:
    reads and erasures after it count up, writes after it count down, and what reaches the chunk's end counts once.
    Decays between rows are anchored in the middle of the chunk. REST launches do the tiles with a row out of reach from
    there, others the rest.
    """
    tiles: tl.constexpr = (K + B - 1) // B
    chunk = tl.program_id(0) // (HV * tiles)
    head = tl.program_id(0) // tiles % HV
    col0 = tl.program_id(0) % tiles * B
    row0 = tl.load(chunk_row + chunk)
    rows = tl.load(chunk_rows + chunk)
    hk = head // (HV // H)
    operand: tl.constexpr = k.dtype.element_ty
    if DIRECT:
        beyond = is_strong(strong, some, chunk * HS + head // (HV // HS))
        if beyond:
            beyond = tile_is_strong(g, row0, rows, head // (HV // HG), HG, K, col0 // TILE * TILE, C, TILE)
        if beyond != REST:
            return
    second = in_second(C)
    dq_, de_, dk_, dwhole = through_state(
        do, dz, written, states, dstates, row0, rows, chunk, head, col0, HV, K, V, B, BV, C, ERASE, PRECISION
    )
    k_ = load_rows(k, row0, rows, hk, H, K, col0, C, B)
    g_ = load_decays(g, row0, rows, head // (HV // HG), HG, K, col0, C, B, FINE)
    gamma = tl.exp2(rounded_sums(selection(first, UPTO, C), g_, k_.dtype))
    dq_ *= gamma
    de_ *= gamma
    dk_ *= tl.exp2(rounded_sums(selection(first, BEYOND, C), g_, k_.dtype))
    # The decay of the whole chunk counts once for every gate, as if its last row had read it.
    last = (tl.arange(0, C) == C - 1)[:, None]
    kept = tl.sum(k_ * dk_ + tl.where(last, gamma * dwhole[None, :], 0.0), 0)
    middle = rounded_sums(selection(first, CENTRE, C), g_, k_.dtype)
    down, up = tl.exp2(middle), reached(middle, REST, DIRECT)
    fq, fk = tl.where(second, down, up), tl.where(second, up, down)
    q_ = load_rows(q, row0, rows, hk, H, K, col0, C, B)
    kf = (k_ * fk).to(operand)
    x = load_square(daqk, chunk, head, HV, C, 16 % RANK != 0)
    if REST and RANK > 1:
        x = tl.where(same_token(C, RANK), 0.0, x).to(operand)
    dq_ += fq * product(x, kf, PRECISION)
    near = product(tl.trans(x), (q_ * fq).to(operand), PRECISION)
    e_ = q_
    if ERASE:
        e_ = load_rows(e, row0, rows, head // (HV // HE), HE, K, col0, C, B)
        x = load_square(dt, chunk, head, HV, C, False)
        de_ += fq * product(x, kf, PRECISION)
        near = tl.dot(tl.trans(x), (e_ * fq).to(operand), near, input_precision=PRECISION)
    dk_ += fk * near
    if REST:
        square = (chunk.to(tl.int64) * HV + head) * (C * C)
        dq_, de_, dk_ = rest_pairs(
            dq_, de_, dk_, q_, k_, e_, g_, unreached(middle, DIRECT), daqk + square, dt + square, table, first,
            C, RANK, ERASE, DIRECT, PRECISION
        )  # fmt: skip
    counted = q_ * dq_ - k_ * dk_
    if ERASE:
        counted += e_ * de_
        store_rows(de, de_, row0, rows, head, HV, K, col0, C, B)
    # A gate of row t lies before the reads of rows r >= t, and inside the tails of rows s < t: `kept` in all, less
    # those from t on, which `counted` has.
    store_rows(dg, sum_from(counted, table, C) + kept[None, :], row0, rows, head, HV, K, col0, C, B)
    # Pairs inside one token have no decay between them.
    if RANK == 1:
        own_ = tl.load(own + (chunk.to(tl.int64) * HV + head) * C + tl.arange(0, C))[:, None]
        dq_ += own_ * k_
        dk_ += own_ * q_
    elif REST:
        x = load_square(daqk, chunk, head, HV, C, 16 % RANK != 0)
        x = tl.where(same_token(C, RANK), x, 0.0).to(operand)
        dq_ += product(x, k_, PRECISION)
        dk_ += product(tl.trans(x), q_, PRECISION)
    store_rows(dq, dq_, row0, rows, head, HV, K, col0, C, B)
    store_rows(dk, dk_, row0, rows, head, HV, K, col0, C, B)
