"""A model's configuration survives JSON, and every wrong value is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gdn2.models import PRESETS, Decoder, ModelConfig, preset

GOOD: dict[str, Any] = {
    "d_model": 32,
    "vocab_size": 64,
    "pattern": ["a", "b", "a"],
    "mixers": {
        "a": {"mixer": "gdn", "n_heads": 1, "d_key": 8, "d_value": 8},
        "b": {"mixer": "attention", "n_heads": 2},
    },
    "post_norm": ["b"],
    "residual_fp32": True,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_any_pattern_is_a_model() -> None:
    config = ModelConfig.from_dict(GOOD)
    model = Decoder(config)
    assert [layer.mixer.kind for layer in model.blocks()] == ["recurrent", "attention", "recurrent"]
    assert [layer.norm_after for layer in model.blocks()] == [False, True, False]
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer from 1 to"),
        ({"vocab_size": 3.5}, "vocab_size must be an integer"),
        ({"pattern": []}, "pattern must name 1 to"),
        ({"pattern": ["a", "c"]}, "pattern names 'c', which is not in mixers"),
        ({"pattern": "ab"}, "pattern must be a list of names"),
        ({"post_norm": ["z"]}, "post_norm names 'z', which is not in mixers"),
        ({"post_norm": "b"}, "post_norm must be a list of names, got 'b'"),
        ({"norm_eps": 2.0}, "norm_eps must lie between 0 and 1, got 2.0"),
        ({"mixers": {"a": {}, "b": {"mixer": "gdn"}}}, "must name its mixer"),
        ({"depth": 3}, "unknown key 'depth' in the model configuration"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**GOOD, **change})


def test_missing_values_are_named() -> None:
    with pytest.raises(ValueError, match="lacks 'pattern'"):
        ModelConfig.from_dict({key: value for key, value in GOOD.items() if key != "pattern"})


def test_an_unknown_mixer_is_named() -> None:
    with pytest.raises(ValueError, match="unknown mixer 'rwkv'; known: attention"):
        Decoder(ModelConfig.from_dict({**GOOD, "mixers": {**GOOD["mixers"], "b": {"mixer": "rwkv"}}}))
