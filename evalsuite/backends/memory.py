"""Device memory: how much there is, states that wait in host memory, and what full attention will need.

Axes: N sequences.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from evalsuite.types import Generate, LogLikelihood, Request
from gdn2.errors import DeviceLostError
from gdn2.models import Decoder, State

HELD_SHARE = 0.5  # of the memory free at the start that waiting states may take on a GPU
_LOST = re.compile(r"CUDA error|Triton Error \[CUDA\]|CUBLAS_STATUS_|CUDNN_STATUS_")
HOST = torch.device("cpu")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be taken on `device` now; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def held_budget(device: torch.device) -> int | None:
    """Bytes of states that may wait on `device`; None is no limit: on the CPU there is nowhere else to put them."""
    free = free_bytes(device) if device.type == "cuda" else None
    return None if free is None else int(HELD_SHARE * free)


def cache_bytes_per_token(model: Decoder) -> int:
    """What each token adds to the keys and values of one sequence; 0 where memory does not grow with the context."""
    width = model.embed.weight.element_size() / 2  # costs are stated for two bytes a value
    return int(width * sum(layer.mixer.cost().bytes_per_token for layer in model.blocks()))


def longest(request: Request) -> int:
    """Tokens of the longest sequence that `request` makes the model remember."""
    match request:
        case Generate(prompt):
            return len(prompt.ids) + request.max_tokens
        case LogLikelihood(context, continuation):
            return len(context.ids) + len(continuation.ids)
        case _:
            return min(len(request.document.ids), request.window or len(request.document.ids))


def too_large(model: Decoder, tokens: int) -> str | None:
    """Why a sequence of `tokens` tokens cannot be held by full attention, None where it can.

    A cache grows by being copied, so it is there twice for a moment.
    """
    per_token = cache_bytes_per_token(model)
    free = free_bytes(model.embed.weight.device) if per_token else None
    need = 2 * per_token * tokens
    if free is None or need <= free:
        return None
    return (
        f"oom: full attention over {tokens} tokens needs {need / 2**30:.3g} GiB for keys and values, "
        f"{free / 2**30:.3g} GiB are free: ask for shorter contexts"
    )


def taken(state: State, rows: Sequence[int], device: torch.device) -> State:
    """A copy of some sequences of `state` on `device`, wherever `state` is."""
    return _to(state.select(rows), device)


def raise_if_lost(error: RuntimeError) -> None:
    """Raise DeviceLostError where `error` says that the device cannot be used any more."""
    if isinstance(error, torch.OutOfMemoryError):
        return
    if isinstance(error, torch.AcceleratorError) or _LOST.search(str(error)):
        said = " ".join(str(error).split())[:200]
        reason = f"the device was lost: {said}; what was answered is kept, the same command goes on"
        raise DeviceLostError(reason) from error


class Shelf:
    """The states that wait for somebody. Beyond `budget` bytes those put there first go to host memory.

    Work is taken newest first, so the first are needed last. A state is moved in place: whoever holds it sees it move.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.moved_bytes = 0
        self._here: dict[int, weakref.ref[State]] = {}

    def put(self, state: State) -> None:
        """`state` is going to wait."""
        if self.budget is not None and state.seen.device != HOST:
            # A later state may have the id of one that is gone, so the reference is always the new one.
            self._here[id(state)] = weakref.ref(state)

    def settle(self) -> None:
        """Move what is over the budget."""
        if self.budget is None:
            return
        waiting = [(key, state) for key, ref in self._here.items() if (state := ref()) is not None]
        over = sum(state.nbytes for _, state in waiting) - self.budget
        self._here = {key: weakref.ref(state) for key, state in waiting}
        for key, state in waiting:
            if over <= 0:
                return
            over -= state.nbytes
            self.moved_bytes += state.nbytes
            _move(state, HOST)
            del self._here[key]

    def shrink(self) -> None:
        """Halve what may wait on the device."""
        if self.budget is not None:
            self.budget //= 2
            self.settle()


def _move(state: State, device: torch.device) -> None:
    moved = _to(state, device)
    state.layers, state.seen = moved.layers, moved.seen


def _to(state: State, device: torch.device) -> State:
    if state.seen.device == device:
        return state
    layers = [{key: t.to(device) for key, t in layer.items()} for layer in state.layers]
    return State(layers, state.seen.to(device))
