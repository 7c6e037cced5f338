"""Mamba-1, Mamba-2 and Mamba-3 against their equations, and the ways they have been got wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from gdn2.kernels.mamba3 import as_units, units
from gdn2.mixers import build
from gdn2.mixers.mamba3 import heavy_tail
from gdn2.ragged import Ragged
from tests.gdn2.mixers import transcribed
from tests.gdn2.mixers.variants import CASES, IDS, make, tokens

MINE = [(case, label) for case, label in zip(CASES, IDS, strict=True) if case[0] in ("mamba1", "mamba2", "mamba3")]
WRITTEN_OUT = {"mamba1": transcribed.mamba1, "mamba2": transcribed.mamba2, "mamba3": transcribed.mamba3}
SISO: dict[str, Any] = {"n_heads": 2, "d_head": 8, "d_state": 8}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("case", [case for case, _ in MINE], ids=[label for _, label in MINE])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 5e-6)])
@pytest.mark.parametrize("train", [False, True])
def test_equals_its_equations(case: tuple[str, dict[str, Any]], dtype: torch.dtype, bound: float, train: bool) -> None:
    name, options = case
    mixer, x = make(name, options).to(dtype), tokens(90, dtype=dtype)
    want = WRITTEN_OUT[name](mixer, x.double(), options)
    with torch.set_grad_enabled(train):
        got = mixer(x, Ragged([90]))[0].detach()
    # Phases are counted in 2^-32 turns outside training; without them fp64 agrees to its own rounding.
    assert relative(got, want) < (1e-12 if dtype == torch.float64 and (train or name != "mamba3") else bound)


def test_gradients_equal_those_of_the_written_out_loop() -> None:
    """Through autograd of the loop itself, parameters taken from the module."""
    for name, options in (("mamba3", SISO), ("mamba3", {**SISO, "rank": 2}), ("mamba2", {**SISO, "n_groups": 2}),
                          ("mamba1", {"d_inner": 16, "d_state": 8})):  # fmt: skip
        mixer, x = make(name, options).double(), tokens(20, dtype=torch.float64)
        weight = tokens(20, seed=3, dtype=torch.float64)
        x.requires_grad_()
        (mine,) = torch.autograd.grad((mixer(x, Ragged([20]))[0] * weight).sum(), x)
        (want,) = torch.autograd.grad((WRITTEN_OUT[name](mixer, x, options) * weight).sum(), x)
        assert relative(mine, want) < 1e-12


@pytest.mark.parametrize("limit", [(0.05, 10.0), (0.0, 0.005)])
@torch.no_grad()
def test_dt_limits_hold_in_prefill_and_in_decoding(limit: tuple[float, float]) -> None:
    x = tokens(30)
    free, bound = make("mamba2", SISO), make("mamba2", {**SISO, "dt_limit": limit})
    kept = bound(x, Ragged([30]))[1]["memory"]
    assert relative(free(x, Ragged([30]))[1]["memory"], kept) > 1e-2
    state = bound.new_state(1)
    for row in x:
        bound.step(row[None], state)
    assert relative(state["memory"], kept) < 1e-5


@torch.no_grad()
def test_heads_share_the_keys_of_their_own_group() -> None:
    """A change to the second group's B moves the second half of the heads only."""
    options = {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2}
    for name, first in (("mamba2", 2 * 32 + 8), ("mamba3", 2 * 32 + 8)):
        mixer, x = make(name, options), tokens(20)
        before = mixer(x, Ragged([20]))[1]["memory"]
        mixer.in_proj.weight[first : first + 8] += 0.5 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        after = mixer(x, Ragged([20]))[1]["memory"]
        assert torch.equal(after[:, :2], before[:, :2])
        assert all(not torch.allclose(after[:, h], before[:, h], rtol=1e-3) for h in (2, 3))


@torch.no_grad()
def test_the_norm_of_mamba2_takes_each_group_on_its_own() -> None:
    x = tokens(20)
    apart, together = (
        make("mamba2", {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "norm_groups": n})(x, Ragged([20]))[0]
        for n in (None, 1)
    )
    assert relative(apart, together) > 1e-2


@torch.no_grad()
def test_the_first_token_has_nothing_before_it() -> None:
    mixer = make("mamba3", SISO)
    x = tokens(2)
    _, state = mixer(x[:1], Ragged([1]))
    token = mixer._token(x[:1])
    k = state["k_last"][0, 0]  # [H, K]
    want = token.own[0, :, None, None] * k[:, :, None] * token.v[0][:, None, :]
    assert torch.allclose(state["memory"][0], want, rtol=1e-5, atol=1e-7)
    # From the second on, the first one's write comes back with its own weight.
    _, later = mixer(x[1:], Ragged([1]), {**state, "memory": torch.zeros_like(state["memory"])})
    token = mixer._token(x[1:])
    back = (token.back * token.g.exp())[0, :, None, None] * k[:, :, None] * state["v_last"][0][:, None, :]
    own = token.own[0, :, None, None] * later["k_last"][0, 0][:, :, None] * token.v[0][:, None, :]
    assert torch.allclose(later["memory"][0], back + own, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 2])
def test_both_pairings_are_one_layer_on_permuted_channels(rank: int | None) -> None:
    x, k = tokens(40), 8
    neighbours, halves = (
        make("mamba3", {**SISO, "rank": rank, "rope_fraction": 1.0, "pairing": pairing})
        for pairing in ("neighbours", "halves")
    )
    assert relative(neighbours(x, Ragged([40]))[0], halves(x, Ragged([40]))[0]) > 1e-3
    order = torch.arange(k).view(2, k // 2).T.flatten()  # neighbours' channel 2i is the halves' i, 2i + 1 is i + K/2
    rows = rank or 1
    for name in ("B_bias", "C_bias"):
        neighbours.get_parameter(name).copy_(halves.get_parameter(name)[..., order])
    for name in ("B_norm.weight", "C_norm.weight"):
        neighbours.get_parameter(name).copy_(halves.get_parameter(name)[order])
    shared = halves.in_proj.weight[32 : 32 + 2 * rows * k].view(-1, k, 32)[:, order].reshape(-1, 32)
    neighbours.in_proj.weight.copy_(halves.in_proj.weight)
    neighbours.in_proj.weight[32 : 32 + 2 * rows * k] = shared
    assert relative(neighbours(x, Ragged([40]))[0], halves(x, Ragged([40]))[0]) < 1e-5


@torch.no_grad()
def test_the_two_activations_of_a_differ() -> None:
    x = tokens(40)
    softplus, heavy = (
        make("mamba3", {**SISO, "a_activation": a})(x, Ragged([40]))[0] for a in ("softplus", "heavy_tail")
    )
    assert relative(softplus, heavy) > 1e-3
    assert torch.allclose(heavy_tail(torch.tensor([-3.0, 0.0, 2.0])), torch.tensor([0.25, 1.0, 3.0]))


def test_decay_never_stops_below_its_floor() -> None:
    mixer = make("mamba3", SISO)
    with torch.no_grad():
        mixer.in_proj.weight[2 * 16 + 2 * 8 + 2 : 2 * 16 + 2 * 8 + 4] = 0.0
        mixer.in_proj.weight[2 * 16 + 2 * 8 + 2 : 2 * 16 + 2 * 8 + 4, 0] = -1e3
        x = tokens(10).abs()
        token = mixer._token(x)
        dt = token.own + token.back
    assert torch.allclose(token.g / dt, torch.full_like(dt, -1e-4), rtol=1e-4)


def test_phases_stay_exact_over_a_million_tokens() -> None:
    """Integer units against exact rational arithmetic; a plain fp32 sum is far off by then."""
    count = 1_000_000
    turns = 0.05 * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = as_units(units(turns).cumsum(0)[-1]).item() / 2**32
    exact = math.fsum(turns.tolist())
    distance = (got - exact + 0.5) % 1 - 0.5
    assert abs(2 * math.pi * distance) < 1e-6
    single = float(numpy.cumsum(turns.float().numpy(), dtype=numpy.float32)[-1])
    assert abs(2 * math.pi * (single - exact)) > 1e-2


@torch.no_grad()
def test_phases_carry_over_pieces_far_into_a_sequence() -> None:
    """The same tokens after a long one give the same bits, read at once or in pieces, and turn as the sum says."""
    mixer = make("mamba3", {"n_heads": 1, "d_head": 4, "d_state": 4, "rope_fraction": 1.0})
    length = 100_032
    x = tokens(64).repeat(length // 64, 1)
    whole, last = mixer(x, Ragged([length]))
    middle, state = mixer(x[: length // 2 // 64 * 64], Ragged([length // 2 // 64 * 64]))
    rest, end = mixer(x[middle.shape[0] :], Ragged([length - middle.shape[0]]), state)
    assert torch.equal(torch.cat([middle, rest]), whole)
    assert torch.equal(end["theta"], last["theta"])
    token = mixer._token(x[:64])
    exact = torch.einsum("th,tj->hj", token.dt.double(), 0.5 * token.angle.double().tanh()) * (length // 64)
    distance = (last["theta"].double() / 2**32 - exact + 0.5) % 1 - 0.5
    assert (2 * math.pi * distance).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba1", {"d_state": 0}, "d_state must be at least 1, got 0"),
        ("mamba2", {"n_heads": 4, "n_groups": 3}, "n_groups must divide n_heads 4, got 3"),
        ("mamba2", {"dt_limit": (0.5, 0.1)}, "dt_limit must be two rising numbers >= 0"),
        ("mamba3", {"rope_fraction": 0.3}, "rope_fraction must be 0.5 or 1, got 0.3"),
        ("mamba3", {"a_activation": "relu"}, "a_activation must be softplus or heavy_tail, got 'relu'"),
        ("mamba3", {"pairing": "odd"}, "pairing must be neighbours or halves, got 'odd'"),
        ("mamba3", {"rank": 0}, "rank must be at least 1, got 0"),
        ("mamba3", {"rank": 3}, "rank must divide 32, got 3"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 32, options)
