"""The operator as one autograd function over the kernels of `forward` and `backward`.

The forward pass keeps its inputs and the states at segment boundaries; the backward pass runs the forward kernels again
for everything else. Nothing is added atomically, so repeats are bit-identical.

Axes: N sequences, T rows, P chunks, Ns segments, C rows a chunk, H key heads, Hv value heads, Hs heads of the scores
(H where e and g come per key head, else Hv), K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from gdn2.kernels.contract import SOLVE, SPLIT, Rows
from gdn2.kernels.triton import backward, channel, forward, tuning
from gdn2.kernels.triton.segments import Layout, layout
from gdn2.kernels.triton.tuning import Launch

DECAYS = {"none": 0, "head": 1, "channel": 2}
WIDEST = 256


def delta_rule(rows: Rows, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [T, Hv, V] of all packed rows and the last states [N, Hv, K, V] fp32, differentiable in every input.

    They start from `state`, None being the zero state.

    Raises:
        ValueError: fp64 inputs, key and value widths above 256, or more than 64 rows a token.
    """
    if rows.z.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the triton implementation takes float32, float16 or bfloat16, got {rows.z.dtype}")
    if max(rows.k.shape[-1], rows.z.shape[-1]) > WIDEST:
        raise ValueError(f"the triton implementation takes K and V up to {WIDEST}, got {list(rows.states[-2:])}")
    if rows.rank > tuning.LONGEST_TOKEN:
        raise ValueError(
            f"the triton implementation takes up to {tuning.LONGEST_TOKEN} rows a token, got rank {rows.rank}"
        )
    if rows.z.shape[0] == 0:
        return rows.z, rows.z.new_zeros(rows.states, dtype=torch.float32) if state is None else state
    o, last = _DeltaRule.apply(
        rows.q, rows.k, rows.e, rows.z, rows.g, rows.diag, state, rows.lengths, rows.rank, SPLIT.get(), SOLVE.get()
    )
    return o, last


@dataclass(frozen=True)
class _Call:
    """Contiguous inputs of one call, and what follows from their shapes."""

    q: Tensor
    k: Tensor
    e: Tensor | None
    z: Tensor
    g: Tensor | None
    diag: Tensor | None
    lengths: tuple[int, ...]
    rank: int
    split: bool  # whether a long sequence may be run in segments, side by side
    solve: str | None  # precision of the products inside the triangular inverse, None being the plan's

    @cached_property
    def decay(self) -> str:
        return "none" if self.g is None else "channel" if self.g.ndim == 3 else "head"

    @cached_property
    def plan(self) -> tuning.Plan:
        return tuning.plan(self.z.device, self.value_heads, self.key, self.value, self.decay, self.z.dtype, self.rank)

    @property
    def chunk(self) -> int:
        return tuning.chunk(self.z.dtype, self.rank)

    @cached_property
    def layout(self) -> Layout:
        step = self.chunk - self.chunk % self.rank
        return layout(self.lengths, step, self.plan.segment if self.split else 0, self.z.device)

    def launches(self, weak: Launch, strong: Launch) -> tuple[Launch, ...]:
        """Of a kernel of `channel`: chunks within reach and those beyond, or all of them the latter way."""
        return (weak, strong) if self.direct else (strong,)

    @property
    def selections(self) -> Tensor:
        return channel.selections(self.chunk, self.z.dtype, self.z.device)

    @property
    def spans(self) -> Tensor:
        return channel.spans_of(self.chunk, self.z.device)

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def value_heads(self) -> int:
        return self.z.shape[1]

    @property
    def key(self) -> int:
        return self.k.shape[2]

    @property
    def value(self) -> int:
        return self.z.shape[2]

    @property
    def erase_heads(self) -> int:
        return self.heads if self.e is None else self.e.shape[1]

    @property
    def decay_heads(self) -> int:
        return self.heads if self.g is None else self.g.shape[1]

    @property
    def score_heads(self) -> int:
        return self.value_heads if self.diag is not None else max(self.erase_heads, self.decay_heads)

    @property
    def direct(self) -> bool:
        """Whether the operands' exponents reach far enough to divide by a decay; those of fp16 do not."""
        return self.z.dtype != torch.float16

    def states(self, count: int, width: int | None = None) -> Tensor:
        """Room for `count` states [count, Hv, K, V], or with `width` in place of V, fp32."""
        shape = (count, self.value_heads, self.key, self.value if width is None else width)
        return self.z.new_empty(shape, dtype=torch.float32)

    @property
    def dense(self) -> bool:
        """Whether a token's rows may lie on both sides of a multiple of 16."""
        return 16 % self.rank != 0

    @property
    def precision(self) -> str:
        return self.plan.precision


@dataclass(frozen=True)
class _Operands:
    """What `scores_kernel` leaves for the kernels that carry the state; q, k and e are decayed or raw."""

    q: Tensor
    k: Tensor
    e: Tensor
    decay: Tensor
    tails: Tensor  # [P, Hs, C], or where decay per channel is `strong` [P, Hs]
    some: Tensor  # [1], meant with `strong` only
    scores: Tensor  # [P, Hs, C, C]
    solved: Tensor  # [P, Hs, C, C]

    @property
    def heads(self) -> dict[str, int]:
        return {"HQ": self.q.shape[1], "HK": self.k.shape[1], "HE": self.e.shape[1], "HS": self.scores.shape[1]}


def _scores(call: _Call) -> _Operands:
    t, hs, p = call.z.shape[0], call.score_heads, call.layout.chunks
    new = call.z.new_empty
    scores = new(p, hs, call.chunk, call.chunk)
    solved = new(p, hs, call.chunk, call.chunk) if call.e is not None else scores
    e = call.k if call.e is None else call.e
    variant = {
        "H": call.heads, "HE": call.erase_heads, "HG": call.decay_heads, "HS": hs, "K": call.key, "C": call.chunk,
        "RANK": call.rank, "ERASE": call.e is not None, "DIAG": call.diag is not None, "PRECISION": call.precision,
        "SOLVE": call.solve or call.plan.solve,
    }  # fmt: skip
    inputs = (call.q, call.k, e, _or(call.g, call.q), _or(call.diag, call.q))
    chunks = (call.layout.chunk_row, call.layout.chunk_rows)
    if call.decay == "channel":
        qg, kt = new(t, hs, call.key), new(t, hs, call.key)
        eg = new(t, hs, call.key) if call.e is not None else kt
        decay = new(p, hs, call.key, dtype=torch.float32)
        strong, some = new(p, hs, dtype=torch.int32), call.z.new_zeros(1, dtype=torch.int32)
        for how in call.launches(call.plan.scores, call.plan.strong_scores):
            channel.channel_scores_kernel[(p * hs,)](
                *inputs, call.spans, qg, eg, kt, decay, scores, solved, strong, some, *chunks,
                **variant, B=how.tile, REST=how is call.plan.strong_scores, DIRECT=call.direct, **how.options,
            )  # fmt: skip
        return _Operands(qg, kt, eg, decay, strong, some, scores, solved)
    decay, tails = scores, scores
    if call.g is not None:
        decay, tails = (new(p, hs, call.chunk, dtype=torch.float32) for _ in range(2))
    forward.scores_kernel[(p * hs,)](
        *inputs, decay, tails, scores, solved, *chunks, **variant, B=call.plan.scores.tile,
        DECAY=DECAYS[call.decay], **call.plan.scores.options,
    )  # fmt: skip
    return _Operands(call.q, call.k, e, decay, tails, tails, scores, solved)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer the kernel never follows where an input is missing."""
    return other if x is None else x


def _carry(
    call: _Call, ops: _Operands, initial: Tensor | None, *, o: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None, transition: Tensor | None = None, apart: bool = False,
) -> Tensor:  # fmt: skip
    """Run the state through every segment and return the final states [Ns, Hv, K, V].

    They start from `initial`, None being nothing. With `transition` [Ns, Hv, K, K], which is filled, they start from
    nothing, and are only found where `apart`: then for all but the last segments, else transitions alone for all but
    the first.
    """
    how, table = call.plan.state, call.layout
    tile = how.tile if transition is None else min(how.tile, max(16, triton.next_power_of_2(call.key)))
    tiles = -(-call.value // tile) if transition is None or apart else 0
    tiles += 0 if transition is None else -(-call.key // tile)
    final = call.states(table.segments)
    written, states = kept if kept is not None else (final if transition is None else transition, final)
    chosen = table.longest if transition is None else table.but_last if apart else table.but_first
    forward.carry_kernel[(chosen.shape[0] * call.value_heads * tiles,)](
        ops.q, ops.k, ops.e, call.z, ops.decay, ops.tails, ops.scores, ops.solved, _or(initial, call.z),
        _or(o, call.z), written, states, final, table.segment_row, table.segment_end, table.segment_chunk, chosen,
        **ops.heads, HV=call.value_heads, K=call.key, V=call.value, BK=max(16, triton.next_power_of_2(call.key)),
        BV=tile, C=call.chunk, STEP=table.step, DECAY=DECAYS[call.decay], ERASE=call.e is not None,
        START=initial is not None, OUTPUT=o is not None, STORE=kept is not None, TRANSITION=transition is not None,
        APART=apart, DENSE=call.dense, PRECISION=call.precision, **how.options,
    )  # fmt: skip
    return final


def _merge(call: _Call, transitions: Tensor, added: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """States at the near side of every segment [Ns, Hv, K, V] from those at the sequences' starts (or ends)."""
    starts = torch.empty_like(added)
    table = call.layout
    bk = max(16, triton.next_power_of_2(call.key))
    forward.merge_kernel[(len(call.lengths) * call.value_heads * -(-call.value // 16),)](
        transitions, added, _or(initial, added), starts, table.first, table.count,
        HV=call.value_heads, K=call.key, V=call.value, BK=bk, BV=16, INNER=bk if bk <= 128 else 64,
        START=initial is not None, BACKWARD=reverse,
        PRECISION="tf32x3", num_warps=8, num_stages=3 if bk <= 128 else 1, enable_fp_fusion=True,
    )  # fmt: skip
    return starts


def _reverse(
    call: _Call, ops: _Operands, do: Tensor, dfinal: Tensor, kept: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Run the state's gradient back through every segment from `dfinal` [Ns, Hv, K, V] to the segment's start.

    Without `kept` the first segments are left out.
    """
    how, table = call.plan.state, call.layout
    chosen = table.longest if kept is not None else table.but_first
    dinitial = torch.empty_like(dfinal)
    dz, dstates = kept if kept is not None else (do, do)
    backward.reverse_kernel[(chosen.shape[0] * call.value_heads * -(-call.value // how.tile),)](
        ops.q, ops.k, ops.e, ops.decay, ops.tails, ops.scores, ops.solved, do, dfinal, dz, dstates, dinitial,
        table.segment_row, table.segment_end, table.segment_chunk, chosen,
        **ops.heads, HV=call.value_heads, K=call.key, V=call.value, BK=max(16, triton.next_power_of_2(call.key)),
        BV=how.tile, C=call.chunk, STEP=table.step, DECAY=DECAYS[call.decay], ERASE=call.e is not None,
        STORE=kept is not None, DENSE=call.dense, PRECISION=call.precision, **how.options,
    )  # fmt: skip
    return dinitial


def _pairs(
    call: _Call, do: Tensor, dz: Tensor, written: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Gradients of the scores and of T [P, Hv, C, C] and of rows with themselves [P, Hv, C], and of diag."""
    p, hv = call.layout.chunks, call.value_heads
    how = call.plan.pairs
    daqk = torch.empty(p, hv, call.chunk, call.chunk, dtype=call.z.dtype, device=call.z.device)
    dt = torch.empty_like(daqk) if call.e is not None else daqk
    own = torch.empty(p, hv, call.chunk, dtype=torch.float32, device=call.z.device)
    ddiag = None if call.diag is None else torch.empty_like(call.diag, dtype=torch.float32)
    backward.pairs_kernel[(p * hv,)](
        call.q, call.k, _or(call.g, call.q), _or(call.diag, call.q), do, dz, written, daqk, dt, own,
        _or(ddiag, call.q),
        call.layout.chunk_row, call.layout.chunk_rows,
        H=call.heads, HG=call.decay_heads, HV=hv, K=call.key, V=call.value, BK=32, BV=how.tile, C=call.chunk,
        RANK=call.rank, DECAY=DECAYS[call.decay], ERASE=call.e is not None, DIAG=call.diag is not None,
        PRECISION=call.precision, **how.options,
    )  # fmt: skip
    return (daqk, dt, own), ddiag


def _input_gradients(
    call: _Call, ops: _Operands, do: Tensor, dz: Tensor, written: Tensor, states: Tensor, dstates: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, e and g in their own shapes."""
    t, hv, plan = call.z.shape[0], call.value_heads, call.plan

    def empty(heads: int) -> Tensor:
        # Grouped heads are written apart in fp32 and summed in a fixed order afterwards.
        return call.z.new_empty(t, hv, call.key, dtype=call.z.dtype if heads == hv else torch.float32)

    dq, dk, de = empty(call.heads), empty(call.heads), empty(call.erase_heads)
    inputs = (call.q, call.k, _or(call.e, call.q), _or(call.g, call.q), do, dz, written, states, dstates, *pairs[:2])
    variant = {
        "H": call.heads, "HE": call.erase_heads, "HG": call.decay_heads, "HV": hv, "K": call.key, "V": call.value,
        "C": call.chunk, "ERASE": call.e is not None, "PRECISION": call.precision,
    }  # fmt: skip
    chunks = (call.layout.chunk_row, call.layout.chunk_rows)
    dg = dq
    if call.decay == "channel":
        dg = call.z.new_empty(t, hv, call.key, dtype=torch.float32)
        for how in call.launches(plan.inputs, plan.strong_inputs):
            channel.channel_inputs_kernel[(call.layout.chunks * hv * -(-call.key // how.tile),)](
                *inputs, pairs[2], call.selections, call.spans, ops.tails, ops.some, dq, dk, de, dg, *chunks, **variant,
                HS=call.score_heads, B=how.tile, TILE=plan.inputs.tile, BV=how.inner, RANK=call.rank,
                REST=how is plan.strong_inputs, DIRECT=call.direct, **how.options,
            )  # fmt: skip
    else:
        tiles = -(-call.key // plan.inputs.tile)
        if call.g is not None:
            dg = call.z.new_empty(tiles, t, hv, dtype=torch.float32)
        backward.inputs_kernel[(call.layout.chunks * hv * tiles,)](
            *inputs, dq, dk, de, dg, *chunks, t, **variant, B=plan.inputs.tile, BV=plan.inputs.inner,
            DECAY=DECAYS[call.decay], DENSE=call.dense, **plan.inputs.options,
        )  # fmt: skip
    if call.decay == "head":
        dg = dg.sum(0)
    return (
        _per_head(dq, call.heads),
        _per_head(dk, call.heads),
        None if call.e is None else _per_head(de, call.erase_heads),
        None if call.g is None else _per_head(dg, call.decay_heads),
    )


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Sum gradients [T, Hv, ...] over the value heads of each of `heads` groups."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _spread(call: _Call) -> _Call:
    """The call with decay per head written out per channel, where the plan says so."""
    if call.g is None or not call.plan.spread:
        return call
    return replace(call, g=call.g[..., None].expand(*call.g.shape, call.key).contiguous())


class _DeltaRule(torch.autograd.Function):
    """q, k, e, z, g, diag, state, lengths, rank, split, solve -> o, last."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, e, z, g, diag, state, lengths, rank, split, solve = args
        dtypes = [None if x is None else x.dtype for x in (q, k, e, z, g, diag, state)]
        q, k = q.to(z.dtype).contiguous(), k.to(z.dtype).contiguous()
        e = None if e is None else e.to(z.dtype).contiguous()
        g, diag = (None if x is None else x.float().contiguous() for x in (g, diag))
        call = _spread(_Call(q, k, e, z.contiguous(), g, diag, lengths, rank, split, solve))
        state = None if state is None else state.contiguous()
        with torch.cuda.device_of(z):
            ops = _scores(call)
            starts = state
            if call.layout.split:
                transitions = call.states(call.layout.segments, call.key)
                added = _carry(call, ops, state, transition=transitions, apart=True)
                starts = _merge(call, transitions, added, state, reverse=False)
            o = torch.empty_like(call.z)
            last = _carry(call, ops, starts, o=o)
        ctx.save_for_backward(call.q, call.k, call.e, call.z, call.g, call.diag, starts)
        ctx.lengths, ctx.rank, ctx.split, ctx.solve, ctx.dtypes = lengths, rank, split, solve, dtypes
        ctx.spread = call.g is not g
        return o, last[call.layout.last] if call.layout.split else last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, e, z, g, diag, starts = ctx.saved_tensors
        call = _Call(q, k, e, z, g, diag, ctx.lengths, ctx.rank, ctx.split, ctx.solve)
        do, dlast = grads[0].contiguous(), grads[1].contiguous()
        p, hv = call.layout.chunks, call.value_heads
        with torch.cuda.device_of(z):
            ops = _scores(call)
            written, dz = torch.empty_like(z), torch.empty_like(z)
            states, dstates = (z.new_empty(p, hv, call.key, call.value) for _ in range(2))
            _carry(call, ops, starts, kept=(written, states))
            ends = dlast
            if call.layout.split:
                transitions = call.states(call.layout.segments, call.key)
                _carry(call, ops, starts, transition=transitions)
                added = _reverse(call, ops, do, torch.zeros_like(starts))
                ends = _merge(call, transitions, added, dlast, reverse=True)
            dstarts = _reverse(call, ops, do, ends, kept=(dz, dstates))
            pairs, ddiag = _pairs(call, do, dz, written)
            dq, dk, de, dg = _input_gradients(call, ops, do, dz, written, states, dstates, pairs)
        if ctx.spread and dg is not None:
            dg = dg.sum(-1)
        dstate = dstarts[call.layout.first] if call.layout.split else dstarts
        found = (dq, dk, de, dz, dg, ddiag, dstate)
        cast = [None if x is None or t is None else x.to(t) for x, t in zip(found, ctx.dtypes, strict=True)]
        return *cast, None, None, None, None
