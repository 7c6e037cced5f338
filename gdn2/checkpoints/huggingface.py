"""Checkpoints that transformers itself writes, of models whose layers are ours: Gated DeltaNet with full attention
(qwen3_next, qwen3_5, olmo_hybrid), Mamba-2 with attention (bamba, granitemoehybrid).

Mixture-of-experts layers are refused. Factors in a configuration (Granite's multipliers) are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.mamba import SILU, Read, time_step_limit
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.tables import Entry, LayerNames, Table, around_one, build_table, rows, scaled
from gdn2.models import Decoder, ModelConfig

LINEAR, FULL = "linear_attention", "full_attention"
OLMO_GATED_NORM_EPS = 1e-5  # fixed in their code, whatever rms_norm_eps is


def rotary(raw: Fields, d_head: int, fraction: float) -> dict[str, Any]:
    """Rotary options; `fraction` is what the model type rotates where the configuration is silent."""
    raw.only(rope_scaling=(None,))
    rope = raw.table("rope_parameters")
    rope.only(rope_type=("default",))
    part = rope.number("partial_rotary_factor", raw.number("partial_rotary_factor", fraction))
    return {
        "rotary": int(d_head * part),
        "rotary_base": rope.number("rope_theta", raw.number("rope_theta", 10000.0)),
    }


def attention_options(raw: Fields, d_head: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Softmax attention with `options` beside the sizes that the configuration states."""
    heads = raw.integer("num_attention_heads")
    bias = raw.flag("attention_bias", False)
    return {
        "mixer": "attention", "n_heads": heads, "n_kv_heads": raw.integer("num_key_value_heads", heads),
        "d_head": d_head, "qkv_bias": bias, "out_bias": bias, **options,
    }  # fmt: skip


def _linear(raw: Fields, **options: Any) -> dict[str, Any]:
    return {
        "mixer": "gdn", "n_heads": raw.integer("linear_num_key_heads"), "d_key": raw.integer("linear_key_head_dim"),
        "n_value_heads": raw.integer("linear_num_value_heads"), "d_value": raw.integer("linear_value_head_dim"),
        "conv_taps": raw.integer("linear_conv_kernel_dim", 4), **options,
    }  # fmt: skip


def _layer_types(raw: Fields, interval: int | None = None) -> tuple[str, ...]:
    n = raw.integer("num_hidden_layers")
    if not raw.has("layer_types") and interval is not None:
        every = raw.integer("full_attention_interval", interval)
        return tuple("attention" if (i + 1) % every == 0 else "gdn" for i in range(n))
    kinds = raw.choices("layer_types", (LINEAR, FULL), n)
    return tuple("attention" if kind == FULL else "gdn" for kind in kinds)


def _model(raw: Fields, pattern: tuple[str, ...], mixers: Mapping[str, Any], **rest: Any) -> ModelConfig:
    return ModelConfig(
        d_model=raw.integer("hidden_size"), vocab_size=raw.integer("vocab_size"), pattern=pattern,
        mixers={name: options for name, options in mixers.items() if name in pattern},
        **{
            "d_ff": raw.integer("intermediate_size"), "tied": raw.flag("tie_word_embeddings", False),
            "norm_eps": raw.number("rms_norm_eps", 1e-6), **rest,
        },
    )  # fmt: skip


MLP = {
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
ATTENTION = {"mixer.*": "self_attn."}


def _conv(options: Mapping[str, Any], theirs: str) -> Entry:
    keys, values = options["n_heads"] * options["d_key"], options["n_value_heads"] * options["d_value"]
    return rows(theirs, [f"mixer.{n}_conv1d.weight" for n in "qkv"], [keys, keys, values])


# Qwen3-Next and Qwen3.5


def qwen(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """qwen3_next; qwen3_5_text; qwen3_5, of which only the text model is opened."""
    kind, prefix, ignored = str(raw.data.get("model_type")), "model.", ["mtp.*"]
    if kind == "qwen3_5":
        raw = raw.table("text_config")
        prefix, ignored = "model.language_model.", [*ignored, "model.visual.*"]
    raw.only(hidden_act=SILU, attention_bias=(False,))
    pattern = _layer_types(raw, 4)
    if kind == "qwen3_next" and raw.integer("num_experts", 512, low=0):
        dense = set(raw.integers("mlp_only_layers", []))
        step = raw.integer("decoder_sparse_step", 1)
        if any(i not in dense and (i + 1) % step == 0 for i in range(len(pattern))):
            raise raw.refuse("num_experts", "0: layers of experts run through the hf backend only")
    d_head = raw.integer("head_dim", 256)
    eps = raw.number("rms_norm_eps", 1e-6)
    mixers = {
        "gdn": _linear(raw, gate="silu", norm_eps=eps),
        "attention": attention_options(
            raw, d_head, {"qk_norm": "head", "gate": True, "norm_eps": eps, **rotary(raw, d_head, 0.25)}
        ),
    }
    config = _model(raw, pattern, mixers)
    merged = kind == "qwen3_next"
    return config, lambda model: _qwen_table(model, prefix, merged, tuple(ignored))


def _qwen_table(model: Decoder, prefix: str, merged: bool, ignored: tuple[str, ...]) -> Table:
    layers = []
    for i, kind in enumerate(model.config.pattern):
        options = model.config.mixers[kind]
        norms = [
            around_one("input_layernorm.weight", "mixer_norm.weight"),
            around_one("post_attention_layernorm.weight", "mlp_norm.weight"),
        ]
        if kind == "attention":
            entries = [*norms, _gated_queries(options)]
            entries += [around_one(f"self_attn.{n}_norm.weight", f"mixer.{n}_norm.weight") for n in "qk"]
            layers.append(LayerNames(f"{prefix}layers.{i}.", {**MLP, **ATTENTION}, entries))
            continue
        entries = [*norms, _conv(options, "linear_attn.conv1d.weight")]
        entries += _by_key_head(options) if merged else _in_blocks(options)
        names = {"mixer.o_norm.weight": "linear_attn.norm.weight", "mixer.o_proj.weight": "linear_attn.out_proj.weight"}
        layers.append(LayerNames(f"{prefix}layers.{i}.", {**MLP, **names, "mixer.*": "linear_attn."}, entries))
    top = {"embed.weight": f"{prefix}embed_tokens.weight", "head.weight": "lm_head.weight"}
    table = build_table(model, top, layers, "lm_head.weight", [around_one(f"{prefix}norm.weight", "norm.weight")])
    return Table(table.entries, table.ignored | set(ignored), table.copies)


def _gated_queries(options: Mapping[str, Any]) -> Entry:
    """q_proj holds, head by head, the rows of the query and then those of its output gate."""
    heads, width = options["n_heads"], options["d_head"]

    def load(both: Tensor) -> tuple[Tensor, ...]:
        q, g = both.view(heads, 2 * width, -1).split(width, dim=1)
        return q.reshape(heads * width, -1), g.reshape(heads * width, -1)

    def save(q: Tensor, g: Tensor) -> tuple[Tensor]:
        parts = [t.view(heads, width, -1) for t in (q, g)]
        return (torch.cat(parts, dim=1).reshape(2 * heads * width, -1),)

    return Entry(("self_attn.q_proj.weight",), ("mixer.q_proj.weight", "mixer.g_proj.weight"), load, save)


def _by_key_head(options: Mapping[str, Any]) -> list[Entry]:
    """Rows of in_proj_qkvz and in_proj_ba, key head by key head: q, k, its value heads' v, their gates; b, a."""
    heads, share = options["n_heads"], options["n_value_heads"] // options["n_heads"]
    keys, values = options["d_key"], share * options["d_value"]

    def entry(theirs: str, ours: tuple[str, ...], sizes: list[int]) -> Entry:
        def load(merged: Tensor) -> tuple[Tensor, ...]:
            parts = merged.view(heads, sum(sizes), -1).split(sizes, dim=1)
            return tuple(part.reshape(-1, merged.shape[1]) for part in parts)

        def save(*parts: Tensor) -> tuple[Tensor]:
            grouped = [part.view(heads, size, -1) for part, size in zip(parts, sizes, strict=True)]
            return (torch.cat(grouped, dim=1).reshape(heads * sum(sizes), -1),)

        return Entry((f"linear_attn.{theirs}.weight",), tuple(f"mixer.{n}_proj.weight" for n in ours), load, save)

    return [
        entry("in_proj_qkvz", ("q", "k", "v", "g"), [keys, keys, values, values]),
        entry("in_proj_ba", ("b", "a"), [share, share]),
    ]


def _in_blocks(options: Mapping[str, Any]) -> list[Entry]:
    keys, values = options["n_heads"] * options["d_key"], options["n_value_heads"] * options["d_value"]
    qkv = rows("linear_attn.in_proj_qkv.weight", [f"mixer.{n}_proj.weight" for n in "qkv"], [keys, keys, values])
    single = {"in_proj_z": "g_proj", "in_proj_b": "b_proj", "in_proj_a": "a_proj"}
    return [qkv, *(Entry((f"linear_attn.{t}.weight",), (f"mixer.{o}.weight",)) for t, o in single.items())]


# Bamba and Granite 4 without experts


def _mamba(raw: Fields, **options: Any) -> dict[str, Any]:
    heads = raw.integer("mamba_n_heads")
    inner = raw.integer("mamba_expand", 2) * raw.integer("hidden_size")
    if inner % heads or raw.data.get("mamba_d_head", "auto") not in ("auto", None, inner // heads):
        raise raw.refuse("mamba_n_heads", f"a divisor of {inner} that agrees with mamba_d_head")
    return {
        "mixer": "mamba2", "n_heads": heads, "d_head": inner // heads, "d_state": raw.integer("mamba_d_state"),
        "n_groups": raw.integer("mamba_n_groups", 1), "conv_taps": raw.integer("mamba_d_conv", 4),
        "conv_bias": raw.flag("mamba_conv_bias", True), "proj_bias": raw.flag("mamba_proj_bias", False),
        "dt_limit": time_step_limit(raw, "time_step_limit"), "norm_eps": raw.number("rms_norm_eps", 1e-5), **options,
    }  # fmt: skip


def bamba(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    raw.only(hidden_act=SILU, mlp_bias=(False,))
    n = raw.integer("num_hidden_layers")
    full = set(raw.integers("attn_layer_indices", []))
    pattern = tuple("attention" if i in full else "mamba2" for i in range(n))
    d_head = raw.integer("hidden_size") // raw.integer("num_attention_heads")
    mixers = {"mamba2": _mamba(raw), "attention": attention_options(raw, d_head, rotary(raw, d_head, 0.5))}
    config = _model(raw, pattern, mixers, norm_eps=raw.number("rms_norm_eps", 1e-5))
    layer = {
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "pre_ff_layernorm.weight",
        **{name: theirs.replace("mlp.", "feed_forward.") for name, theirs in MLP.items()},
    }
    top = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.final_layernorm.weight",
        "head.weight": "lm_head.weight",
    }

    def table(model: Decoder) -> Table:
        layers = [
            LayerNames(f"model.layers.{i}.", {**layer, "mixer.*": "self_attn." if kind == "attention" else "mamba."})
            for i, kind in enumerate(model.config.pattern)
        ]
        return build_table(model, top, layers, "lm_head.weight")

    return config, table


def granite(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    raw.only(hidden_act=SILU, num_local_experts=(0,), position_embedding_type=("rope", "nope", None))
    if "num_local_experts" not in raw.data:
        raise raw.refuse("num_local_experts", "0: layers of experts run through the hf backend only")
    n = raw.integer("num_hidden_layers")
    names = {"mamba": "mamba2", LINEAR: "mamba2", "attention": "attention", FULL: "attention"}
    pattern = tuple(names[kind] for kind in raw.choices("layer_types", tuple(names), n))
    d_head = raw.integer("hidden_size") // raw.integer("num_attention_heads")
    turned = rotary(raw, d_head, 1.0) if raw.data.get("position_embedding_type") == "rope" else {"rotary": 0}
    mixers = {"mamba2": _mamba(raw), "attention": attention_options(raw, d_head, turned)}
    embed, head = raw.number("embedding_multiplier", 1.0), 1 / raw.number("logits_scaling", 1.0)
    tied = raw.flag("tie_word_embeddings", False)
    config = _model(
        raw, pattern, mixers, d_ff=raw.integer("shared_intermediate_size"), tied=tied and embed == head == 1
    )
    residual = raw.number("residual_multiplier", 1.0)
    query = raw.number("attention_multiplier", 1.0) * d_head**0.5  # their scale, relative to ours of 1/sqrt(d)
    return config, lambda model: _granite_table(model, (embed, head, residual, query), tied)


def _granite_table(model: Decoder, factors: tuple[float, float, float, float], tied: bool) -> Table:
    embed, head, residual, query = factors
    layer = {"mixer_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"}
    width = model.config.d_ff or 0
    mlp = [
        rows("shared_mlp.input_linear.weight", ["mlp.gate.weight", "mlp.up.weight"], [width, width]),
        scaled("shared_mlp.output_linear.weight", "mlp.down.weight", residual),
    ]
    layers = []
    for i, kind in enumerate(model.config.pattern):
        where, out = ("self_attn.", "o_proj") if kind == "attention" else ("mamba.", "out_proj")
        biased = [n for n, _ in model.blocks()[i].mixer.named_parameters() if n.startswith(f"{out}.")]
        entries = [*mlp, *(scaled(where + name, f"mixer.{name}", residual) for name in biased)]
        if kind == "attention":
            queries = [n for n, _ in model.blocks()[i].mixer.named_parameters() if n.startswith("q_proj.")]
            entries += [scaled(where + name, f"mixer.{name}", query) for name in queries]
        layers.append(LayerNames(f"model.layers.{i}.", {**layer, "mixer.*": where}, entries))
    top = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    outside, copies = ends(top["embed.weight"], "lm_head.weight", embed, head, tied, model.config.tied)
    table = build_table(model, top, layers, None, outside)
    return Table(table.entries, table.ignored, copies)


def ends(
    embedding: str, output: str, embed: float, head: float, theirs_tied: bool, ours_tied: bool
) -> tuple[list[Entry], dict[str, str]]:
    """Entries of embedding and output head with a factor each, and the copies there may be.

    What they tie and scale by two factors are two matrices of ours.
    """
    if ours_tied:
        return [Entry((embedding,), ("embed.weight",))], {output: embedding}
    if not theirs_tied:
        return [scaled(embedding, "embed.weight", embed), scaled(output, "head.weight", head)], {}
    first, second = scaled(embedding, "embed.weight", embed), scaled(embedding, "head.weight", head)

    def load(shared: Tensor) -> tuple[Tensor, ...]:
        return (*first.load(shared), *second.load(shared))

    def save(ours: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return first.save(ours)

    return [Entry((embedding,), ("embed.weight", "head.weight"), load, save)], {output: embedding}


# OLMo Hybrid


def olmo(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    raw.only(hidden_act=SILU)
    pattern = _layer_types(raw)
    d_head = raw.integer("hidden_size") // raw.integer("num_attention_heads")
    rope = raw.table("rope_parameters")
    turned = rotary(raw, d_head, 1.0) if rope.has("rope_theta") else {"rotary": 0}
    eps = raw.number("rms_norm_eps", 1e-6)
    beta_max = 2 if raw.flag("linear_allow_neg_eigval", True) else 1
    mixers = {
        "gdn": _linear(raw, gate="silu", beta_max=beta_max, norm_eps=OLMO_GATED_NORM_EPS),
        "attention": attention_options(raw, d_head, {"qk_norm": "all", "norm_eps": eps, **turned}),
    }
    config = _model(raw, pattern, mixers, post_norm=("attention",) if "attention" in pattern else ())
    top = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }

    def table(model: Decoder) -> Table:
        layers = [_olmo_layer(f"model.layers.{i}.", kind, model.config, tensors) for i, kind in enumerate(pattern)]
        return build_table(model, top, layers, "lm_head.weight")

    return config, table


def _olmo_layer(prefix: str, kind: str, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> LayerNames:
    """Their own files and those that transformers writes differ in the names of norms and convolutions."""

    def present(*names: str) -> str:
        return next((name for name in names if prefix + name in tensors), names[0])

    if kind == "attention":
        mixer_norm = present("post_attention_layernorm.weight", "feedforward_layer_norm.weight")
        names = {"mixer_norm.weight": mixer_norm, "mlp_norm.weight": "post_feedforward_layernorm.weight"}
        return LayerNames(prefix, {**MLP, **names, "mixer.*": "self_attn."})
    names = {
        "mixer_norm.weight": present("attention_layer_norm.weight", "input_layernorm.weight"),
        "mlp_norm.weight": present("feedforward_layer_norm.weight", "post_attention_layernorm.weight"),
    }
    merged = "linear_attn.conv1d.weight"
    if prefix + merged in tensors:
        conv = _conv(config.mixers[kind], merged)
    else:
        conv = _cut_conv(config.mixers[kind], prefix, tensors)
    return LayerNames(prefix, {**MLP, **names, "mixer.*": "linear_attn."}, [conv])


def _cut_conv(options: Mapping[str, Any], prefix: str, tensors: Mapping[str, TensorInfo]) -> Entry:
    """Convolutions of q, k and v. transformers (5.23) cuts the merged one into thirds when it saves, wherever that is.

    So what counts is their concatenation; the cuts are those of the file, where they add up.
    """
    whole = _conv(options, "")
    names = tuple(f"linear_attn.{n}_conv1d.weight" for n in "qkv")
    keys, values = options["n_heads"] * options["d_key"], options["n_value_heads"] * options["d_value"]
    found = [tensors[prefix + n].shape[0] for n in names if prefix + n in tensors and tensors[prefix + n].shape]
    cuts = found if len(found) == 3 and sum(found) == 2 * keys + values else [keys, keys, values]

    def load(*parts: Tensor) -> tuple[Tensor, ...]:
        return whole.load(torch.cat(parts))

    def save(*parts: Tensor) -> tuple[Tensor, ...]:
        return whole.save(*parts)[0].split(cuts)

    return Entry(names, whole.ours, load, save)
