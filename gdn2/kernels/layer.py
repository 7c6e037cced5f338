"""What surrounds the operator in a layer: gates folded into its inputs before it, the gated norm after it.

Each function is plain torch here, differentiable, and one Triton kernel with its own backward where the
implementation is "triton", so that b, w and the activations make no trip of their own through memory.

Axes: T tokens, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gdn2 import numerics
from gdn2.kernels import numba
from gdn2.kernels.dispatch import Implementation, choose
from gdn2.kernels.watch import WATCHER


@dataclass(frozen=True)
class Gates:
    """How a layer turns its projections into the operator's inputs."""

    scale: float  # of the normalised queries, K^-1/2 as published
    erase_max: float = 1.0  # 2 allows negative eigenvalues
    lower_bound: float | None = None  # g = lower_bound * sigmoid(exp(A_log) x) in place of -exp(A_log) softplus(x)
    mean_erase: bool = False  # per-channel b averaged over its channels (arXiv 2605.22791, Table 5)
    mean_write: bool = False  # the same for w
    eps: float = 1e-6  # inside the L2 norm


class Folded(NamedTuple):
    """Inputs of `delta_rule`, without the batch axis."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    e: Tensor  # [T, H or Hv, K]
    z: Tensor  # [T, Hv, V]
    g: Tensor | None  # fp32 [T, H or Hv, K], [T, H or Hv] or None


class Raw(NamedTuple):
    """Projections of one layer before their activations."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    v: Tensor  # [T, Hv, V]
    b: Tensor  # erase logits [T, H or Hv, K]; or beta logits [T, Hv], one for erase and write, w is None then
    w: Tensor | None  # write logits [T, Hv, V]
    f: Tensor | None  # decay logits [T, H or Hv, K] or [T, H or Hv]; None: no decay
    A_log: Tensor | None  # [heads of f]
    dt_bias: Tensor | None  # as many as f has for one token


def fold_gates(raw: Raw, gates: Gates, implementation: Implementation | None = None) -> Folded:
    """Normalise q and k, and fold the gates into e, z and g (arXiv 2605.22791, Eq. 8, 11, 12).

        q = scale L2norm(q), k = L2norm(k), e = erase_max sigmoid(b) k, z = sigmoid(w) v,
        g = -exp(A_log) softplus(f + dt_bias)

    With one beta a head (w None) both gates are erase_max sigmoid(b): KDA, Gated DeltaNet and DeltaNet.

    Returns:
        q, k, e, z in the dtype of q; g in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: b and w that do not go together.
    """
    if (raw.w is None) != (raw.b.ndim == 2):
        raise ValueError(
            f"b must be [T, heads, K] with w, or [T, Hv] without, got b {list(raw.b.shape)} "
            f"and w {None if raw.w is None else list(raw.w.shape)}"
        )
    if (watcher := WATCHER.get()) is not None:
        watcher.gates(*erase_write(raw, gates))
    if choose(raw.q.device, implementation, raw.q.dtype) == "triton":
        from gdn2.kernels.triton import prologue

        return Folded(*prologue.fold_gates(raw, gates))
    if _compiled(raw.q, implementation) and not (gates.mean_erase or gates.mean_write):
        return numba.fold_gates(raw, gates)
    return _fold_gates(raw, gates)


def _compiled(x: Tensor, implementation: Implementation | None) -> bool:
    return x.dtype != torch.float64 and choose(x.device, implementation) == "numba"


def _fold_gates(raw: Raw, gates: Gates) -> Folded:
    q = numerics.l2_norm(raw.q, gates.eps) * gates.scale
    k = numerics.l2_norm(raw.k, gates.eps)
    b, w = erase_write(raw, gates)
    return Folded(q, k, b * _spread(k, b.shape[1]), w * raw.v, _decay(raw, gates))


def erase_write(raw: Raw, gates: Gates) -> tuple[Tensor, Tensor]:
    """The gates in e = b * k and z = w * v: b [T, H or Hv, K or 1], at most erase_max, and w [T, Hv, V or 1].

    With one beta a head both are that beta, [T, Hv, 1].
    """
    b = numerics.sigmoid(raw.b)
    if raw.w is None:
        beta = gates.erase_max * b[..., None]
        return beta, beta
    w = numerics.sigmoid(raw.w)
    b = b.mean(-1, keepdim=True) if gates.mean_erase else b
    w = w.mean(-1, keepdim=True) if gates.mean_write else w
    return gates.erase_max * b, w


def _spread(k: Tensor, heads: int) -> Tensor:
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], dim=1)


def _decay(raw: Raw, gates: Gates) -> Tensor | None:
    if raw.f is None:
        return None
    assert raw.A_log is not None and raw.dt_bias is not None
    wide = torch.float64 if raw.f.dtype == torch.float64 else torch.float32
    x = raw.f.to(wide) + raw.dt_bias.to(wide).reshape(raw.f.shape[1:])
    rate = raw.A_log.to(wide).exp()
    rate = rate[:, None] if raw.f.ndim == 3 else rate
    return -rate * numerics.softplus(x) if gates.lower_bound is None else gates.lower_bound * numerics.sigmoid(rate * x)


def gated_norm(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float,
    activation: Literal["silu", "sigmoid"], implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm over each head times the activated gate: o, gate [T, Hv, V], weight [V] to [T, Hv, V] in o's dtype."""
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation must be silu or sigmoid, got {activation!r}")
    if choose(o.device, implementation, o.dtype) == "triton":
        from gdn2.kernels.triton import epilogue

        return epilogue.gated_norm(o, gate, weight, eps, activation)
    if _compiled(o, implementation):
        return numba.gated_norm(o, gate, weight, eps, activation)
    act = numerics.silu(gate) if activation == "silu" else numerics.sigmoid(gate)
    return (numerics.rms_norm(o, weight, eps) * act).to(o.dtype)
