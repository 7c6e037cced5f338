"""What every registered mixer promises. A new mixer is tested here as soon as the registry knows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2.mixers import LayerState, Mixer, build
from gdn2.models.state import State, _alike
from gdn2.ragged import Ragged
from tests.gdn2.mixers.variants import CASES, D_MODEL, IDS, make, tokens

every = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
LENGTHS = (17, 0, 70, 1, 130)
Options = dict[str, Any]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def pieces(mixer: Mixer, x: Tensor, cuts: list[int]) -> tuple[Tensor, LayerState]:
    """Read one sequence x in the pieces between `cuts`."""
    state, out = mixer.new_state(1), []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[0]], strict=True):
        y, state = mixer(x[begin:end], Ragged([end - begin]), state)
        out.append(y)
    return torch.cat(out), state


def decode(mixer: Mixer, x: Tensor, state: LayerState) -> Tensor:
    return torch.cat([mixer.step(x[t : t + 1], state) for t in range(x.shape[0])])


def copy(state: LayerState) -> LayerState:
    return {key: tensor.clone() for key, tensor in state.items()}


def assert_same(got: LayerState, want: LayerState, bound: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for key in want:
        a, b = _alike([got[key], want[key]])
        if bound == 0:
            assert torch.equal(a, b), key
        else:
            assert relative(a, b) < bound, key


@every
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_output(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(150)
    before, _ = mixer(x, Ragged([150]))
    for cut in (1, 63, 64, 100):
        changed = torch.cat([x[:cut], 3 * x[cut:] + 1])
        after, _ = mixer(changed, Ragged([150]))
        assert torch.equal(after[:cut], before[:cut])
        assert not torch.equal(after[cut], before[cut])
        shorter, _ = mixer(x[:cut], Ragged([cut]))
        assert torch.equal(shorter, before[:cut])


@every
@torch.no_grad()
def test_an_earlier_token_changes_every_later_output(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(12)
    before, _ = mixer(x, Ragged([12]))
    after, _ = mixer(torch.cat([x[:1] + 1, x[1:]]), Ragged([12]))
    assert ((after - before).abs().amax(-1) > 0).all()


@every
@torch.no_grad()
def test_a_sequence_does_not_feel_its_neighbours(name: str, options: Options) -> None:
    mixer, ragged = make(name, options), Ragged(LENGTHS)
    x = tokens(ragged.n_tokens)
    _, begun = mixer(tokens(5 * len(LENGTHS), seed=2), Ragged([5] * len(LENGTHS)))
    for start in (None, begun):
        together, state = mixer(x, ragged, start)
        for n, length in enumerate(LENGTHS):
            rows = slice(ragged.starts[n], ragged.starts[n] + length)
            own = None if start is None else {key: tensor[n : n + 1] for key, tensor in start.items()}
            alone, last = mixer(x[rows], Ragged([length]), own)
            assert torch.equal(together[rows], alone)
            assert_same({key: tensor[n : n + 1] for key, tensor in state.items()}, last)


@every
@torch.no_grad()
def test_pieces_of_64_tokens_equal_the_whole_bit_for_bit(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(330)
    whole, last = mixer(x, Ragged([330]))
    for cuts in ([64], [128, 192], [64, 128, 192, 256, 320]):
        got, state = pieces(mixer, x, cuts)
        assert torch.equal(got, whole), cuts
        assert_same(state, last)


@every
@torch.no_grad()
def test_other_pieces_equal_the_whole_to_rounding(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(150)
    whole, last = mixer(x, Ragged([150]))
    got, state = pieces(mixer, x, [1, 2, 17, 63, 65, 149])
    assert relative(got, whole) < 1e-5
    assert_same(state, last, 1e-5)


@every
@torch.no_grad()
def test_decoding_equals_prefill(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(150)
    whole, last = mixer(x, Ragged([150]))
    state = mixer.new_state(1)
    assert relative(decode(mixer, x, state), whole) < 1e-5
    assert_same(state, last, 1e-5)
    _, state = mixer(x[:70], Ragged([70]))
    assert relative(decode(mixer, x[70:], state), whole[70:]) < 1e-5


@every
@torch.no_grad()
def test_a_decoded_row_does_not_feel_the_others(name: str, options: Options) -> None:
    mixer, lengths = make(name, options), (3, 40, 64, 1, 90)
    _, state = mixer(tokens(sum(lengths)), Ragged(lengths))
    single = [{key: tensor[n : n + 1].clone() for key, tensor in state.items()} for n in range(5)]
    for t in range(4):
        x = tokens(5, seed=t)
        together = mixer.step(x, state)
        for n in range(5):
            assert torch.equal(mixer.step(x[n : n + 1], single[n]), together[n : n + 1])
    for n in range(5):
        assert_same({key: tensor[n : n + 1] for key, tensor in state.items()}, single[n])


@every
@torch.no_grad()
def test_forward_leaves_the_given_state_alone(name: str, options: Options) -> None:
    mixer = make(name, options)
    _, state = mixer(tokens(70), Ragged([70]))
    kept = copy(state)
    mixer(tokens(90), Ragged([90]), state)
    assert_same(state, kept)


@every
@torch.no_grad()
def test_states_are_selected_written_and_joined(name: str, options: Options) -> None:
    mixer = make(name, options)
    parts = []
    for length in (5, 70, 400):
        _, layer = mixer(tokens(length, seed=length), Ragged([length]))
        parts.append(State([layer], torch.tensor([length])))
    pool = State.concat(parts).select([2, 0, 1, 0])
    pool.write([0], parts[1])
    x = tokens(1)
    y = mixer.step(x.expand(4, -1), pool.layers[0])
    for row, part in enumerate((1, 0, 1, 0)):
        assert torch.equal(y[row : row + 1], mixer.step(x, copy(parts[part].layers[0])))


@every
def test_gradients_agree_with_finite_differences(name: str, options: Options) -> None:
    mixer = make(name, options).double()
    x = tokens(75, dtype=torch.float64).requires_grad_()
    out = tokens(75, seed=7, dtype=torch.float64)
    leaves = [x, *mixer.parameters()]
    torch.manual_seed(5)
    step = [1e-5 * torch.randn_like(leaf) for leaf in leaves]

    def loss() -> Tensor:
        return (mixer(x, Ragged([70, 5]))[0] * out).sum()

    slopes = torch.autograd.grad(loss(), leaves)
    for leaf, slope, move in zip(leaves, slopes, step, strict=True):
        leaf.data += move
        above = loss().detach()
        leaf.data -= 2 * move
        below = loss().detach()
        leaf.data += move
        want = (slope * move).sum()
        assert abs(above - below - 2 * want) <= 1e-6 * (slope.norm() * move.norm())


@every
def test_training_and_evaluation_compute_the_same(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(150)
    trained, last = mixer(x, Ragged([100, 50]))
    with torch.no_grad():
        plain, state = mixer(x, Ragged([100, 50]))
    assert trained.requires_grad
    assert relative(trained.detach(), plain) < 1e-5
    assert_same({key: tensor.detach() for key, tensor in last.items()}, state, 1e-5)


@every
def test_fp32_gradients_follow_fp64(name: str, options: Options) -> None:
    grads = []
    for dtype in (torch.float64, torch.float32):
        mixer = make(name, options).to(dtype)
        y, _ = mixer(tokens(100, dtype=dtype), Ragged([100]))
        grads.append(torch.autograd.grad((y * tokens(100, seed=7, dtype=dtype)).sum(), list(mixer.parameters())))
    for exact, single in zip(*grads, strict=True):
        assert relative(single, exact) < 1e-4


@every
def test_cost_is_that_of_the_built_module(name: str, options: Options) -> None:
    for given in (options, {}):
        with torch.device("meta"):
            mixer = build(name, D_MODEL, given)
            cost = mixer.cost()
            assert cost.params == sum(p.numel() for p in mixer.parameters())
            assert cost.state_bytes == state_bytes(mixer, mixer.new_state(1))
            assert cost.flops_per_token >= 2 * sum(p.numel() for p in mixer.parameters() if p.ndim > 1)


def state_bytes(mixer: Mixer, state: LayerState) -> int:
    """fp32 memories and angles, everything else at two bytes; counters are not counted."""
    kinds = [(key.rsplit(".", 1)[-1], t) for key, t in state.items()]  # without the part's name, where there is one
    return sum(t.numel() * (4 if key in ("memory", "theta") else 2) for key, t in kinds if key != "position")


@every
def test_reset_draws_every_parameter_anew(name: str, options: Options) -> None:
    mixer = build(name, D_MODEL, options)
    draws = []
    for _ in range(2):
        for parameter in mixer.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        torch.manual_seed(3)
        mixer.reset_parameters()
        assert all(p.isfinite().all() for p in mixer.parameters())
        draws.append([p.detach().clone() for p in mixer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


@every
@torch.no_grad()
def test_half_precision_follows_single(name: str, options: Options) -> None:
    mixer, x = make(name, options), tokens(100)
    exact, _ = mixer(x, Ragged([100]))
    for parameter_name, parameter in mixer.named_parameters():
        if parameter_name not in ("A_log", "dt_bias"):
            parameter.data = parameter.data.bfloat16()
    y, state = mixer(x.bfloat16(), Ragged([100]))
    assert y.dtype == torch.bfloat16
    assert relative(y, exact) < 0.1
    assert all(t.dtype == torch.float32 for key, t in state.items() if key == "memory")
    assert mixer.step(x[:1].bfloat16(), state).dtype == torch.bfloat16
