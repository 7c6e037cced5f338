"""The one operator behind every mixer, in three implementations.

    S'  = Diag(exp g_t) S_{t-1};   S_t = S' + k_t (z_t - S'^T e_t)^T;   o_t = S_t^T q_t    (arXiv 2605.22791, Eq. 9-10)

Axes: B batch, T rows, N sequences, H key heads, Hv value heads, K key width, V value width, R rows a token (rank).
Gates are folded in before the operator (e = b * k, z = w * v), so one forward, one backward and one decoding step
serve every mixer. The state is fp32 (fp64 when the inputs are).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2.kernels import dispatch
from gdn2.kernels.contract import packed
from gdn2.kernels.dispatch import Implementation, choose

__all__ = ["Implementation", "choose", "delta_rule", "delta_step"]


def delta_rule(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
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
        cu_seqlens: boundaries of N packed sequences, empty ones included, rising from 0 to T (then B is 1)   [N + 1]
        diag: factor on a token's own write in its own output (Mamba-3: lambda_t dt_t / c_t)   [B, T, Hv]
        rank: rows a token; the rows of one token see each other (Mamba-3 MIMO). g is zero on rows 2..R, e is None.
        implementation: "reference", "torch" or "triton"; None chooses from the device.

    Returns:
        o [B, T, Hv, V] in z's dtype, and S_T [N, Hv, K, V] in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit; the message names the axis.
    """
    rows = packed(q, k, e, z, g, diag, cu_seqlens, rank)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    shape = (len(rows.lengths), z.shape[2], k.shape[-1], z.shape[-1])
    if state is None:
        state = z.new_zeros(shape, dtype=dtype)
    elif tuple(state.shape) != shape:
        raise ValueError(f"state must be [N, Hv, K, V] = {list(shape)}, got {list(state.shape)}")
    run = dispatch.rule(choose(z.device, implementation))
    o, last = run(rows, state.to(dtype), dtype)
    return o.to(z.dtype).reshape(z.shape), last


def delta_step(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None, state: Tensor,
    *, implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """One token for each of N sequences; `state` [N, Hv, K, V] is updated in place.

    Args:
        q, k: [N, H, K]; e: [N, H or Hv, K] or None; z: [N, Hv, V]; g: [N, H or Hv, K], [N, H or Hv] or None.

    Returns:
        o [N, Hv, V] in z's dtype.
    """
    run = dispatch.step(choose(z.device, implementation))
    return run(q, k, e, z, g, state).to(z.dtype)
