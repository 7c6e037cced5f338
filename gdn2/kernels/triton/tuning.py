"""Tile sizes, warps and segment lengths as data: a table read by device class, widths and variant, never by length.

Nothing is timed at run time, so the same call launches the same kernels on every run and results repeat bit for bit.

Axes: Hv value heads, K key width, V value width, C rows a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from gdn2.kernels.contract import Solve

LONGEST_TOKEN = 64
"""Most rows of a token: it lies within one chunk."""


def chunk(dtype: torch.dtype, rank: int) -> int:
    """Rows of a chunk of inputs of `dtype`: products of fp32 operands are three, and need twice the registers."""
    return 32 if dtype == torch.float32 and rank <= 32 else 64


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched. `tile` is its tile of the key or value axis, `inner` what it takes of the other."""

    tile: int
    warps: int
    stages: int = 2
    inner: int = 64
    registers: int | None = None  # most that a thread may have, for more programs at a time

    @property
    def options(self) -> dict[str, int | None]:
        """Keyword arguments of the launch."""
        return {
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers, "enable_fp_fusion": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The launches of every kernel for one (device class, K, V, decay)."""

    scores: Launch  # tile of K
    state: Launch  # tile of V; of the kernels that carry the state, or its gradient
    pairs: Launch  # tile of V
    inputs: Launch  # tile of K
    strong_scores: Launch  # of chunks out of reach; the tile is that of `scores`, for the same bits
    strong_inputs: Launch
    spread: bool  # take decay per head as decay per channel
    segment: int  # rows after which a sequence is split, 0 never
    solve: Solve  # products inside the triangular inverse, where `solve_precision` names none
    precision: str = "tf32x3"  # products of fp32 operands


MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
"""Of the device class, not of the device at hand: a result must not depend on which card of a class ran it."""

SEGMENT = 4096
"""Rows of a segment where heads alone cannot fill the device. Fixed, so that a longer sequence splits at the same
rows and its prefix keeps its bits."""


def plan(
    device: torch.device, value_heads: int, key: int, value: int, decay: str, dtype: torch.dtype, rank: int
) -> Plan:
    """The plan for one call; `decay` is "channel", "head" or "none", `dtype` that of the inputs."""
    return _plan(device_class(device), value_heads, key, value, decay, dtype, chunk(dtype, rank))


@cache
def device_class(device: torch.device) -> str:
    """ "sm_80", "sm_90" or "sm_100": the newest class of the table that is not newer than the device."""
    if device.type != "cuda":
        return "sm_90"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@cache
def _plan(kind: str, value_heads: int, key: int, value: int, decay: str, dtype: torch.dtype, rows: int) -> Plan:
    channel = decay == "channel"
    few = _tile(value // 2, 32)
    if dtype == torch.float32:
        state = Launch(16, 4, 3 if rows == 32 else 2) if key <= 128 else Launch(16, 8, 2)
        return Plan(
            scores=Launch(16 if channel else 32, 4),
            state=state,
            pairs=Launch(_tile(value, 32), 4),
            inputs=Launch(_tile(key, 64), 8, 2, few),
            strong_scores=Launch(16, 4),
            strong_inputs=Launch(16, 4, 3, few),
            solve="tf32x3",
            spread=False,
            segment=_segment(kind, value_heads, value, state),
        )
    if key > 128 or kind == "sm_80":  # by mma.sync, in narrow tiles
        state = Launch(_tile(value, 32), 8)
    else:
        tile = _tile(value, 128)
        state = Launch(tile, 8 if tile == 128 else 4, 3)
    return Plan(
        scores=Launch(32 if channel else _tile(key, 64), 4, 3),
        state=state,
        pairs=Launch(_tile(value, 64), 4),
        inputs=(Launch(32, 4, 3, _tile(value // 2, 64)) if key > 64 else Launch(16, 4, 2, few))
        if channel
        else Launch(_tile(key, 64), 8, 2, _tile(value, 64 if key > 32 else 32)),  # narrow keys: ptxas 12.8 again
        strong_scores=Launch(32, 4, 3),
        strong_inputs=Launch(16, 4, 2, few),
        solve="fp16" if dtype == torch.bfloat16 else "refined",  # in bf16 the inverse is kept with 8 bits
        spread=kind == "sm_90" and decay == "head" and key > 128,
        segment=_segment(kind, value_heads, value, state),
    )


def _segment(kind: str, value_heads: int, value: int, state: Launch) -> int:
    """Of 128 columns of values, half a device full is not worth cutting."""
    tiles = value_heads * -(-value // min(state.tile, 64))
    return SEGMENT if tiles < MULTIPROCESSORS[kind] else 0


def _tile(width: int, most: int) -> int:
    """A power of two of at least 16 (the smallest side of a matrix product) and at most `most`."""
    return max(16, min(most, 1 << (width - 1).bit_length()))
