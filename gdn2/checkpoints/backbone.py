"""Writing fla's `mamba`, `mamba2`, `mamba3` and `samba` directories, which call a model's layers `backbone.layers`."""

from __future__ import annotations

from typing import Any

from gdn2.checkpoints import fla
from gdn2.checkpoints.mamba import hf_table
from gdn2.checkpoints.mamba1 import table as mamba1_table
from gdn2.checkpoints.tables import Table, mixer_config
from gdn2.errors import CheckpointError
from gdn2.models import Decoder, ModelConfig

ARCHITECTURES = {
    "mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "mamba3": "Mamba3ForCausalLM",
    "samba": "SambaForCausalLM",
}  # fmt: skip


def kind_of(config: ModelConfig) -> str | None:
    """The model type fla gives such a model; None where it has none of these."""
    kinds = {config.mixers[name]["mixer"] for name in config.pattern}
    if config.post_norm or len(kinds) != len(set(config.pattern)):
        return None
    if config.d_ff is not None:
        return "samba" if "mamba1" in kinds and kinds <= {"mamba1", "attention"} else None
    return {"mamba1": "mamba", "mamba2": "mamba2", "mamba3": "mamba3"}.get(*kinds) if len(kinds) == 1 else None


def describe(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model of `kind_of`.

    Raises:
        CheckpointError: an option that fla does not have; the message names it.
    """
    kind = str(kind_of(config))
    main = next(name for name in config.pattern if config.mixers[name]["mixer"].startswith("mamba"))
    o = mixer_config(config, main)
    inner = o.inner if kind in ("mamba", "samba") else o.d_inner
    if inner % config.d_model:
        raise CheckpointError(f"fla's Mamba is a multiple of the model's width {config.d_model} wide, not {inner}")
    out: dict[str, Any] = {
        "model_type": kind, "architectures": [ARCHITECTURES[kind]], "hidden_size": config.d_model,
        "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layers, "norm_eps": config.norm_eps,
        "hidden_act": "swish" if kind == "samba" else "silu", "tie_word_embeddings": config.tied,
        "residual_in_fp32": config.residual_fp32,
        "dtype": "float32", "expand": inner // config.d_model, "state_size": o.d_state,
    }  # fmt: skip
    if kind not in ("mamba", "samba"):
        return out | (_mamba2(o, config) if kind == "mamba2" else _mamba3(o, config))
    out |= {"conv_kernel": o.conv_taps, "use_conv_bias": True, "use_bias": o.proj_bias}
    out["time_step_rank" if kind == "samba" else "dt_rank"] = o.rank
    if kind == "samba":
        out["hidden_ratio"] = _ratio(config)
        full = [i for i, name in enumerate(config.pattern) if name != main]
        if full:
            softmax = fla.describe_attention(mixer_config(config, config.pattern[full[0]]), config.d_model)
            out["attn"] = {"layers": full, **softmax}
    return out


def table(model: Decoder) -> Table:
    """fla's names for a model of `kind_of`."""
    return mamba1_table(model) if kind_of(model.config) in ("mamba", "samba") else hf_table(model)


def _ratio(config: ModelConfig) -> int:
    """The factor from which fla's Samba, which states no width, makes the MLP's."""
    for ratio in range(1, 65):
        if 256 * -(-int(config.d_model * ratio * 2 / 3) // 256) == config.d_ff:
            return ratio
    raise CheckpointError(f"fla's Samba has no MLP {config.d_ff} wide: widths are multiples of 256 made from a factor")


def _mamba2(o: Any, config: ModelConfig) -> dict[str, Any]:
    if not o.norm or o.normed_groups != o.n_groups or o.norm_eps != config.norm_eps:
        raise CheckpointError("fla's Mamba-2 normalises its output, a group at a time, with the model's own norm_eps")
    limit = {"dt_limit": list(o.dt_limit)} if o.dt_limit is not None else {}
    return {
        "num_heads": o.n_heads, "head_dim": o.d_head, "n_groups": o.n_groups, "conv_kernel": o.conv_taps,
        "use_conv_bias": o.conv_bias, "use_bias": o.proj_bias, "norm_before_gate": o.norm_before_gate, **limit,
    }  # fmt: skip


def _mamba3(o: Any, config: ModelConfig) -> dict[str, Any]:
    if o.a_activation != "softplus":
        raise CheckpointError("fla's Mamba-3 computes A by softplus and this model by heavy_tail")
    if o.pairing is not None or o.norm_eps != config.norm_eps:
        raise CheckpointError("fla's Mamba-3 has one pairing of channels and one norm_eps; this model has others")
    return {
        "head_dim": o.d_head, "n_groups": o.n_groups, "rope_fraction": o.rope_fraction, "A_floor": o.a_floor,
        "is_outproj_norm": o.out_norm, "is_mimo": o.rank is not None, "mimo_rank": o.rank or 4, "use_bias": False,
    }  # fmt: skip
