"""The one operator behind every mixer, in three implementations.

    S'  = Diag(exp g_t) S_{t-1};   S_t = S' + k_t (z_t - S'^T e_t)^T;   o_t = S_t^T q_t    (arXiv 2605.22791, Eq. 9-10)

Axes: B batch, T rows, N sequences, H key heads, Hv value heads, K key width, V value width, R rows a token (rank).
Gates are folded in before the operator (e = b * k, z = w * v), so one forward, one backward and one decoding step
serve every mixer. The state is fp32 (fp64 when the inputs are).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdn2.kernels import dispatch
from gdn2.kernels.contract import packed, solve_precision
from gdn2.kernels.dispatch import Implementation, choose
from gdn2.kernels.tokens import check_state_dtype
from gdn2.kernels.watch import WATCHER

__all__ = ["Implementation", "choose", "delta_rule", "delta_step", "delta_tokens", "solve_precision"]


def delta_rule(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None,
    state: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None, *,
    diag: Tensor | None = None, rank: int = 1, implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence over all rows and return every output and the last states.

    Args:
        q: queries, already scaled                                        [B, T, H, K]
        k: write direction; unit norm unless e is None                    [B, T, H, K]
        e: erase direction, e.g. b * k; None never erases                 [B, T, H or Hv, K]
        z: value to store, e.g. w * v                                     [B, T, Hv, V], Hv a multiple of H
        g: log-decay, fp32, <= 0; -inf forgets at once; None keeps all    [B, T, H or Hv, K] or [B, T, H or Hv]
        state: S_0; None is the zero state                                [N, Hv, K, V]
        cu_seqlens: boundaries of N packed sequences, empty ones included, rising from 0 to T (then B is 1); plain
            integers save waiting for the device                           [N + 1]
        diag: factor on a token's own write in its own output (Mamba-3: lambda_t dt_t / c_t)   [B, T, Hv]
        rank: rows a token; the rows of one token see each other (Mamba-3 MIMO). g is zero on rows 2..R, e is None.
        implementation: "reference", "torch" or "triton"; None chooses from the device.

    Returns:
        o [B, T, Hv, V] in z's dtype, and S_T [N, Hv, K, V] in fp32 (fp64 for fp64 inputs). `solve_precision` chooses
        the precision of the inverse inside each chunk.

    Raises:
        ValueError: shapes or dtypes that do not fit; the message names the axis.
    """
    rows = packed(q, k, e, z, g, diag, cu_seqlens, rank)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if state is not None and tuple(state.shape) != rows.states:
        raise ValueError(f"state must be [N, Hv, K, V] = {list(rows.states)}, got {list(state.shape)}")
    run = dispatch.rule(choose(z.device, implementation, z.dtype))
    o, last = run(rows, None if state is None else state.to(dtype), dtype)
    if (watcher := WATCHER.get()) is not None:
        watcher.rule(rows, z.new_zeros(rows.states, dtype=dtype) if state is None else state, last)
    return o.to(z.dtype).reshape(z.shape), last


def delta_step(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None, state: Tensor, slots: Tensor | None = None,
    *, diag: Tensor | None = None, rank: int = 1, implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """One token for each of N sequences, each with its own state in a pool that moves on in place.

    Args:
        q, k: [N, H, K]; e: [N, H or Hv, K] or None; z: [N, Hv, V]; g: [N, H or Hv, K], [N, H or Hv] or None. With
            `rank` R there are R rows a token, one after the other: N R in place of N.
        state: the pool, fp32; bf16 on request, refused for decays it cannot follow   [P, Hv, K, V]
        slots: which state belongs to each sequence, each at most once; -1 is an idle row, whose output is zero   [N];
            None is 0, 1, 2, ...
        diag, rank, implementation: as in `delta_rule`.

    Returns:
        o [N, Hv, V] in z's dtype. A row's result does not depend on the others. With "triton" nothing waits for the
        device, so the call can be captured in a CUDA graph.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        UserError: a bf16 state with log-decays above -2^-8 (checked outside graph capture).
    """
    return _tokens(q, k, e, z, g, state, None, slots, diag, rank, implementation)


def delta_tokens(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None, state: Tensor,
    cu_seqlens: Tensor, slots: Tensor | None = None,
    *, diag: Tensor | None = None, rank: int = 1, implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """A few tokens for each of N sequences in packed rows, as many calls of `delta_step` would; best up to 64 tokens.

    Args:
        q, k, e, z, g, state, slots, diag, rank, implementation: as in `delta_step`, T rows of all sequences together.
        cu_seqlens: boundaries of the sequences, rising from 0 to T; empty ones are allowed   [N + 1]

    Returns:
        o [T, Hv, V] in z's dtype.
    """
    return _tokens(q, k, e, z, g, state, cu_seqlens, slots, diag, rank, implementation)


def _tokens(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None, state: Tensor, cu_seqlens: Tensor | None,
    slots: Tensor | None, diag: Tensor | None, rank: int, implementation: Implementation | None,
) -> Tensor:  # fmt: skip
    q_, k_, e_, z_, g_, diag_ = (None if x is None else x[None] for x in (q, k, e, z, g, diag))
    assert q_ is not None and k_ is not None and z_ is not None
    rows = packed(q_, k_, e_, z_, g_, diag_, None, rank)
    n = q.shape[0] // rank if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = [z.shape[1], k.shape[-1], z.shape[-1]]
    if state.ndim != 4 or list(state.shape[1:]) != shape or (slots is None and state.shape[0] != n):
        wanted = "P" if slots is not None else str(n)
        raise ValueError(f"state must be [{wanted}, Hv, K, V] with {shape} last, got {list(state.shape)}")
    if slots is not None and list(slots.shape) != [n]:
        raise ValueError(f"slots must have one entry for each of {n} sequences, got shape {list(slots.shape)}")
    check_state_dtype(state.dtype, g)
    return dispatch.step(choose(z.device, implementation, z.dtype))(rows, cu_seqlens, state, slots).to(z.dtype)
