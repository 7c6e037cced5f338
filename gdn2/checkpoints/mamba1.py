"""Mamba-1: the `mamba` directories of transformers and of fla, and fla's `samba`, where attention and MLPs are beside
it."""

from __future__ import annotations

from collections.abc import Mapping

from gdn2.checkpoints import fla
from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.mamba import HF_TOP, LAYER, SILU, Read
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.tables import LayerNames, Table, build_table
from gdn2.errors import CheckpointError
from gdn2.models import Decoder, ModelConfig

SAMBA = {**fla.LAYER, "mixer_norm.weight": "mixer_norm.weight", "mixer.*": "mixer."}


def mamba(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """`model_type: mamba` of transformers and of fla."""
    raw.only(hidden_act=SILU)
    return _model(raw, "layer_norm_epsilon" if raw.has("layer_norm_epsilon") else "norm_eps", None), table


def samba(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """`model_type: samba` of fla; the MLP's width is read from the tensors."""
    raw.only(hidden_act=SILU, attnres_block_size=(None,))
    width = tensors.get("backbone.layers.0.mlp.gate_proj.weight")
    if width is None or len(width.shape) != 2:
        raise CheckpointError(f"{raw.where}: the weights lack the matrix backbone.layers.0.mlp.gate_proj.weight")
    return _model(raw, "norm_eps", width.shape[0]), table


def _model(raw: Fields, eps: str, d_ff: int | None) -> ModelConfig:
    """The configuration; its defaults without an MLP, `d_ff`, are transformers'."""
    raw.only(use_conv_bias=(True,))
    n, d_model = raw.integer("num_hidden_layers"), raw.integer("hidden_size")
    hybrid = raw.table("attn")
    full = set(hybrid.integers("layers", ()))
    if full - set(range(n)):
        raise hybrid.refuse("layers", f"numbers below {n}")
    pattern = tuple("attention" if i in full else "mamba1" for i in range(n))
    rank = "time_step_rank" if raw.has("time_step_rank") else "dt_rank"  # the latter in fla's mamba
    options = {
        "mixer": "mamba1", "d_inner": raw.integer("expand", 2) * d_model, "d_state": raw.integer("state_size", 16),
        "dt_rank": None if raw.data.get(rank) in (None, "auto") else raw.integer(rank),
        "conv_taps": raw.integer("conv_kernel", 4), "proj_bias": raw.flag("use_bias", False),
    }  # fmt: skip
    mixers = {"mamba1": options} | ({"attention": fla.attention(hybrid, d_model)} if full else {})
    return ModelConfig(
        d_model=d_model, vocab_size=raw.integer("vocab_size"), pattern=pattern, d_ff=d_ff,
        norm_eps=raw.number(eps, 1e-5), mixers={name: options for name, options in mixers.items() if name in pattern},
        tied=raw.flag("tie_word_embeddings", d_ff is None), residual_fp32=raw.flag("residual_in_fp32", d_ff is None),
    )  # fmt: skip


def table(model: Decoder) -> Table:
    """The names of a model with an MLP, Samba, or without one."""
    names = LAYER if model.config.d_ff is None else SAMBA
    layers = [LayerNames(f"backbone.layers.{i}.", names) for i in range(model.config.n_layers)]
    return build_table(model, HF_TOP, layers, "lm_head.weight")
