"""Small mixers of every registered kind for the contract tests; one without an entry is tested with its defaults."""

from __future__ import annotations

from typing import Any

import torch

from gdn2.mixers import REGISTRY, Mixer, build

D_MODEL = 32
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "gdn2": {"": {"n_heads": 2, "d_key": 8, "d_value": 12}},
    "kda": {
        "": {"n_heads": 2, "d_key": 8, "d_value": 12},
        "grouped, bounded": {"n_heads": 1, "n_value_heads": 2, "d_key": 8, "d_value": 8, "lower_bound": -5.0},
        "no gate bias": {"n_heads": 1, "d_key": 8, "d_value": 8, "gate_bias": False, "beta_max": 2},
    },
    "gdn": {
        "": {"n_heads": 2, "n_value_heads": 4, "d_key": 8, "d_value": 16},
        "first version": {"n_heads": 3, "d_key": 12, "d_value": 24, "beta_bias": True},
        "sigmoid, range 2": {"n_heads": 2, "d_key": 8, "d_value": 8, "beta_max": 2, "gate": "sigmoid"},
    },
    "deltanet": {"": {"n_heads": 2, "d_key": 8, "d_value": 12}},
    "mamba1": {
        "": {"d_inner": 24, "d_state": 8},
        "biased": {"d_inner": 16, "d_state": 16, "dt_rank": 3, "proj_bias": True},
    },
    "mamba2": {
        "": {"n_heads": 4, "d_head": 8, "d_state": 8},
        "groups, limited": {
            "n_heads": 4,
            "d_head": 8,
            "d_state": 8,
            "n_groups": 2,
            "dt_limit": (0.02, 0.1),
            "proj_bias": True,
        },
        "norm first": {"n_heads": 2, "d_head": 8, "d_state": 8, "norm_before_gate": True, "conv_bias": False},
        "no norm": {"n_heads": 1, "d_head": 8, "d_state": 8, "norm": False},
    },
    "mamba3": {
        "siso": {"n_heads": 4, "d_head": 8, "d_state": 16},
        "siso, heavy tail, normed, halves": {
            "n_heads": 2,
            "d_head": 8,
            "d_state": 8,
            "a_activation": "heavy_tail",
            "out_norm": True,
            "pairing": "halves",
            "rope_fraction": 1.0,
        },
        "mimo": {"n_heads": 2, "d_head": 8, "d_state": 16, "rank": 4},
        "mimo, normed, grouped": {
            "n_heads": 4,
            "d_head": 4,
            "d_state": 8,
            "rank": 2,
            "n_groups": 2,
            "out_norm": True,
            "pairing": "neighbours",
        },
    },
    "mla": {
        "": {"n_heads": 3, "d_latent": 12, "d_key": 8, "d_shared": 4, "d_value": 10},
        "wide values": {"n_heads": 1, "d_latent": 8, "d_key": 4, "d_shared": 2, "d_value": 16},
    },
    "parallel": {
        "": {
            "parts": {
                "attention": {"mixer": "attention", "n_heads": 2, "d_head": 8},
                "mamba2": {"mixer": "mamba2", "n_heads": 4, "d_head": 8, "d_state": 8},
            }
        },
    },
    "attention": {
        "full": {"n_heads": 2, "d_head": 16},
        "window": {"n_heads": 2, "d_head": 16, "window": 40},
        "wide window, grouped": {"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "window": 200, "rotary": 4},
        "one key head, normed, gated": {
            "n_heads": 3,
            "n_kv_heads": 1,
            "d_head": 8,
            "qk_norm": "head",
            "gate": True,
            "rotary": 0,
            "qkv_bias": True,
        },
        "convolved": {"n_heads": 1, "d_head": 16, "conv_taps": 4, "qk_norm": "all", "out_bias": True, "window": 64},
    },
}

CASES = [
    (name, options)
    for name in sorted(REGISTRY)
    for options in SMALL.get(name, {"": {}}).values()
]  # fmt: skip
IDS = [
    f"{name} {label}".strip()
    for name in sorted(REGISTRY)
    for label in SMALL.get(name, {"": {}})
]  # fmt: skip


def make(name: str, options: dict[str, Any], seed: int = 0) -> Mixer:
    """The mixer with every parameter moved off its initial value, so that none can go unused unnoticed."""
    torch.manual_seed(seed)
    mixer = build(name, D_MODEL, options)
    mixer.reset_parameters()
    with torch.no_grad():
        for parameter in mixer.parameters():
            spread = parameter.abs().mean() if parameter.ndim > 1 else torch.tensor(0.3)
            parameter.add_(spread * torch.randn_like(parameter))
    return mixer


def tokens(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random inputs [count, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)
