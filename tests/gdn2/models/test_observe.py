"""Watching a model read changes no bit, and what is seen is what the layers compute with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdn2.kernels import delta_rule
from gdn2.kernels.watch import WATCHER
from gdn2.mixers import REGISTRY
from gdn2.models import Decoder, ModelConfig, Observed, observe, preset
from gdn2.models.presets import SCALES
from gdn2.ragged import Ragged

TINY = [f"{model}-tiny" for model in SCALES["tiny"].d_ff]
LENGTHS = (70, 0, 33)


# Mamba-1 is in no preset: checkpoints alone have it.
MAMBA1 = ModelConfig(16, 2048, ("mamba1", "mamba1"), {"mamba1": {"mixer": "mamba1", "d_state": 8}})
CONFIGS = {name: preset(name) for name in TINY} | {"mamba1": MAMBA1}


def tiny(name: str) -> Decoder:
    model = Decoder(CONFIGS[name])
    model.reset_parameters(seed=1)
    return model.eval()


def words(count: int) -> Tensor:
    return torch.randint(2048, (count,), generator=torch.Generator().manual_seed(0))


def watched(model: Decoder) -> tuple[Tensor, list[Observed]]:
    seen: list[Observed] = []
    with observe(model, seen.append):
        hidden, _ = model(words(sum(LENGTHS)), Ragged(LENGTHS))
    return model.logits(hidden), seen


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_the_same_bits_and_one_look_a_recurrent_layer(name: str) -> None:
    model = tiny(name)
    ids, ragged = words(sum(LENGTHS)), Ragged(LENGTHS)
    before, state = model(ids, ragged)
    logits, seen = watched(model)
    assert torch.equal(logits, model.logits(before))
    recurrent = [str(i) for i, layer in enumerate(model.blocks()) if layer.mixer.kind == "recurrent"]
    assert [s.layer for s in seen] == recurrent
    for s in seen:
        assert torch.equal(s.after, state.layers[int(s.layer)]["memory"])


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_what_is_seen_gives_the_state_and_holds_the_gates(name: str) -> None:
    model = tiny(name)
    for s in watched(model)[1]:
        r = s.rows
        inputs = [None if x is None else x[None] for x in (r.q, r.k, r.e, r.z, r.g)]
        _, after = delta_rule(*inputs, s.before, r.starts, rank=r.rank)
        assert torch.equal(after, s.after) and r.lengths == tuple(r.rank * n for n in LENGTHS)
        if r.e is None:
            assert s.erase is None and s.write is None
            continue
        assert s.erase is not None and s.write is not None
        heads = s.erase.shape[1]
        assert torch.allclose(s.erase * r.k.repeat_interleave(heads // r.k.shape[1], 1), r.e, atol=1e-7)
        assert min(s.erase.min(), s.write.min()) > 0 and max(s.erase.max(), s.write.max()) <= 1


def test_every_recurrent_mixer_is_among_them() -> None:
    used = {mixer["mixer"] for config in CONFIGS.values() for mixer in config.mixers.values()}
    assert {name for name, (mixer, _) in REGISTRY.items() if mixer.kind == "recurrent"} <= used


@torch.inference_mode()
def test_a_part_of_a_parallel_layer_has_a_name_of_its_own() -> None:
    small = {"mixer": "mamba2", "n_heads": 2, "d_head": 8, "d_state": 8}
    parts = {"attention": {"mixer": "attention", "n_heads": 1, "d_head": 8}, "first": small, "second": small}
    mixers = {"both": {"mixer": "parallel", "parts": parts}, "one": small}
    model = Decoder(ModelConfig(16, 2048, ("one", "both"), mixers))
    model.reset_parameters(seed=1)
    assert [s.layer for s in watched(model)[1]] == ["0", "1.first", "1.second"]


@torch.inference_mode()
def test_nobody_watches_afterwards_whatever_happens() -> None:
    model = tiny("gdn2-tiny")
    seen: list[Observed] = []
    with pytest.raises(ValueError, match="packed tokens"), observe(model, seen.append):
        model(words(3), Ragged([4]))
    model(words(4), Ragged([4]))
    assert not seen and WATCHER.get() is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    with observe(model, seen.append):
        model.step(words(2), model.new_state(2))  # decoding is not watched
    assert not seen
