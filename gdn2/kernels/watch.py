"""An opt-in look at what layers give the operator. Nobody watching costs one look at a context variable a call.

`gdn2.models.observe` is the way to it from a model. Decoding (`delta_step`, `delta_tokens`) is not watched.

Axes: T rows, N sequences, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from gdn2.kernels.contract import Rows


class Watcher(Protocol):
    """Told of every call, in order, by the thread that set `WATCHER`. It must change nothing it is given."""

    def gates(self, erase: Tensor, write: Tensor) -> None:
        """The gates that the next call's e and z hold: b [T, H or Hv, K or 1] and w [T, Hv, V or 1]."""

    def rule(self, rows: Rows, before: Tensor, after: Tensor) -> None:
        """The rows of a call of `delta_rule`, and the states [N, Hv, K, V] before and after them."""


WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
