"""What was measured of one sample, as plain JSON types: the fields that README.md explains.

Axes: E block ends, W tokens of the window, N needle tokens, G heads of all recurrent layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evalsuite.backends.observing import Head
from evalsuite.probe.measures import CHANGES, WORST, Block, Follower, Moment
from evalsuite.probe.needle import Needle
from evalsuite.types import Generate, Ids, Sample, Tokenizer

Followed = Sequence[tuple[Sequence[Head], Follower]]  # the groups of heads, and what became of the needle in each

BLOCK = ("half_life", "half_life_max", "erase", "write", "write_norm", "norm", "rank", "retention", "survival")
LOSSES = CHANGES[:2]  # what takes from the survival
MOMENT = ("norm", "kept", "erase", "write", "overlap")


def measured(sample: Sample, needle: Needle, block: int, followed: Followed, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of a sample's line that come from its followers."""
    request = sample.requests[0]
    assert isinstance(request, Generate)
    ids, at = request.prompt.ids, needle.positions
    blocks, moments = [f.blocks for _, f in followed], [f.moments for _, f in followed]
    return {
        "tokens": len(ids),
        "needle": {"start": at.start, "stop": at.stop, "texts": list(needle.texts), "roles": list(needle.roles)},
        "ends": [*range(block, len(ids), block), len(ids)],
        **_fields(blocks, BLOCK, followed),
        "change": _changes(blocks, "change", CHANGES),
        "loss": _changes(blocks, "loss", LOSSES),
        "read_norm": numbers(torch.cat([f.read_norm for _, f in followed], -1)),
        "asked": numbers(torch.cat([f.asked() for _, f in followed], -1)),
        "window": {
            "start": followed[0][1].window.start,
            **_fields(moments, MOMENT, followed),
            "change": _changes(moments, "change", CHANGES),
            "loss": _changes(moments, "loss", LOSSES),
        },
        "worst": _worst(followed, ids, tokenizer),
        "drift": max(f.drift for _, f in followed),
    }


def numbers(values: Tensor) -> Any:
    """A tensor as nested lists of five significant digits; what is not finite becomes null."""

    def plain(x: Any) -> Any:
        if isinstance(x, list):
            return [plain(part) for part in x]
        return float(f"{x:.5g}") if math.isfinite(x) else None

    return plain(values.tolist())


def _fields(
    groups: Sequence[Sequence[Block] | Sequence[Moment]], names: Sequence[str], followed: Followed
) -> dict[str, Any]:
    """The named fields, [E or W, ..., G]; one that no head has is left out."""
    out = {}
    for name in names:
        found = [[getattr(one, name) for one in group] for group in groups]
        if any(x is not None for column in found for x in column):
            sizes = [len(heads) for heads, _ in followed]
            out[name] = numbers(
                torch.cat([torch.stack([_filled(x, n) for x in c]) for c, n in zip(found, sizes, strict=True)], -1)
            )
    return out


def _filled(values: Tensor | None, heads: int) -> Tensor:
    """`values`, or NaN for each head where the mixer has none."""
    return torch.full((heads,), torch.nan, dtype=torch.float64) if values is None else values


def _changes(groups: Sequence[Sequence[Block] | Sequence[Moment]], field: str, names: Sequence[str]) -> dict[str, Any]:
    """The parts of a change by their names, [E or W, G] each."""
    whole = torch.cat([torch.stack([getattr(one, field) for one in group]) for group in groups], -1)
    return {name: numbers(whole[:, i]) for i, name in enumerate(names)}


def _worst(followed: Followed, ids: Ids, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    found = [(write, heads[write.head]) for heads, follower in followed for write in follower.worst]
    found.sort(key=lambda pair: -pair[0].damage)
    return [
        {
            "token": write.token, "text": tokenizer.decode([int(ids[write.token])]),
            "layer": head.layer, "head": head.head, "damage": write.damage,
            "erase": write.erase, "write": write.write, "overlap": write.overlap,
        }
        for write, head in found[:WORST]
    ]  # fmt: skip
