"""The named sizes: published counts to the parameter, a matched line-up, costs that are those of the modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn2.models import PRESETS, Decoder, describe, preset
from gdn2.models.presets import SCALES

TARGETS = {"1.3b": 1_300_000_000, "100m": 100_000_000, "25m": 25_000_000, "tiny": 900_000}
STEPS = {"1.3b": 32, "100m": 32, "25m": 32, "tiny": 16}
TABLE_2 = {"mamba2", "mamba3-siso", "mamba3-mimo", "gdn", "kda", "gdn2"}
LINEUP = [(size, model) for size, scale in SCALES.items() for model in scale.d_ff]


@pytest.mark.parametrize(
    ("name", "blocks", "total"),
    [
        ("gdn2-1.3b", 1_302_638_112, 1_450_096_416),
        ("gdn2-hybrid-1.3b", 1_300_314_384, 1_447_772_688),
        # The authors' first version has 9 parameters a recurrent layer that nothing reads.
        ("gdn1-0.4b", 467_684_492 - 11 * 9, 516_838_028 - 11 * 9),
        ("gdn1-h1-0.4b", 481_611_480 - 6 * 9, 530_765_016 - 6 * 9),
        ("gdn1-1.3b", 1_232_493_376 - 16 * 9, 1_309_295_776 - 16 * 9),
        ("gdn1-h1-1.3b", 1_242_878_148 - 9 * 9, 1_316_608_452 - 9 * 9),
    ],
)
def test_published_counts(name: str, blocks: int, total: int) -> None:
    with torch.device("meta"):
        model = Decoder(preset(name))
    assert (model.n_block_params(), model.n_params()) == (blocks, total)


@pytest.mark.parametrize("name", PRESETS)
def test_costs_are_those_of_the_built_model(name: str) -> None:
    config = preset(name)
    costs = describe(config)
    with torch.device("meta"):
        model = Decoder(config)
        state = model.new_state(1)
    assert config.name == name
    assert costs["params"] == model.n_params()
    assert costs["block_params"] == model.n_block_params()
    recurrent = cached = 0
    for layer, tensors in zip(model.blocks(), state.layers, strict=True):
        size = sum(
            t.numel() * (4 if key in ("memory", "theta") else 2) for key, t in tensors.items() if key != "position"
        )
        recurrent += size * (layer.mixer.kind == "recurrent")
        cached += size * (layer.mixer.kind == "attention")
    assert costs["state_bytes"] == recurrent
    assert costs["cache_bytes_128k"] == (cached or costs["cache_bytes_4k"] * 32)
    embedded = 0 if config.tied else config.vocab_size * config.d_model
    assert costs["flops_per_token"] > 2 * 0.99 * (costs["params"] - embedded)


@pytest.mark.parametrize("size", SCALES)
def test_each_scale_has_the_whole_table_2(size: str) -> None:
    models = set(SCALES[size].d_ff)
    assert models >= {"transformer", *TABLE_2, *(f"{m}-hybrid" for m in TABLE_2)}
    assert models - {"transformer", *TABLE_2, *(f"{m}-hybrid" for m in TABLE_2)} == (
        set() if size == "1.3b" else {"deltanet"}
    )


@pytest.mark.parametrize(("size", "model"), LINEUP)
def test_the_lineup_is_matched(size: str, model: str) -> None:
    """Blocks as near the target as a step of the MLP width allows, and the same recurrent state in every layer."""
    config, target = preset(f"{model}-{size}"), TARGETS[size]
    blocks = describe(config)["block_params"]
    assert abs(blocks / target - 1) < (0.005 if size == "1.3b" else 0.013)
    if (size, model) not in {("1.3b", "gdn2"), ("1.3b", "gdn2-hybrid")}:  # published, not solved for
        assert config.d_ff is not None and config.d_ff % STEPS[size] == 0
        for step in (-STEPS[size], STEPS[size]):
            other = describe(replace(config, d_ff=config.d_ff + step))["block_params"]
            assert abs(other - target) >= abs(blocks - target)
    scale = SCALES[size]
    assert config.pattern == tuple(config.pattern[i % 2] for i in range(scale.n_layers))
    with torch.device("meta"):
        layer = Decoder(config).new_state(1).layers[0]
    want = scale.heads[0] * scale.heads[1] ** 2
    assert "memory" not in layer if model == "transformer" else layer["memory"].numel() == want
    assert size != "1.3b" or want == 262_144


def test_tiny_models_are_within_three_percent_of_each_other() -> None:
    totals = {model: describe(preset(f"{model}-tiny"))["params"] for model in SCALES["tiny"].d_ff}
    assert len(totals) == 14
    assert max(totals.values()) / min(totals.values()) < 1.03
    assert 800_000 < min(totals.values()) < max(totals.values()) < 1_500_000
    assert SCALES["tiny"].window < SCALES["tiny"].train_length


def test_hybrids_alternate_and_look_through_a_window() -> None:
    for size, model in LINEUP:
        config = preset(f"{model}-{size}")
        windows = [config.mixers[name].get("window") for name in config.pattern]
        recurrent = model.removesuffix("-hybrid") != "transformer"
        expected = [None, SCALES[size].window] if model.endswith("-hybrid") else [None, None]
        assert windows == expected * (config.n_layers // 2)
        assert (config.mixers[config.pattern[0]]["mixer"] != "attention") == recurrent
    assert preset("gdn2-hybrid-1.3b").mixers["window"]["window"] == 2048


def test_caches_grow_with_the_length_only_without_a_window() -> None:
    full, hybrid = describe(preset("transformer-25m")), describe(preset("gdn2-hybrid-25m"))
    assert full["cache_bytes_128k"] == 32 * full["cache_bytes_4k"] > 0
    assert hybrid["cache_bytes_128k"] == hybrid["cache_bytes_4k"] == 4 * 2 * 2 * 1024 * 384
    assert full["flops_per_past_token"] == 8 * 4 * 384
    assert hybrid["flops_per_past_token"] == full["state_bytes"] == 0
    wide = replace(preset("gdn2-hybrid-25m"), mixers={
        name: {**options, **({"window": 16384} if name == "window" else {})}
        for name, options in preset("gdn2-hybrid-25m").mixers.items()
    })  # fmt: skip
    assert describe(wide)["cache_bytes_4k"] * 4 == describe(wide)["cache_bytes_128k"]
