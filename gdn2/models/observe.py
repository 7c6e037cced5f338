"""Looking into a decoder while it reads: what each layer gives the operator, and the states before and after.

    with observe(model, seen.append):
        model(ids, ragged)

calls `seen.append` once a recurrent layer with an `Observed`. Nothing that the model computes changes.

Axes: T rows (tokens, or rank rows a token), N sequences, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from gdn2.kernels.contract import Rows
from gdn2.kernels.watch import WATCHER
from gdn2.mixers import Mixer
from gdn2.models.decoder import Decoder


class Observed(NamedTuple):
    """One recurrent layer's call of the operator. The tensors are the model's own: read them, change nothing."""

    layer: str  # its number, and for a part of a parallel layer the part's name: 3, 3.mamba2
    rows: Rows  # q, k, e, z and g as the operator receives them
    before: Tensor  # [N, Hv, K, V], fp32
    after: Tensor  # [N, Hv, K, V], fp32
    erase: Tensor | None  # gate b [T, H or Hv, K or 1]; None for a mixer without one
    write: Tensor | None  # gate w [T, Hv, V or 1]; the same as b where both are one beta


@contextmanager
def observe(model: Decoder, see: Callable[[Observed], None]) -> Iterator[None]:
    """While the block runs, tell `see` of every layer's call of the operator in `model.forward`, in this thread.

    `step` is not observed, nor is a layer of attention alone.
    """
    watcher = _Watcher(see)
    handles = []
    for number, layer in enumerate(model.blocks()):
        for path, module in layer.mixer.named_modules():
            if isinstance(module, Mixer):
                name = ".".join([str(number), *path.split(".")[1::2]])  # a part's path is parts.NAME
                handles.append(module.register_forward_pre_hook(watcher.entering(name)))
    token = WATCHER.set(watcher)
    try:
        yield
    finally:
        WATCHER.reset(token)
        for handle in handles:
            handle.remove()


class _Watcher:
    """Puts together the layer that is running, its gates and its call."""

    def __init__(self, see: Callable[[Observed], None]) -> None:
        self._see = see
        self._layer = ""
        self._gates: tuple[Tensor | None, Tensor | None] = (None, None)

    def entering(self, name: str) -> Callable[..., None]:
        """A forward pre-hook for the layer `name`."""

        def hook(*_: object) -> None:
            self._layer, self._gates = name, (None, None)

        return hook

    def gates(self, erase: Tensor, write: Tensor) -> None:
        self._gates = erase, write

    def rule(self, rows: Rows, before: Tensor, after: Tensor) -> None:
        self._see(Observed(self._layer, rows, before, after, *self._gates))
