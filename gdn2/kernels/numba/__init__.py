"""The CPU implementation for inference: loops compiled by numba, one token of one sequence at a time.

Beside torch's chunks this has no index copies, no intermediate tensors and no cut that could show: token form and
prefill are the same arithmetic, and every row's result depends on its own sequence alone. It has no gradients and is
for fp32 and narrower types, computed in fp32; fp64 and gradients are what the "torch" implementation is for.

Axes: N sequences, T tokens, H key heads, Hv value heads, K key width, V value width, C channels, W taps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdn2.kernels.contract import Rows
from gdn2.ragged import Ragged

if TYPE_CHECKING:
    from gdn2.kernels.layer import Folded, Gates, Raw

SHARED_WORK = 1 << 18  # multiply-adds below which a call is not worth a second thread
_NOTHING = torch.zeros(0, 1, 1)


@cache
def available() -> bool:
    """Whether numba is installed: it is wherever it supports the Python at hand."""
    return find_spec("numba") is not None


@cache
def _loops() -> Any:
    from gdn2.kernels.numba import loops

    return loops


@cache
def _pool(threads: int, _thread: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _run(loop: Callable[..., None], arguments: Sequence[Any], count: int, work: int) -> None:
    """`loop(*arguments, begin, end)` over 0..count, cut between torch's threads where `work` is worth it."""
    threads = min(torch.get_num_threads(), count)
    given = [_array(x) if isinstance(x, Tensor) else x for x in arguments]
    if threads < 2 or work < SHARED_WORK:
        loop(*given, 0, count)
        return
    cuts = [count * i // threads for i in range(threads + 1)]
    pool = _pool(torch.get_num_threads(), threading.get_ident())
    parts = [pool.submit(loop, *given, a, b) for a, b in zip(cuts[1:], cuts[2:], strict=False)]
    loop(*given, cuts[0], cuts[1])
    for part in parts:
        part.result()


def _array(x: Tensor) -> Any:
    return (x.detach() if x.requires_grad else x).numpy()


def _wide(x: Tensor | None) -> Tensor:
    """fp32 and contiguous; nothing has no rows."""
    return _NOTHING if x is None else x.float().contiguous()


def _bounds(starts: Sequence[int]) -> Any:
    return np.array(starts, np.int64)


def delta_rule(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [T, Hv, V] of all packed rows in fp32, and the last states, from `state` [N, Hv, K, V]."""
    last = state.float().clone(memory_format=torch.contiguous_format)
    return _delta(rows, last, range(len(rows.lengths))), last


def delta_tokens(rows: Rows, state: Tensor, slots: Tensor | None) -> Tensor:
    """The same with a pool of states [P, Hv, K, V] that moves on in place; slot -1 is none: its outputs are zero."""
    which = range(len(rows.lengths)) if slots is None else slots.tolist()
    if state.dtype == torch.float32 and state.is_contiguous():
        return _delta(rows, state, which)
    work = state.float().contiguous()
    o = _delta(rows, work, which)
    state.copy_(work)
    return o


def _delta(rows: Rows, state: Tensor, slots: Sequence[int]) -> Tensor:
    q, k, e, z, g, diag = map(_wide, (rows.q, rows.k, rows.e, rows.z, rows.g, rows.diag))
    g = g if g.ndim == 3 else g.unsqueeze(-1)
    diag = diag if diag.ndim == 2 else diag[..., 0]
    o = torch.zeros_like(z)
    heads, keys, width = state.shape[1:]
    arguments = (q, k, e, z, g, diag, rows.rank, _bounds(rows.starts), _bounds(slots), state, o)
    _run(_loops().delta, arguments, len(slots) * heads, 4 * z.shape[0] * heads * keys * width)
    return o


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, ragged: Ragged, activate: bool
) -> tuple[Tensor, Tensor]:
    """See `gdn2.mixers.conv.short_conv`."""
    after = torch.empty(window.shape, dtype=torch.float32)
    y = _conv(x, weight, bias, (window, after), ragged.starts, activate)
    return y, after.to(window.dtype)


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, activate: bool) -> Tensor:
    """One token for each of N sequences, x [N, C]; `window` [N, C, W - 1] moves on in place."""
    work = _wide(window)
    y = _conv(x, weight, bias, (work, work), range(x.shape[0] + 1), activate)
    if work is not window:
        window.copy_(work)
    return y


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: tuple[Tensor, Tensor], starts: Sequence[int],
    activate: bool,
) -> Tensor:  # fmt: skip
    wide = _wide(x)
    taps = _wide(weight.t())
    y = torch.empty_like(wide)
    shift = wide.new_zeros(x.shape[1]) if bias is None else _wide(bias)
    before, after = windows
    arguments = (wide, 0, taps, shift, _wide(before), _bounds(starts), activate, y, after)
    _run(_loops().conv, arguments, len(starts) - 1, 16 * x.numel())
    return y.to(x.dtype)


class Mamba2(NamedTuple):
    """What Mamba-2 does between its two projections."""

    taps: Tensor  # [C, W]
    bias: Tensor | None  # [C]
    dt_bias: Tensor  # [H]
    A_log: Tensor  # [H]
    skip: Tensor  # [H]
    norm: Tensor | None  # [H P]; None is no norm
    groups: int  # of the norm
    late: bool  # the gate comes after the norm
    eps: float
    low: float  # of dt
    high: float


def mamba2(
    x: Tensor, layer: Mamba2, windows: tuple[Tensor, Tensor], memory: Tensor, starts: Sequence[int]
) -> Tensor:  # fmt: skip
    """Projections x [T, 2 H P + 2 G K + H] of packed sequences to y [T, H P] before the last projection.

    Args:
        windows: before and after [N, C, W - 1]; the second is filled.
        memory: states, fp32 and contiguous, which move on in place [N, H, K, P].
    """
    loops, wide, bounds = _loops(), _array(_wide(x)), _bounds(starts)
    tokens, (n, heads, keys, width), channels = x.shape[0], memory.shape, layer.taps.shape[0]
    inner = heads * width
    # Arrays of numpy from here on: a step of decoding would spend more time on tensors than in the loops.
    u = np.empty((tokens, channels), np.float32)
    shift = np.zeros(channels, np.float32) if layer.bias is None else _wide(layer.bias)
    before, after = windows
    arguments: tuple[Any, ...] = (wide, inner, _wide(layer.taps.t()), shift, _wide(before), bounds, True, u, after)
    _run(loops.conv, arguments, n, 16 * u.size)
    q, k = (np.empty((tokens, (channels - inner) // 2), np.float32) for _ in "qk")
    z, g = np.empty((tokens, heads, width), np.float32), np.empty((tokens, heads), np.float32)
    limits = np.float32(layer.low), np.float32(layer.high)
    rate = layer.A_log.float().exp()
    _run(loops.mamba2_inputs, (wide, u, _wide(layer.dt_bias), rate, *limits, q, k, z, g), tokens, 16 * u.size)
    o = np.zeros_like(z)
    by_head = [y.reshape(tokens, (channels - inner) // 2 // keys, keys) for y in (q, k)]
    none = _array(_NOTHING)
    arguments = (*by_head, none, z, g[..., None], none[..., 0], 1, bounds, _bounds(range(n)), memory, o)
    _run(loops.delta, arguments, n * heads, 4 * z.size * keys)
    y = np.empty((tokens, inner), np.float32)
    weight = np.zeros(0, np.float32) if layer.norm is None else _wide(layer.norm)
    arguments = (wide, u, o, _wide(layer.skip), weight, layer.groups, layer.late, np.float32(layer.eps), y)
    _run(loops.mamba2_outputs, arguments, tokens, 16 * y.size)
    return torch.from_numpy(y).to(x.dtype)


def fold_gates(raw: Raw, gates: Gates) -> Folded:
    """See `gdn2.kernels.layer.fold_gates`; gates averaged over their channels are not for here."""
    from gdn2.kernels.layer import Folded

    q, k, v, b, w = map(_wide, (raw.q, raw.k, raw.v, raw.b, raw.w))
    b = b if b.ndim == 3 else b.unsqueeze(-1)
    tokens = q.shape[0]
    e, z = q.new_empty(tokens, b.shape[1], q.shape[2]), torch.empty_like(v)
    qn, kn = torch.empty_like(q), torch.empty_like(k)
    numbers = (np.float32(gates.scale), np.float32(gates.erase_max), np.float32(gates.eps))
    _run(_loops().fold, (q, k, v, b, w, *numbers, qn, kn, e, z), tokens, 8 * (q.numel() + v.numel()))
    dtype = raw.q.dtype
    return Folded(qn.to(dtype), kn.to(dtype), e.to(dtype), z.to(dtype), _log_decay(raw, gates))


def _log_decay(raw: Raw, gates: Gates) -> Tensor | None:
    if raw.f is None:
        return None
    assert raw.A_log is not None and raw.dt_bias is not None
    f = _wide(raw.f).flatten(1)
    rate = raw.A_log.float().exp()
    rate = rate.repeat_interleave(f.shape[1] // rate.shape[0])
    g = torch.empty_like(f)
    bound = np.float32(gates.lower_bound or 0.0)
    arguments = (f, _wide(raw.dt_bias).flatten(), rate, gates.lower_bound is not None, bound, g)
    _run(_loops().decay, arguments, f.shape[0], 16 * f.numel())
    return g.view(raw.f.shape)


def gated_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Literal["silu", "sigmoid"]) -> Tensor:
    """See `gdn2.kernels.layer.gated_norm`."""
    return _norm(o, weight[None], gate, 1 if activation == "silu" else 2, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; a weight of more axes belongs to the last ones of x."""
    return _norm(x, weight.reshape(-1, x.shape[-1]), None, 0, eps)


def _norm(x: Tensor, weight: Tensor, gate: Tensor | None, kind: int, eps: float) -> Tensor:
    width = x.shape[-1]
    rows = _wide(x).reshape(-1, width)
    y = torch.empty_like(rows)
    by = _wide(gate).reshape(-1, width) if gate is not None else rows
    _run(_loops().rms_norm, (rows, _wide(weight), by, kind, np.float32(eps), y), rows.shape[0], 8 * rows.numel())
    return y.view(x.shape).to(x.dtype)


def silu_times(x: Tensor, by: Tensor) -> Tensor:
    """silu(x) * by, both [T, C]."""
    rows = _wide(x)
    y = torch.empty_like(rows)
    _run(_loops().silu_times, (rows, _wide(by), y), rows.shape[0], 8 * rows.numel())
    return y.to(x.dtype)


def activation(x: Tensor, kind: Literal["silu", "sigmoid", "softplus"]) -> Tensor:
    """An elementwise function of x [..., C]."""
    rows = _wide(x).reshape(-1, x.shape[-1]) if x.ndim else _wide(x).reshape(1, 1)
    y = torch.empty_like(rows)
    number = ("silu", "sigmoid", "softplus").index(kind)
    _run(_loops().activation, (rows, number, y), rows.shape[0], 8 * rows.numel())
    return y.view(x.shape).to(x.dtype)


def attend(scores: Tensor, firsts: Tensor, lasts: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Turn scores [n, S] into softmax weights in place, of keys firsts..lasts [n] alone, and take them in.

    Args:
        top, total: highest score and sum of weights of earlier keys [n]; they move on in place.

    Returns:
        what sums over earlier keys must be multiplied by [n].
    """
    shrink = torch.empty_like(top)
    _run(_loops().attend, (scores, firsts, lasts, top, total, shrink), scores.shape[0], 8 * scores.numel())
    return shrink


def attend_cached(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """See `gdn2.mixers.softmax.attend_cached`."""
    wide = _wide(q)
    o = wide.new_empty(*q.shape[:-1], v.shape[-1])
    arguments = (wide, _wide(k), _wide(v), filled.contiguous(), np.float32(q.shape[-1] ** -0.5), o)
    work = int(filled.sum()) * q[0].numel() if q.numel() else 0
    _run(_loops().attend_cached, arguments, q.shape[0] * q.shape[1], work)
    return o.to(q.dtype)


def gumbel(keys: Tensor, width: int) -> Tensor:
    """See `gdn2.kernels.noise.plain`."""
    y = torch.empty(len(keys), width)
    _run(_loops().gumbel, (keys.contiguous(), y), len(keys), 8 * y.numel())
    return y
