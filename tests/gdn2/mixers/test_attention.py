"""Softmax attention against its equation; the window's exact edge; long pieces in flat memory; rotation far out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn2.mixers import Mixer, build, softmax
from gdn2.mixers.attention import rotate, rotation
from gdn2.mixers.softmax import SLOTS
from gdn2.ragged import Ragged
from tests.gdn2.mixers.transcribed import attention
from tests.gdn2.mixers.variants import CASES, IDS, make, tokens

MINE = [(case[1], label) for case, label in zip(CASES, IDS, strict=True) if case[0] == "attention"]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def by_decoding(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    state = mixer.new_state(1)
    return torch.cat([mixer.step(x[t : t + 1], state) for t in range(x.shape[0])])


@pytest.mark.parametrize("options", [case for case, _ in MINE], ids=[label for _, label in MINE])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("train", [False, True])
def test_equals_its_equation(options: dict[str, Any], dtype: torch.dtype, bound: float, train: bool) -> None:
    mixer, x = make("attention", options).to(dtype), tokens(230, dtype=dtype)
    want = attention(mixer, x.double(), options)
    with torch.set_grad_enabled(train):
        assert relative(mixer(x, Ragged([230]))[0].detach(), want) < bound
        if train:  # unequal lengths take another way through torch's attention
            y = mixer(x, Ragged([200, 30]))[0].detach()
            assert relative(y[:200], want[:200]) < bound


@pytest.mark.parametrize("window", [2, 5, 63, 64, 65, 100])
def test_a_token_sees_itself_and_window_minus_one_before_it(window: int) -> None:
    mixer = make("attention", {"n_heads": 1, "d_head": 8, "window": window, "rotary": 0})
    length, at = 200, 30
    x = tokens(length)
    moved = x.clone()
    moved[at] += 1
    for run in (lambda m, x: m(x, Ragged([length]))[0].detach(), torch.no_grad()(by_decoding)):
        changed = (run(mixer, moved) != run(mixer, x)).any(-1).nonzero().flatten().tolist()
        assert changed == list(range(at, at + window))
    with torch.no_grad():
        changed = (mixer(moved, Ragged([length]))[0] != mixer(x, Ragged([length]))[0]).any(-1)
    assert changed.nonzero().flatten().tolist() == list(range(at, at + window))


@torch.no_grad()
def test_one_long_piece_needs_no_square_matrix() -> None:
    """A T x T matrix of 65536 tokens would take 16 GiB. The last tokens come out as they do alone."""
    length, window = 1 << 16, 128
    mixer = make("attention", {"n_heads": 1, "d_head": 8, "window": window})
    x = tokens(length)
    y, state = mixer(x, Ragged([length]))
    assert state["keys"].shape == (1, 1, window, 8)
    alone, _ = mixer(x[-300:], Ragged([300]))
    assert relative(y[-100:], alone[-100:]) < 1e-5


@torch.no_grad()
def test_rotation_depends_on_distance_alone_out_to_two_million_tokens() -> None:
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(at: int, distance: int) -> float:
        turned = [rotate(p, rotation(torch.tensor([n]), 64, 1e4, False)) for p, n in ((q, at), (k, at - distance))]
        return (turned[0] * turned[1]).sum().item()

    for distance in (1, 100, 2047):
        near = score(2047, distance)
        assert score(2_000_000, distance) == pytest.approx(near, abs=1e-4)
        assert score(2047, distance + 1) != pytest.approx(near, abs=1e-3)


@torch.no_grad()
def test_half_precision_tables_are_an_option() -> None:
    options = {"n_heads": 2, "d_head": 16}
    x = tokens(300)
    exact, rounded = (make("attention", {**options, "rotary_bf16": on})(x, Ragged([300]))[0] for on in (False, True))
    assert 1e-5 < relative(rounded, exact) < 0.1


@torch.no_grad()
def test_a_growing_cache_keeps_what_it_holds() -> None:
    mixer = make("attention", {"n_heads": 1, "d_head": 8})
    assert mixer.new_state(3)["keys"].shape == (3, 1, 0, 8)
    _, state = mixer(tokens(SLOTS), Ragged([SLOTS]))
    assert state["keys"].shape[2] == SLOTS
    held = state["keys"].clone()
    mixer.step(tokens(1), state)
    assert state["keys"].shape[2] == 2 * SLOTS
    assert torch.equal(state["keys"][:, :, :SLOTS], held)
    assert state["position"].tolist() == [SLOTS + 1]


def test_cost_of_a_full_cache_is_what_it_takes() -> None:
    cost = build("attention", 64, {"n_heads": 4, "n_kv_heads": 2, "d_head": 16}).cost()
    assert cost.bytes_per_token == 2 * 2 * 2 * 16
    assert cost.flops_per_past_token == 4 * 64
    assert cost.state_bytes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must divide n_heads 4, got 3"),
        ({"d_head": 16, "rotary": 7}, "rotary must be even and at most d_head 16, got 7"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"qk_norm": "rms"}, "qk_norm must be none, head or all, got 'rms'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("attention", 32, options)


@pytest.mark.parametrize(("start", "count", "window"), [(0, 40, None), (300, 520, None), (250, 9, 64), (511, 2, 300)])
def test_both_ways_through_blocks_say_the_same(start: int, count: int, window: int | None) -> None:
    """The one torch's attention takes, and the one of a CPU without gradients."""
    rng = torch.Generator().manual_seed(start)
    past = start if window is None else min(start, window - 1)
    q = torch.randn(count, 2, 3, 8, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(past + count, 2, n, generator=rng, dtype=torch.float64) for n in (8, 5))
    wide, narrow = (run(q, k, v, start, window) for run in (softmax._in_wide_blocks, softmax._in_blocks))
    assert wide.shape == (count, 2, 3, 5) and relative(wide, narrow) < 1e-12


@pytest.mark.parametrize("window", [1, 2, 7, 64, 129, None])
@pytest.mark.parametrize("tokens", [1, 63, 130, 300])
def test_trainings_attention_sees_its_window_and_no_more(tokens: int, window: int | None) -> None:
    draw = torch.Generator().manual_seed(5)
    shapes = (2, tokens, 2, 3, 8), (2, tokens, 2, 8), (2, tokens, 2, 8)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes)
    at = torch.arange(tokens)
    hidden = (at > at[:, None]) | (at <= at[:, None] - (window or tokens))
    scores = torch.einsum("ntgrd,nsgd->ngrts", q, k) * 8**-0.5
    plain = torch.einsum("ngrts,nsgd->ntgrd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    found = softmax.attend_together(q, k, v, window)
    torch.testing.assert_close(found, plain)
    ways = torch.randn(plain.shape, generator=draw, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad((o * ways).sum(), (q, k, v)) for o in (found, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
