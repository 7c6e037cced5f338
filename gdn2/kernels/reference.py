"""The recurrence, token by token: the oracle every other implementation is held to.

    S'  = Diag(exp g_t) S_{t-1}                decay
    S_t = S' + k_t (z_t - S'^T e_t)^T          erase and write      (arXiv 2605.22791, Eq. 9)
    o_t = S_t^T q_t                            read                 (Eq. 10)

Axes: N sequences, T rows, H heads (all inputs already repeated to the value heads), K key width, V value width,
R rows a token (rank). Runs in the dtype of its inputs, so fp64 in gives an fp64 oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2.kernels.contract import Rows


def delta_rule(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, V] of all packed rows, and the last state [N, H, K, V] of every sequence, from `state`."""
    outputs: list[Tensor] = []
    last: list[Tensor] = []
    for n, length in enumerate(rows.lengths):
        carried = state[n]
        for t in range(rows.starts[n], rows.starts[n] + length, rows.rank):
            token = slice(t, t + rows.rank)
            o, carried = _token(rows, token, carried)
            outputs.append(o)
        last.append(carried)
    empty = rows.z.new_zeros(0, *rows.z.shape[1:])
    return torch.cat([empty, *outputs]), torch.stack(last) if last else state


def _token(rows: Rows, token: slice, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of R rows: outputs [R, H, V] and the new state [H, K, V]."""
    q, k, z = rows.q[token], rows.k[token], rows.z[token]
    if rows.g is not None:
        g = rows.g[token].sum(0)  # rows 2..R of a token carry no decay of their own
        state = g.exp().reshape(*g.shape, *[1] * (3 - g.ndim)) * state
    if rows.e is not None:
        z = z - torch.einsum("hkv,rhk->rhv", state, rows.e[token])
    new = state + torch.einsum("rhk,rhv->hkv", k, z)
    if rows.diag is None:
        return torch.einsum("hkv,rhk->rhv", new, q), new
    same_token = torch.einsum("rhk,shk->rsh", q, k)
    now = torch.einsum("rsh,shv->rhv", same_token, rows.diag[token, :, None] * z)
    return torch.einsum("hkv,rhk->rhv", state, q) + now, new


def delta_tokens(rows: Rows, state: Tensor, slots: Tensor | None) -> Tensor:
    """The same with the states in a pool [P, H, K, V], moved on in place; slot -1 is no state and gives zeros."""
    slot = range(len(rows.lengths)) if slots is None else [int(x) for x in slots]
    o = torch.zeros_like(rows.z)
    for n, at in enumerate(slot):
        if at < 0:
            continue
        carried = state[at].to(rows.z.dtype)
        for t in range(rows.starts[n], rows.starts[n] + rows.lengths[n], rows.rank):
            token = slice(t, t + rows.rank)
            o[token], carried = _token(rows, token, carried)
        state[at] = carried.to(state.dtype)
    return o
