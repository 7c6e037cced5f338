"""Latent attention on the latents themselves equals attention with every key and value written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn2.mixers import build
from gdn2.ragged import Ragged
from tests.gdn2.mixers.transcribed import mla
from tests.gdn2.mixers.variants import SMALL, make, tokens


@pytest.mark.parametrize("options", SMALL["mla"].values(), ids=list(SMALL["mla"]))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("train", [False, True])
def test_equals_its_equation(options: dict[str, Any], dtype: torch.dtype, bound: float, train: bool) -> None:
    mixer, x = make("mla", options).to(dtype), tokens(230, dtype=dtype)
    want = mla(mixer, x.double(), options)
    with torch.set_grad_enabled(train):
        got = mixer(x, Ragged([230]))[0].detach()
    assert ((got.double() - want).norm() / want.norm()).item() < bound


@torch.no_grad()
def test_the_cache_holds_latents_alone() -> None:
    """Kimi-Linear's own sizes: 576 numbers a token, where keys and values of all heads are 10,240."""
    with torch.device("meta"):
        mixer = build("mla", 2304, {})
    assert mixer.cost().bytes_per_token == 2 * 576
    mixer = make("mla", SMALL["mla"][""])
    _, state = mixer(tokens(70), Ragged([70]))
    assert state["latents"].shape[:2] == (1, 1) and state["latents"].shape[3] == 16
    assert state["latents"][0, 0, 70:].eq(0).all()


@pytest.mark.parametrize("name", ["n_heads", "d_latent", "d_key", "d_shared", "d_value"])
def test_wrong_sizes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        build("mla", 32, {name: 0})
