"""Whole layers on the kernels: prefill, decoding and gradients equal those of plain torch."""

from __future__ import annotations

import pytest
import torch

from gdn2.mixers import Mixer, build
from gdn2.mixers.conv import ShortConv
from gdn2.models import Decoder, preset
from gdn2.ragged import Ragged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"n_heads": 2, "d_key": 16, "d_value": 16}


def layer(name: str, implementation):
    torch.manual_seed(1)
    mixer = build(name, 32, SMALL)
    mixer.reset_parameters()
    mixer.to(DEVICE)
    for part in mixer.modules():
        if part is mixer or isinstance(part, ShortConv):
            part.implementation = implementation
    return mixer


@pytest.mark.parametrize("name", ["gdn2", "kda", "gdn", "deltanet"])
def test_layer_on_kernels_equals_torch(name: str) -> None:
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ragged = Ragged([9, 11], DEVICE)
    more = torch.randn(2, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    found = {}
    for implementation in ("torch", "triton"):
        mixer = layer(name, implementation)
        y, state = mixer(x, ragged)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in mixer.named_parameters()}
        with torch.no_grad():
            state = {n: t.detach().clone() for n, t in state.items()}
            stepped = mixer.step(more, state)
        found[implementation] = {"y": y.detach(), "step": stepped, **state, **grads}
    for key, want in found["torch"].items():
        got = found["triton"][key]
        assert want is not None and got is not None, key
        assert float((got - want).norm()) <= 3e-5 * float(want.norm()) + 1e-7, key


def test_a_decoder_hands_its_choice_to_every_part() -> None:
    model = Decoder(preset("gdn2-tiny")).use("triton")
    chosen = [part.implementation for part in model.modules() if isinstance(part, (Mixer, ShortConv))]
    assert len(chosen) > len(list(model.blocks())) and set(chosen) == {"triton"}
