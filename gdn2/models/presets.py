"""Named sizes, as data: the published configurations, and a matched line-up of every mixer at four scales.

The line-up compares layers, so what is not the layer is equal: width, depth, tokenizer, the floats of recurrent state
a layer (262,144 at 1.3B), and the parameters of the blocks. The MLP width is what was solved for, to the nearest
multiple of 32 (16 at the tiny scale); the paper's own baselines are unpublished. The Mamba layers have as many heads of
64 as give that state, so at width 2304 their inner width is 4096 rather than twice the model's.

Hybrids alternate the recurrent layer with a sliding window, recurrent first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gdn2.models.config import ModelConfig

PAPER_WINDOW = 2048


@dataclass(frozen=True)
class Scale:
    """What the models of one line-up share."""

    d_model: int
    n_layers: int
    vocab_size: int
    heads: tuple[int, int]  # delta-rule mixers: heads and their key and value width
    mamba: tuple[int, int, int]  # heads, head width, state width
    attention: tuple[int, int]  # heads and their width
    window: int  # of a hybrid's attention, well below the training length
    train_length: int
    tied: bool
    d_ff: Mapping[str, int]  # MLP width of each model


SCALES: dict[str, Scale] = {
    "1.3b": Scale(
        2304, 18, 32000, (16, 128), (64, 64, 64), (18, 128), PAPER_WINDOW, 4096, False,
        {
            "transformer": 7392, "mamba2": 6272, "mamba3-siso": 6240, "mamba3-mimo": 6112,
            "gdn": 7008, "kda": 7552, "gdn2": 6208,  # gdn2 as published
            "mamba2-hybrid": 6816, "mamba3-siso-hybrid": 6816, "mamba3-mimo-hybrid": 6752,
            "gdn-hybrid": 7200, "kda-hybrid": 7456, "gdn2-hybrid": 6784,  # gdn2 as published
        },
    ),
    "100m": Scale(
        768, 12, 32000, (6, 128), (24, 64, 64), (6, 128), PAPER_WINDOW, 4096, True,
        {
            "transformer": 2592, "mamba2": 2016, "mamba3-siso": 2016, "mamba3-mimo": 1856,
            "deltanet": 2592, "gdn": 2336, "kda": 2400, "gdn2": 1920,
            "mamba2-hybrid": 2304, "mamba3-siso-hybrid": 2304, "mamba3-mimo-hybrid": 2240,
            "gdn-hybrid": 2464, "kda-hybrid": 2496, "gdn2-hybrid": 2240,
        },
    ),
    "25m": Scale(
        384, 8, 32000, (3, 128), (12, 64, 64), (6, 64), 1024, 2048, True,
        {
            "transformer": 2208, "mamba2": 1888, "mamba3-siso": 1888, "mamba3-mimo": 1728,
            "deltanet": 2208, "gdn": 2080, "kda": 2016, "gdn2": 1760,
            "mamba2-hybrid": 2048, "mamba3-siso-hybrid": 2048, "mamba3-mimo-hybrid": 1984,
            "gdn-hybrid": 2144, "kda-hybrid": 2112, "gdn2-hybrid": 1984,
        },
    ),
    "tiny": Scale(
        128, 4, 2048, (2, 64), (4, 64, 32), (2, 64), 128, 1024, True,
        {
            "transformer": 416, "mamba2": 304, "mamba3-siso": 304, "mamba3-mimo": 224,
            "deltanet": 416, "gdn": 368, "kda": 320, "gdn2": 240,
            "mamba2-hybrid": 352, "mamba3-siso-hybrid": 352, "mamba3-mimo-hybrid": 320,
            "gdn-hybrid": 384, "kda-hybrid": 368, "gdn2-hybrid": 320,
        },
    ),
}  # fmt: skip


def _mixer(model: str, scale: Scale) -> dict[str, Any]:
    """The options of the recurrent (or only) layer of `model`."""
    kind = model.removesuffix("-hybrid")
    if kind == "transformer":
        return {"mixer": "attention", "n_heads": scale.attention[0], "d_head": scale.attention[1]}
    if kind.startswith("mamba"):
        heads, width, states = scale.mamba
        rank = {"rank": 4} if kind == "mamba3-mimo" else {}
        return {"mixer": kind.partition("-")[0], "n_heads": heads, "d_head": width, "d_state": states, **rank}
    heads, width = scale.heads
    return {"mixer": kind, "n_heads": heads, "d_key": width, "d_value": width}


def _lineup(model: str, size: str) -> ModelConfig:
    scale = SCALES[size]
    name = model.removesuffix("-hybrid")
    layers: tuple[str, ...] = (name,)
    mixers = {name: _mixer(model, scale)}
    if model.endswith("-hybrid"):
        heads, width = scale.attention
        mixers["window"] = {"mixer": "attention", "n_heads": heads, "d_head": width, "window": scale.window}
        layers = (name, "window")
    return ModelConfig(
        d_model=scale.d_model, vocab_size=scale.vocab_size, d_ff=scale.d_ff[model], tied=scale.tied,
        pattern=layers * (scale.n_layers // len(layers)), mixers=mixers,
        train_length=scale.train_length, name=f"{model}-{size}",
    )  # fmt: skip


FIRST_VERSION = {
    # The authors' first Gated DeltaNet (arXiv 2412.06464): layers, heads of attention, width, MLP width, hybrid.
    "gdn1-0.4b": (11, 12, 1536, 6144, False),
    "gdn1-h1-0.4b": (12, 12, 1536, 6144, True),
    "gdn1-1.3b": (16, 16, 2400, 5888, False),
    "gdn1-h1-1.3b": (18, 18, 2304, 6144, True),
}


def _first_version(name: str) -> ModelConfig:
    n_layers, heads, d_model, d_ff, hybrid = FIRST_VERSION[name]
    keys, values = d_model * 3 // 4 // 9, d_model * 3 // 2 // 9
    gdn = {"mixer": "gdn", "n_heads": 9, "d_key": keys, "d_value": values, "beta_bias": True}
    window = {
        "mixer": "attention", "n_heads": heads, "d_head": d_model // heads, "window": PAPER_WINDOW, "rotary_bf16": True,
    }  # fmt: skip
    return ModelConfig(
        d_model=d_model, vocab_size=32000, d_ff=d_ff, tied=True, train_length=4096, name=name,
        pattern=("gdn", "window") * (n_layers // 2) if hybrid else ("gdn",) * n_layers,
        mixers={"gdn": gdn, "window": window} if hybrid else {"gdn": gdn},
    )  # fmt: skip


def _paper_width() -> ModelConfig:
    """GDN-2 at the width the paper's text names; its MLP width is solved for 1.3B like the line-up's."""
    mixer = {"mixer": "gdn2", "n_heads": 16, "d_key": 128, "d_value": 128}
    return ModelConfig(
        d_model=2048, vocab_size=32000, d_ff=7488, pattern=("gdn2",) * 18, mixers={"gdn2": mixer},
        train_length=4096, name="gdn2-1.3b-d2048",
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    **{f"{model}-{size}": partial(_lineup, model, size) for size, scale in SCALES.items() for model in scale.d_ff},
    **{name: partial(_first_version, name) for name in FIRST_VERSION},
    "gdn2-1.3b-d2048": _paper_width,
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`.

    Raises:
        KeyError: no such preset.
    """
    return PRESETS[name]()
