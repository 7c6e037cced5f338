"""What a configuration costs, from the formulas of its mixers: no weights, no memory."""

from __future__ import annotations

from gdn2.mixers import Cost, Mixer, build
from gdn2.models.config import ModelConfig

LENGTHS = {"4k": 4096, "128k": 131072}


def describe(config: ModelConfig) -> dict[str, int]:
    """Sizes of a model, at bf16 activations and fp32 recurrent state.

    Returns:
        params: all of them; a tied output head counts once.
        block_params: without embedding, output head and final norm.
        flops_per_token: of a forward step without full attention's share, which grows with the tokens before.
        flops_per_past_token: that share: what each earlier token adds.
        state_bytes: of the recurrent layers, a sequence, at any length.
        cache_bytes_4k, cache_bytes_128k: keys and values of the attention layers after so many tokens, a sequence.
    """
    costs = {name: _layer(config, name) for name in dict.fromkeys(config.pattern)}
    layers = [costs[name] for name in config.pattern]
    mlp = 3 * config.d_model * (config.d_ff or 0)
    norms = config.d_model * (2 if config.d_ff else 1)
    blocks = sum(cost.params + mlp + norms for _, _, cost in layers)
    table = config.vocab_size * config.d_model
    out = {
        "params": blocks + config.d_model + table * (1 if config.tied else 2),
        "block_params": blocks,
        "flops_per_token": sum(cost.flops_per_token + 2 * mlp for _, _, cost in layers) + 2 * table,
        "flops_per_past_token": sum(cost.flops_per_past_token for _, _, cost in layers),
        "state_bytes": sum(cost.state_bytes for kind, _, cost in layers if kind != "attention"),
    }
    for label, length in LENGTHS.items():
        out[f"cache_bytes_{label}"] = sum(
            (cost.state_bytes * min(length, window or length) // (window or 1) if kind == "attention" else 0)
            + cost.bytes_per_token * length
            for kind, window, cost in layers
        )
    return out


def _layer(config: ModelConfig, name: str) -> tuple[str, int | None, Cost]:
    """A layer's kind, its window and its cost. The module is built without memory."""
    import torch

    options = dict(config.mixers[name])
    with torch.device("meta"):
        mixer: Mixer = build(options.pop("mixer"), config.d_model, options)
    return mixer.kind, options.get("window"), mixer.cost()
