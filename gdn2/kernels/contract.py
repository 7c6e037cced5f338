"""What every implementation of the operator receives: checked, packed rows.

Axes: B batch, T rows, N sequences, H key heads, Hv value heads, K key width, V value width, R rows a token (rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from gdn2.shapes import check

SPLIT: ContextVar[bool] = ContextVar("long sequences may be split", default=True)
"""A long sequence may be split into segments that are run side by side and joined. That rounds otherwise than running
on from a state does, so whoever cuts sequences at will and wants the same bits turns it off."""

Solve = Literal["fp16", "refined", "tf32x3"]
SOLVE: ContextVar[Solve | None] = ContextVar("precision of the triangular inverse", default=None)


@contextmanager
def solve_precision(precision: Solve) -> Iterator[None]:
    """Within this context the Triton kernels invert I + T (arXiv 2605.22791, Eq. 21) by products in `precision`.

    The backward pass of a call takes the call's own. The other implementations solve in fp32 (fp64 inputs in fp64).

    Args:
        precision: "tf32x3" has 22 bits, and fp32 inputs take it unasked. "refined" has as many, by products of fp16 and
            two steps of Newton's method; fp16 inputs take it unasked. "fp16" takes one such step: all of T counts, the
            inverse with 11 bits. bf16 inputs take it unasked, for beside their own 8 bits that does not show. Both
            overflow where an entry of T or of the inverse leaves 65504, out of reach of unit keys and erasure up to 2.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in get_args(Solve):
        raise ValueError(f"solve precision must be one of {', '.join(get_args(Solve))}, got {precision!r}")
    token = SOLVE.set(precision)
    try:
        yield
    finally:
        SOLVE.reset(token)


@dataclass(frozen=True)
class Rows:
    """Rows of N packed sequences. After `packed`, heads still differ: q, k [T, H, K], e and g per key or value head."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    e: Tensor | None  # [T, H or Hv, K]
    z: Tensor  # [T, Hv, V]
    g: Tensor | None  # [T, H or Hv, K] or [T, H or Hv]
    diag: Tensor | None  # [T, Hv]
    lengths: tuple[int, ...]  # rows of each sequence
    rank: int = 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        out = [0]
        for n in self.lengths:
            out.append(out[-1] + n)
        return tuple(out)

    @property
    def states(self) -> tuple[int, int, int, int]:
        """Shape of the sequences' states, [N, Hv, K, V]."""
        return len(self.lengths), self.z.shape[1], self.k.shape[2], self.z.shape[2]

    @property
    def per_channel(self) -> bool:
        return self.g is not None and self.g.ndim == 3

    def repeated(self, dtype: torch.dtype) -> Rows:
        """Every input repeated to the value heads and cast to `dtype`: [T, Hv, ...]."""
        heads = self.z.shape[1]

        def spread(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.to(dtype)
            return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

        q, k = spread(self.q), spread(self.k)
        assert q is not None and k is not None
        z = self.z.to(dtype)
        return Rows(q, k, spread(self.e), z, spread(self.g), spread(self.diag), self.lengths, self.rank)


def packed(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None,
    diag: Tensor | None, cu_seqlens: Tensor | Sequence[int] | None, rank: int,
) -> Rows:  # fmt: skip
    """Check a call of `delta_rule` and lay its sequences end to end.

    Raises:
        ValueError: shapes that disagree, head counts that do not divide, g in half precision, boundaries that do not
            cover the rows, or a rank that does not divide a sequence.
    """
    sizes = check({"q": (q, "b t h k"), "k": (k, "b t h k"), "z": (z, "b t hv v")})
    heads, value_heads = sizes["h"], sizes["hv"]
    if heads == 0 or value_heads % heads:
        raise ValueError(f"value heads must be a multiple of key heads, got {value_heads} and {heads}")
    b, t, width = sizes["b"], sizes["t"], sizes["k"]
    for name, x, trailing in (("e", e, [width]), ("g", g, [width] if g is not None and g.ndim == 4 else [])):
        if x is not None and list(x.shape) not in ([b, t, heads, *trailing], [b, t, value_heads, *trailing]):
            raise ValueError(f"{name} must be per key head or per value head, got shape {list(x.shape)}")
    if g is not None and g.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"g must be float32 (sums of log-decays lose bits below it), got {g.dtype}")
    if diag is not None and list(diag.shape) != [b, t, value_heads]:
        raise ValueError(f"diag must have axes [b t hv] = {[b, t, value_heads]}, got shape {list(diag.shape)}")
    if rank > 1 and e is not None:
        raise ValueError("erase with several rows a token is not defined: pass e=None with rank > 1")
    lengths = sequence_lengths(b, t, cu_seqlens)
    if any(n % rank for n in lengths):
        raise ValueError(f"rank {rank} must divide the rows of every sequence, got lengths {lengths}")

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(b * t, *x.shape[2:])

    q_, k_, z_ = flat(q), flat(k), flat(z)
    assert q_ is not None and k_ is not None and z_ is not None
    return Rows(q_, k_, flat(e), z_, flat(g), flat(diag), lengths, rank)


def sequence_lengths(b: int, t: int, cu_seqlens: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    """Rows of each sequence: b times t, or what the boundaries say. A tensor of them is waited for."""
    if cu_seqlens is None:
        return (t,) * b
    if b != 1:
        raise ValueError(f"packed sequences come as one row: axis 'b' must be 1 with cu_seqlens, got {b}")
    bounds = [int(x) for x in cu_seqlens]
    lengths = tuple(after - before for before, after in zip(bounds, bounds[1:], strict=False))
    if not bounds or bounds[0] != 0 or bounds[-1] != t or any(n < 0 for n in lengths):
        raise ValueError(f"cu_seqlens must rise from 0 to {t}, got {bounds[:8]}")
    return lengths
