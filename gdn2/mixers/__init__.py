"""The sequence mixers. A new one is one file here and one line in `REGISTRY`; tests, presets and tables follow."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gdn2.mixers.attention import Attention, AttentionConfig
from gdn2.mixers.deltanet import DeltaNet, DeltaNetConfig
from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.mixers.gdn import GatedDeltaNet, GDNConfig
from gdn2.mixers.gdn2 import GatedDeltaNet2, GDN2Config
from gdn2.mixers.kda import KDAConfig, KimiDeltaAttention
from gdn2.mixers.mamba1 import Mamba1, Mamba1Config
from gdn2.mixers.mamba2 import Mamba2, Mamba2Config
from gdn2.mixers.mamba3 import Mamba3, Mamba3Config
from gdn2.mixers.mla import LatentAttention, LatentConfig
from gdn2.mixers.parallel import Parallel, ParallelConfig

__all__ = ["REGISTRY", "Cost", "LayerState", "Mixer", "build"]

REGISTRY: dict[str, tuple[type[Mixer], type]] = {
    "attention": (Attention, AttentionConfig),
    "deltanet": (DeltaNet, DeltaNetConfig),
    "gdn": (GatedDeltaNet, GDNConfig),
    "gdn2": (GatedDeltaNet2, GDN2Config),
    "kda": (KimiDeltaAttention, KDAConfig),
    "mamba1": (Mamba1, Mamba1Config),
    "mamba2": (Mamba2, Mamba2Config),
    "mamba3": (Mamba3, Mamba3Config),
    "mla": (LatentAttention, LatentConfig),
    "parallel": (Parallel, ParallelConfig),
}


def build(name: str, d_model: int, options: dict[str, Any]) -> Mixer:
    """The mixer `name` for model width `d_model`.

    Raises:
        ValueError: an unknown mixer or option; the message names it and what exists.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown mixer {name!r}; known: {', '.join(sorted(REGISTRY))}")
    module, config = REGISTRY[name]
    known = {f.name for f in fields(config)} - {"d_model"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"mixer {name} has no option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return module(config(d_model=d_model, **options))
