"""Attention's kernels against the layer as the CPU has it: packed, continued, over a window or all, and bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2.kernels.triton import attention as kernels
from gdn2.mixers import Mixer, build
from gdn2.ragged import Ragged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS: list[dict[str, Any]] = [
    {"window": 48},
    {"window": 64, "n_kv_heads": 1, "d_head": 24},
    {"window": 100, "qk_norm": "head"},
    {},
    {"n_kv_heads": 1, "gate": True},
]
IDS = [" ".join(map(str, options.items())) for options in LAYERS]


def layer(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Mixer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build("attention", 32, {"n_heads": 2, "d_head": 16} | options)
        mixer.reset_parameters()
    return mixer.to(dtype).to(DEVICE).requires_grad_(False)


def drawn(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def run(mixer: Mixer, x: Tensor, pieces: list[list[int]], steps: int, kind: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of packed sequences read in several pieces, then of some steps; and the state after them."""
    mixer.implementation = kind
    state, out, at = None, [], 0
    x = x.to(DEVICE)
    with torch.no_grad():
        for lengths in pieces:
            n = sum(lengths)
            y, state = mixer(x[at : at + n], Ragged(lengths, DEVICE), state)
            out.append(y)
            at += n
        assert state is not None
        for _ in range(steps):
            out.append(mixer.step(x[at : at + len(pieces[0])], state))
            at += len(pieces[0])
    return torch.cat(out), state


@pytest.mark.parametrize("options", LAYERS, ids=IDS)
def test_the_layer_is_the_cpu_s(options: dict[str, Any]) -> None:
    mixer = layer(options)
    pieces = [[70, 0, 3], [64, 5, 0], [1, 1, 60]]
    x = drawn(sum(map(sum, pieces)) + 3 * 2)
    (found, end), (want, last) = (run(mixer, x, pieces, 2, kind) for kind in ("triton", "torch"))
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    for key, tensor in last.items():
        slots = min(tensor.shape[2], end[key].shape[2]) if tensor.ndim == 4 else None
        mine, theirs = (x if slots is None else x[:, :, :slots] for x in (end[key], tensor))
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-5), key


@pytest.mark.parametrize("options", LAYERS[:4:3], ids=["window", "full"])
def test_neither_cuts_nor_neighbours_change_a_bit(options: dict[str, Any]) -> None:
    mixer, x, other = layer(options), drawn(200), drawn(90, seed=1)
    whole, _ = run(mixer, x, [[200]], 0, "triton")
    for cuts in ([64, 136], [128, 64, 8]):
        found, _ = run(mixer, x, [[n] for n in cuts], 0, "triton")
        assert torch.equal(found, whole)
    packed, _ = run(mixer, torch.cat([other, x, other]), [[90, 200, 90]], 0, "triton")
    assert torch.equal(packed[90:290], whole)


def test_a_step_is_the_same_in_every_batch() -> None:
    mixer, x = layer({"window": 48}), drawn(6 * 30 + 6)
    many, _ = run(mixer, x, [[30] * 6], 1, "triton")
    one, _ = run(mixer, torch.cat([x[150:180], x[180 + 5 : 180 + 6]]), [[30]], 1, "triton")
    assert torch.equal(one[-1], many[-1])


def test_programs_cover_every_tile_a_sequence_may_touch() -> None:
    table = kernels.grid((0, 1, 64, 65), torch.device("cpu"))
    assert table.sequence.tolist() == [1, 1, 2, 2, 3, 3, 3] and table.tile.tolist() == [0, 1, 0, 1, 0, 1, 2]
    empty = torch.zeros(0, 2, 16)
    none = torch.zeros(1, dtype=torch.int64)
    caches = torch.zeros(1, 2, 8, 16)
    starts = torch.zeros(2, dtype=torch.int64)
    assert kernels.attend(empty, empty, empty, caches, caches, none, starts, (0,), 8).shape == (0, 2, 16)


def test_fp64_is_refused() -> None:
    x = torch.zeros(1, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        kernels.attend_cached(x, x[None], x[None], torch.ones(1, dtype=torch.int64))
