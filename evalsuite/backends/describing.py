"""What records say about a model of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from evalsuite.types import EXACT, ModelInfo, Numbers, Tokenizer
from gdn2.kernels import choose
from gdn2.models import Decoder

Family = Literal["recurrent", "hybrid", "transformer"]


def _mixer(options: Mapping[str, object]) -> str:
    """A layer's mixer as tables call it: the two Mamba-3 are two."""
    name = str(options["mixer"])
    return name if name != "mamba3" else "mamba3_siso" if options.get("rank") is None else "mamba3_mimo"


def _kernels(model: Decoder) -> str:
    with torch.no_grad():  # as the requests are answered
        weight = model.embed.weight
        return choose(weight.device, model.blocks()[0].mixer.implementation, weight.dtype)


def kind(model: Decoder) -> tuple[str, Family]:
    """Mixer and family of a model as tables call them."""
    used = [_mixer(model.config.mixers[layer]) for layer in model.config.pattern]
    kinds = {layer.mixer.kind for layer in model.blocks()}
    family: Family = (
        "hybrid" if len(kinds) > 1 or "hybrid" in kinds else "recurrent" if kinds == {"recurrent"} else "transformer"
    )
    recurrent = [mixer for mixer, layer in zip(used, model.blocks(), strict=True) if layer.mixer.kind != "attention"]
    return "transformer" if family == "transformer" else "+".join(sorted(set(recurrent))), family


def describe(
    model: Decoder, name: str, checkpoint: str, tokenizer: Tokenizer, numbers: Numbers = EXACT
) -> ModelInfo:
    """What records say about a model."""
    config = model.config
    mixer, family = kind(model)
    weight = model.embed.weight
    identity = {
        "device": weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "kernels": _kernels(model),
        **{name: True for name, given in numbers._asdict().items() if given},
    }
    details = {"identity": identity, "train_length": config.train_length, "config": config.to_dict()}
    return ModelInfo(name, mixer, family, model.n_params(), checkpoint, tokenizer.digest, None, details)
