"""Token by token in plain torch, states updated in place in a pool: decoding and short continuations on a CPU.

Every sequence's arithmetic is made of products of its own rows and state, so a row's result does not depend, in any
bit, on how many rows there are.

Axes: N sequences, T rows, R rows a token, P slots of the pool, H value heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2.errors import UserError
from gdn2.kernels.contract import Rows

BF16_STUCK = 2.0**-8
"""Log-decays weaker than this round back to the same bf16 state: it would never forget."""


def check_state_dtype(dtype: torch.dtype, g: Tensor | None) -> None:
    """Refuse a bf16 state for log-decays it cannot follow. Not looked at while a CUDA graph is captured.

    Raises:
        UserError: some -2^-8 < g < 0.
    """
    if dtype != torch.bfloat16 or g is None or g.numel() == 0:
        return
    if g.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lost = (g < 0) & (g > -BF16_STUCK)
    if bool(lost.any()):
        weakest = float(g[lost].max())
        raise UserError(f"a bf16 state never decays at log-decay {weakest:.3g} (weaker than -2^-8); use an fp32 state")


def delta_tokens(rows: Rows, state: Tensor, slots: Tensor | None) -> Tensor:
    """Outputs [T, H, V] of the rows, repeated to the value heads; `state` [P, H, K, V] moves on in place.

    `slots` [N] names the state of each sequence, -1 for none: its outputs are zero.
    """
    if slots is None and state.dtype == rows.z.dtype and all(n == rows.rank for n in rows.lengths):
        return _token(rows, slice(None), state).flatten(0, 1)  # nothing here waits for the device
    o = torch.zeros_like(rows.z)
    slot = range(len(rows.lengths)) if slots is None else [int(x) for x in slots]
    live = sorted((n for n, at in enumerate(slot) if at >= 0 and rows.lengths[n]), key=lambda n: -rows.lengths[n])
    whole = slots is None and live == list(range(state.shape[0])) and state.dtype == rows.z.dtype
    at = torch.tensor([slot[n] for n in live], dtype=torch.int64, device=state.device)
    work = state if whole else state[at].to(rows.z.dtype)
    begin = torch.tensor([rows.starts[n] for n in live], dtype=torch.int64, device=state.device)
    within = torch.arange(rows.rank, device=state.device)
    count = len(live)
    for t in range(0, rows.lengths[live[0]] if live else 0, rows.rank):
        while rows.lengths[live[count - 1]] <= t:
            count -= 1
        token = (begin[:count, None] + t + within).flatten()  # [n R]
        o[token] = _token(rows, token, work[:count]).flatten(0, 1)
    if not whole:
        state[at] = work.to(state.dtype)
    return o


def _token(rows: Rows, token: Tensor | slice, state: Tensor) -> Tensor:
    """One token of n sequences: outputs [n, R, H, V]; `state` [n, H, K, V] moves on in place (Eq. 9-10)."""

    def of(x: Tensor) -> Tensor:
        return x[token].unflatten(0, (-1, rows.rank))  # [n, R, H, ...]

    q, k, z = of(rows.q), of(rows.k), of(rows.z)
    if rows.g is not None:
        g = of(rows.g)[:, 0]  # rows 2..R of a token carry no decay of their own
        state.mul_(g.exp().reshape(*g.shape, *[1] * (4 - g.ndim)))
    if rows.e is not None:
        z = z - (of(rows.e)[:, 0].unsqueeze(-2) @ state).squeeze(-2)[:, None]
    seen = state
    if rows.diag is not None:
        own = of(rows.diag)[..., None] * z
        seen = state.clone()
        for r in range(rows.rank):
            seen += k[:, r].unsqueeze(-1) * own[:, r].unsqueeze(-2)
    for r in range(rows.rank):
        state += k[:, r].unsqueeze(-1) * z[:, r].unsqueeze(-2)
    return (q.transpose(1, 2) @ seen).transpose(1, 2)
