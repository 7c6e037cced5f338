"""The check before each run passes on sound models and fails on broken ones."""

import math

import pytest
import torch

from evalsuite.backends.selfcheck import first_bad_part, self_check
from gdn2.mixers import REGISTRY, linear
from gdn2.models import Decoder, ModelConfig


def make(mixer: str = "gdn2", **options: object) -> Decoder:
    config = ModelConfig(
        d_model=128,
        vocab_size=64,
        pattern=("mixer", "mixer"),
        mixers={"mixer": {"mixer": mixer, **options}},
        d_ff=192,
    )
    model = Decoder(config)
    model.reset_parameters(seed=1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("mixer", sorted(REGISTRY))
def test_every_mixer_passes(mixer: str) -> None:
    found = self_check(make(mixer))
    assert found.failures(torch.float32) == []
    assert found[1:] == (0.0, 0.0, 0.0)


def test_a_decoding_step_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    mixer = model.blocks()[1].mixer
    step = mixer.step

    def forgetful(x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        state["memory"].mul_(0.9)
        return step(x, state)

    monkeypatch.setattr(mixer, "step", forgetful)
    (failure,) = self_check(model).failures(torch.float32)
    assert failure.startswith("chunk against recurrent differ by")


def test_products_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def uneven(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias) * (1 + 1e-6 * len(x))

    monkeypatch.setattr(linear, "blocked", uneven)
    failures = " ".join(self_check(make()).failures(torch.float32))
    assert "packed against single" in failures
    assert "pieces against whole" in failures


def test_what_is_not_finite_is_left_out() -> None:
    model = make(n_heads=2, d_key=16, d_value=16)
    model.embed.weight[7] = math.nan
    assert self_check(model).failures(torch.float32) == []
    model.embed.weight.fill_(math.nan)
    assert self_check(model) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embed.weight", "embedding"),
        ("layers.0.mixer.o_proj.weight", "layer 0 mixer"),
        ("layers.1.mlp.down.weight", "layer 1 mlp"),
        ("norm.weight", "final norm"),
        ("head.weight", "output head"),
    ],
)
def test_the_first_bad_part_is_named(name: str, part: str) -> None:
    model = make(n_heads=2, d_key=16, d_value=16)
    dict(model.named_parameters())[name].fill_(math.nan)
    assert first_bad_part(model, torch.arange(20)) == part
    assert first_bad_part(model, torch.arange(20), piece=7) == part


def test_it_takes_less_than_five_seconds():
    """CPU time, which a busy machine does not change; the first check of a process also loads the compiled loops."""
    import time

    from evalsuite.backends.native import load

    backend = load("gdn2-tiny")
    began = time.process_time()
    backend.self_check()
    assert time.process_time() - began < 5
    began = time.process_time()
    assert backend.self_check()["pieces_against_whole"] == 0.0
    assert time.process_time() - began < 1.5
