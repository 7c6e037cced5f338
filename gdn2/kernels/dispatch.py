"""Which implementation runs: decided once from the device and an explicit wish, never changed silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from gdn2 import env
from gdn2.kernels import chunked, numba, reference, tokens
from gdn2.kernels.contract import Rows, sequence_lengths

Implementation = Literal["reference", "torch", "triton", "numba"]
Rule = Callable[[Rows, Tensor | None, torch.dtype], tuple[Tensor, Tensor]]
Step = Callable[[Rows, Tensor | None, Tensor, Tensor | None], Tensor]


def choose(
    device: torch.device, wish: Implementation | None = None, dtype: torch.dtype = torch.bfloat16
) -> Implementation:
    """The implementation for inputs of `dtype` on `device`: what was asked for, else `default`.

    Raises:
        ValueError: an unknown name, numba where it is not installed or gradients are wanted, or triton on a CPU.
    """
    if wish is not None and wish not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {', '.join(get_args(Implementation))}, got {wish!r}")
    if wish == "triton" and device.type == "cpu" and env.get("TRITON_INTERPRET") in ("", "0"):
        raise ValueError("implementation triton needs a GPU, or TRITON_INTERPRET=1; device is cpu")
    if wish == "numba" and not (numba.available() and device.type == "cpu"):
        raise ValueError(f"implementation numba needs a CPU and numba installed; device is {device}")
    if wish == "numba" and torch.is_grad_enabled():
        raise ValueError("implementation numba has no gradients: use torch, or torch.no_grad()")
    return wish or default(device.type, _capability(device), dtype)


def default(
    device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype = torch.bfloat16
) -> Implementation:
    """Numba on a CPU without gradients; Triton on an NVIDIA GPU of compute capability 8.0 or newer; else torch.

    Args:
        capability: of an NVIDIA GPU that Triton is installed for, else None.
        dtype: of the inputs. Triton's kernels do not compute in fp64.
    """
    if device_type == "cpu":
        return "numba" if numba.available() and not torch.is_grad_enabled() else "torch"
    return "triton" if capability is not None and capability >= (8, 0) and dtype != torch.float64 else "torch"


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return None
    return torch.cuda.get_device_capability(device)


def rule(name: Implementation) -> Rule:
    """The `delta_rule` of one implementation: `run(rows, state, dtype)`, where None is the zero state."""
    if name == "triton":
        from gdn2.kernels.triton import function

        return lambda rows, state, dtype: function.delta_rule(rows, state)
    run = {"reference": reference.delta_rule, "torch": chunked.delta_rule, "numba": chunked.delta_rule}[name]

    def from_state(rows: Rows, state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        state = rows.z.new_zeros(rows.states, dtype=dtype) if state is None else state
        if name == "numba" and dtype == torch.float32:
            return numba.delta_rule(rows, state)
        return run(rows.repeated(dtype), state)

    return from_state


def step(name: Implementation) -> Step:
    """The token form of one implementation: `run(rows, cu_seqlens, state, slots)` moves the pool `state` on in place.

    The lengths in `rows` are only meant where `cu_seqlens` is None: then each sequence has one token.
    """
    if name == "triton":
        from gdn2.kernels.triton import decode

        return lambda rows, cu_seqlens, state, slots: decode.delta_tokens(
            rows.q, rows.k, rows.e, rows.z, rows.g, state, cu_seqlens, slots, rows.diag, rows.rank
        )
    run = {"reference": reference.delta_tokens, "torch": tokens.delta_tokens, "numba": tokens.delta_tokens}[name]

    def with_lengths(rows: Rows, cu_seqlens: Tensor | None, state: Tensor, slots: Tensor | None) -> Tensor:
        t = rows.q.shape[0]
        lengths = (rows.rank,) * (t // rows.rank) if cu_seqlens is None else sequence_lengths(1, t, cu_seqlens)
        if any(n % rows.rank for n in lengths):
            raise ValueError(f"rank {rows.rank} must divide the rows of every sequence, got lengths {lengths}")
        dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
        if name == "numba" and dtype == torch.float32:
            return numba.delta_tokens(replace(rows, lengths=lengths), state, slots)
        return run(replace(rows.repeated(dtype), lengths=lengths), state, slots)

    return with_lengths
