"""Falcon-H1 as transformers writes it: attention and Mamba-2 side by side in every layer.

A dozen factors of its configuration scale the embedding, keys, the state-space input and output, the MLP and the
logits; all of them act on a linear map's input or output and are folded into its weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.huggingface import MLP, attention_options, ends, rotary
from gdn2.checkpoints.mamba import SILU, Read, time_step_limit
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.tables import Entry, LayerNames, Table, build_table, rows_of, scaled
from gdn2.models import Decoder, ModelConfig


def falcon_h1(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """Configuration and names of a Falcon-H1 directory."""
    raw.only(
        hidden_act=SILU, attention_bias=(False,), mlp_bias=(False,), mamba_proj_bias=(False,), projectors_bias=(False,)
    )
    d_model, heads = raw.integer("hidden_size"), raw.integer("mamba_n_heads")
    inner = raw.integer("mamba_d_ssm", raw.integer("mamba_expand", 2) * d_model)
    if inner % heads or raw.data.get("mamba_d_head", "auto") not in ("auto", None, inner // heads):
        raise raw.refuse("mamba_n_heads", f"a divisor of {inner} that agrees with mamba_d_head")
    d_head = raw.integer("head_dim", d_model // raw.integer("num_attention_heads"))
    eps = raw.number("rms_norm_eps", 1e-5)
    mamba = {
        "mixer": "mamba2", "n_heads": heads, "d_head": inner // heads, "d_state": raw.integer("mamba_d_state"),
        "n_groups": raw.integer("mamba_n_groups", 1), "conv_taps": raw.integer("mamba_d_conv", 4),
        "conv_bias": raw.flag("mamba_conv_bias", True), "dt_limit": time_step_limit(raw, "time_step_limit"),
        "norm": raw.flag("mamba_rms_norm", False), "norm_before_gate": raw.flag("mamba_norm_before_gate", True),
        "norm_eps": eps,
    }  # fmt: skip
    parts = {"attention": attention_options(raw, d_head, rotary(raw, d_head, 1.0)), "mamba2": mamba}
    embed, head = raw.number("embedding_multiplier", 1.0), raw.number("lm_head_multiplier", 1.0)
    tied = raw.flag("tie_word_embeddings", False)
    config = ModelConfig(
        d_model=d_model, vocab_size=raw.integer("vocab_size"), d_ff=raw.integer("intermediate_size"),
        pattern=("parallel",) * raw.integer("num_hidden_layers"), norm_eps=eps,
        mixers={"parallel": {"mixer": "parallel", "parts": parts}}, tied=tied and embed == head == 1,
    )  # fmt: skip
    shared = raw.integer("mamba_n_groups", 1) * raw.integer("mamba_d_state")
    layer = _layer(raw, [inner, inner, shared, shared, heads])
    top = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.final_layernorm.weight"}

    def table(model: Decoder) -> Table:
        layers = [LayerNames(f"model.layers.{i}.", *layer) for i in range(model.config.n_layers)]
        outside, copies = ends(top["embed.weight"], "lm_head.weight", embed, head, tied, model.config.tied)
        plain = build_table(model, top, layers, None, outside)
        return Table(plain.entries, plain.ignored, copies)

    return config, table


def _layer(raw: Fields, sizes: list[int]) -> tuple[dict[str, str], list[Entry]]:
    gate, down = raw.numbers("mlp_multipliers", 2, (1.0, 1.0))
    parts = [raw.number("ssm_in_multiplier", 1.0) * m for m in raw.numbers("ssm_multipliers", 5, (1.0,) * 5)]
    into, out = raw.number("attention_in_multiplier", 1.0), raw.number("attention_out_multiplier", 1.0)
    names = {
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "pre_ff_layernorm.weight",
        "mlp.up.weight": MLP["mlp.up.weight"].replace("mlp.", "feed_forward."),
        "mixer.parts.attention.*": "self_attn.",
        "mixer.parts.mamba2.*": "mamba.",
    }
    factors = {
        "feed_forward.gate_proj.weight": ("mlp.gate.weight", gate),
        "feed_forward.down_proj.weight": ("mlp.down.weight", down),
        "self_attn.q_proj.weight": ("mixer.parts.attention.q_proj.weight", into),
        "self_attn.k_proj.weight": (
            "mixer.parts.attention.k_proj.weight", into * raw.number("key_multiplier", 1.0)
        ),
        "self_attn.v_proj.weight": ("mixer.parts.attention.v_proj.weight", into),
        "self_attn.o_proj.weight": ("mixer.parts.attention.o_proj.weight", out),
        "mamba.out_proj.weight": ("mixer.parts.mamba2.out_proj.weight", raw.number("ssm_out_multiplier", 1.0)),
    }  # fmt: skip
    entries = [scaled(theirs, ours, factor) for theirs, (ours, factor) in factors.items()]
    entries.append(rows_of("mamba.in_proj.weight", "mixer.parts.mamba2.in_proj.weight", sizes, parts))
    return names, entries
