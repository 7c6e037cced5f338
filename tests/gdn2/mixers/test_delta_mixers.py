"""GDN-2, KDA, Gated DeltaNet and DeltaNet against their equations, and the ways they have been got wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn2.mixers import build
from gdn2.ragged import Ragged
from tests.gdn2.mixers.transcribed import delta_family
from tests.gdn2.mixers.variants import CASES, IDS, make, tokens

NAMES = ("gdn2", "kda", "gdn", "deltanet")
FAMILY = [(case, label) for case, label in zip(CASES, IDS, strict=True) if case[0] in NAMES]
GROUPED = {"n_heads": 2, "n_value_heads": 4, "d_key": 8, "d_value": 8}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("case", [case for case, _ in FAMILY], ids=[label for _, label in FAMILY])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@torch.no_grad()
def test_equals_its_equations(case: tuple[str, dict[str, Any]], dtype: torch.dtype, bound: float) -> None:
    name, options = case
    mixer, x = make(name, options).to(dtype), tokens(90, dtype=dtype)
    want = delta_family(name, mixer, x.double(), options)
    assert relative(mixer(x, Ragged([90]))[0], want) < bound


@torch.no_grad()
def test_the_doubled_erase_gate_of_gdn2_leaves_the_write_alone() -> None:
    options = {"n_heads": 2, "d_key": 8, "d_value": 8}
    single, double = make("gdn2", options), make("gdn2", {**options, "erase_max": 2})
    x = tokens(1)
    # The first token finds nothing to erase: its output depends on the write gate alone.
    assert torch.equal(single(x, Ragged([1]))[0], double(x, Ragged([1]))[0])
    x = tokens(8)
    assert not torch.allclose(single(x, Ragged([8]))[0][-1], double(x, Ragged([8]))[0][-1])


@pytest.mark.parametrize("name", ["kda", "gdn", "deltanet"])
@torch.no_grad()
def test_a_doubled_beta_doubles_the_write_too(name: str) -> None:
    options = {"n_heads": 2, "d_key": 8, "d_value": 8}
    memories = [make(name, {**options, "beta_max": top})(tokens(1), Ragged([1]))[1]["memory"] for top in (1, 2)]
    assert torch.allclose(2 * memories[0], memories[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["gdn2", "gdn"])
@torch.no_grad()
def test_the_output_gate_is_what_was_asked_for(name: str) -> None:
    options = {"n_heads": 2, "d_key": 8, "d_value": 8}
    x = tokens(20)
    silu, sigmoid = (make(name, {**options, "gate": gate})(x, Ragged([20]))[0] for gate in ("silu", "sigmoid"))
    assert relative(silu, sigmoid.double()) > 0.1


@pytest.mark.parametrize("name", ["kda", "gdn"])
@torch.no_grad()
def test_beta_and_decay_belong_to_the_value_head(name: str) -> None:
    """Two value heads of one key head differ when only one's beta or decay changes."""
    mixer, x = make(name, GROUPED), tokens(20)
    before = mixer(x, Ragged([20]))[1]["memory"]
    for change in (mixer.b_proj.weight[1:2], mixer.A_log[1:2]):
        kept = change.clone()
        change += 0.5
        after = mixer(x, Ragged([20]))[1]["memory"]
        change.copy_(kept)
        assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
        assert not torch.allclose(after[:, 1], before[:, 1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_queries_are_scaled_after_the_norm(name: str) -> None:
    mixer, x = make(name, {"n_heads": 2, "d_key": 8, "d_value": 8}), tokens(20)
    q = mixer._fold(x, *(100 * getattr(mixer, f"{n}_proj")(x) for n in "qkv"))[0]
    assert torch.allclose(q.square().sum(-1), torch.full((20, 2), 1 / 8), rtol=1e-5)


@torch.no_grad()
def test_decay_comes_before_erase() -> None:
    """With decay per channel the order matters; the transcription decays first and agrees, the other order does not."""
    name, options = "kda", {"n_heads": 2, "d_key": 8, "d_value": 8}
    mixer, x = make(name, options).double(), tokens(40, dtype=torch.float64)
    y = mixer(x, Ragged([40]))[0]
    assert relative(y, delta_family(name, mixer, x, options)) < 1e-12
    mixer.A_log += 1e-3
    assert relative(y, delta_family(name, mixer, x, options)) > 1e-6


def test_the_bounded_gate_never_passes_its_bound() -> None:
    mixer = make("kda", {"n_heads": 1, "d_key": 8, "d_value": 8, "lower_bound": -5.0})
    x = 100 * tokens(50)
    g = mixer._fold(x, *(getattr(mixer, f"{n}_proj")(x) for n in "qkv")).g
    assert g.min() >= -5.0
    assert g.min() < -4.0
    assert g.max() <= 0.0


def test_published_initial_rates() -> None:
    torch.manual_seed(0)
    many = {"n_heads": 500, "d_key": 1, "d_value": 1}
    gdn, kda = build("gdn", 32, many), build("kda", 32, many)
    for mixer in (gdn, kda):
        mixer.reset_parameters()
        rate = torch.nn.functional.softplus(mixer.dt_bias)
        assert 0.99e-3 < rate.min() < 2e-3
        assert 0.05 < rate.max() < 0.101
        assert 15 < mixer.A_log.exp().max() < 16.001
    assert 0 < gdn.A_log.exp().min() < 0.5
    assert 0.999 < kda.A_log.exp().min() < 1.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kda", {"lower_bound": 5.0}, "lower_bound must be negative, got 5.0"),
        ("gdn", {"n_heads": 4, "n_value_heads": 6}, "n_value_heads must be a multiple of n_heads 4, got 6"),
        ("gdn", {"gate": "relu"}, "gate must be silu or sigmoid, got 'relu'"),
        ("deltanet", {"n_heads": 2, "n_value_heads": 4}, "one value head a key head"),
        ("kda", {"beta_max": 3}, "beta_max must be 1 or 2, got 3"),
        ("gdn", {"d_key": 0}, "d_key must be at least 1, got 0"),
        ("gdn", {"window": 4}, "mixer gdn has no option 'window'"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 32, options)
