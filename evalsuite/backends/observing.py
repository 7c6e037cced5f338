"""Reads a prompt with a model of ours and shows what its recurrent layers gave the operator, piece by piece.

Axes: T tokens, R rows a token, G heads of all layers of one shape, K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evalsuite.backends.native import NativeBackend
from evalsuite.backends.reading import CHUNK
from evalsuite.probe.measures import Tokens
from evalsuite.types import Backend, Ids
from gdn2.errors import UserError
from gdn2.models import Observed, State, observe
from gdn2.ragged import Ragged

PIECE = 4 * CHUNK  # tokens read at once at most; fp64 copies of all layers' inputs are held that long


class Head(NamedTuple):
    """One head of one recurrent layer."""

    layer: str
    mixer: str
    head: int


def watchable(backend: Backend) -> NativeBackend:
    """`backend`, if its model keeps a recurrent state that can be watched.

    Raises:
        UserError: a model that is not one of ours, or one without a recurrent layer.
    """
    if not isinstance(backend, NativeBackend):
        raise UserError(f"model {backend.info.name} cannot be probed: only models of gdn2-eval's own formats can")
    if all(layer.mixer.kind == "attention" for layer in backend.model.blocks()):
        raise UserError(f"model {backend.info.name} is a transformer: it keeps no recurrent state, nothing to probe")
    return backend


def check_block(block: int) -> None:
    """Raise UserError for a block that does not end where chunks do."""
    if block < CHUNK or block % CHUNK:
        raise UserError(f"block {block} is not a multiple of {CHUNK} tokens")


def heads(backend: NativeBackend) -> list[list[Head]]:
    """The heads that `pieces` yields, group by group."""
    config = backend.model.config
    groups, _ = _read(backend, torch.zeros(1, dtype=torch.int64), None)
    return [
        [
            Head(layer, str(config.mixers[config.pattern[int(layer.split(".")[0])]]["mixer"]), head)
            for layer, tokens in group
            for head in range(tokens.k.shape[2])
        ]
        for group in groups
    ]


def pieces(backend: NativeBackend, ids: Ids, block: int) -> Iterator[tuple[int, list[Tokens]]]:
    """Read `ids` in pieces that end where blocks of `block` tokens do: the first position and the groups of heads.

    A block is a multiple of the chunk length, so every number is, bit for bit, that of a plain run. Layers whose heads
    have one shape form a group, in the order of their first.
    """
    check_block(block)
    step = math.gcd(block, PIECE)
    state = None
    for start in range(0, len(ids), step):
        groups, state = _read(backend, torch.from_numpy(ids[start : start + step].astype(np.int64)), state)
        yield start, [Tokens.join([tokens for _, tokens in group]) for group in groups]


def _read(backend: NativeBackend, ids: Tensor, state: State | None) -> tuple[list[list[tuple[str, Tokens]]], State]:
    """Read one piece: what each recurrent layer gave the operator, in groups of one shape, and the state after it."""
    seen: list[Observed] = []
    with torch.inference_mode():
        with observe(backend.model, seen.append):
            _, state = backend.model(ids.to(backend.device), Ragged([len(ids)], backend.device), state)
        groups: dict[tuple[object, ...], list[tuple[str, Tokens]]] = {}
        for observed in seen:
            tokens = _tokens(observed)
            groups.setdefault(tokens.shape, []).append((observed.layer, tokens))
    return list(groups.values()), state


def _tokens(seen: Observed) -> Tokens:
    """One layer's rows, repeated to its value heads, of a single sequence."""
    rows = seen.rows.repeated(torch.float64)
    value_heads = rows.z.shape[1]

    def by_token(x: Tensor) -> Tensor:
        return x.reshape(-1, rows.rank, *x.shape[1:])

    def gate(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        mean = x.double().mean(-1)  # [T, H or Hv]
        return mean if mean.shape[1] == value_heads else mean.repeat_interleave(value_heads // mean.shape[1], 1)

    g = None
    if rows.g is not None:
        g = by_token(rows.g if rows.g.ndim == 3 else rows.g[..., None]).sum(1)
    e = None if rows.e is None else by_token(rows.e)
    before, after = seen.before[0].double(), seen.after[0].double()
    return Tokens(
        by_token(rows.q)[:, -1], by_token(rows.k), e, by_token(rows.z), g, before, after,
        gate(seen.erase), gate(seen.write),
    )  # fmt: skip
