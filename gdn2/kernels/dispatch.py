"""Which implementation runs: decided once from the device and an explicit wish, never changed silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from gdn2.kernels import chunked, reference
from gdn2.kernels.contract import Rows

Implementation = Literal["reference", "torch", "triton"]
Rule = Callable[[Rows, Tensor, torch.dtype], tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor], Tensor]


def choose(device: torch.device, wish: Implementation | None = None) -> Implementation:
    """The implementation for `device`: what was asked for, else torch.

    Raises:
        ValueError: an unknown name.
    """
    if wish is not None and wish not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {', '.join(get_args(Implementation))}, got {wish!r}")
    return wish or "torch"


def rule(name: Implementation) -> Rule:
    """The `delta_rule` of one implementation."""
    run = {"reference": reference.delta_rule, "torch": chunked.delta_rule}[name]
    return lambda rows, state, dtype: run(rows.repeated(dtype), state)


def step(name: Implementation) -> Step:
    """The `delta_step` of one implementation."""
    run = {"reference": reference.delta_step, "torch": chunked.delta_step}[name]

    def spread(q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor | None, state: Tensor) -> Tensor:
        heads = z.shape[1]

        def to_state(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.to(state.dtype)
            return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

        q_, k_, z_ = to_state(q), to_state(k), to_state(z)
        assert q_ is not None and k_ is not None and z_ is not None
        return run(q_, k_, to_state(e), z_, to_state(g), state)

    return spread
