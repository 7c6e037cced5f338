"""Directories of flash-linear-attention: gated_deltanet, kda, delta_net, transformer, their hybrids with `attn`, and
GDN-2 layers in the same frame (model type `gdn2`: fla has the layer, not the model).

fla's GDN-2 layer is not the authors': its output gate is a sigmoid, theirs a SiLU. Both read and write say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.tables import LayerNames, Table, build_table, mixer_config
from gdn2.errors import CheckpointError
from gdn2.mixers.attention import AttentionConfig
from gdn2.models import Decoder, ModelConfig

TOP = {"embed.weight": "model.embeddings.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
LAYER = {
    "mixer_norm.weight": "attn_norm.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mixer.*": "attn.",
}
MIXERS = {"gated_deltanet": "gdn", "kda": "kda", "delta_net": "deltanet", "gdn2": "gdn2", "transformer": "attention"}
ARCHITECTURES = {
    "gated_deltanet": "GatedDeltaNetForCausalLM", "kda": "KDAForCausalLM", "delta_net": "DeltaNetForCausalLM",
    "transformer": "TransformerForCausalLM",
}  # fmt: skip
SWISH = ("swish", "silu")
QK_NORM_EPS = 1e-5  # of the optional norm of queries and keys, whatever the configuration says
NORM_EPS = 1e-6  # of fla's model configurations, passed on to the mixers


def read(
    raw: Fields, tensors: Mapping[str, TensorInfo], values: Values
) -> tuple[ModelConfig, Callable[[Decoder], Table]]:
    """Configuration and names of a directory; see `configure` and `table`."""
    return configure(raw, tensors, values), table


def configure(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> ModelConfig:
    """The model that config.json describes; the MLP's width is read from the tensors.

    Raises:
        CheckpointError: a value that is malformed or means a computation we do not have.
    """
    kind = str(raw.data.get("model_type"))
    raw.only(hidden_act=SWISH, attnres_block_size=(None,), fuse_cross_entropy=(True, False))
    n_layers = raw.integer("num_hidden_layers")
    d_model = raw.integer("hidden_size")
    if kind == "transformer":
        main = attention(raw, d_model)
    else:
        main = {"gated_deltanet": gdn, "kda": kda, "delta_net": deltanet, "gdn2": gdn2}[kind](raw)
    mixers = {MIXERS[kind]: main}
    pattern = [MIXERS[kind]] * n_layers
    if kind != "transformer" and raw.has("attn"):
        hybrid = raw.table("attn")
        mixers["attention"] = attention(hybrid, d_model)
        for i in hybrid.integers("layers"):
            if i >= n_layers:
                raise hybrid.refuse("layers", f"numbers below {n_layers}")
            pattern[i] = "attention"
    width = tensors.get("model.layers.0.mlp.gate_proj.weight")
    if width is None or len(width.shape) != 2:
        raise CheckpointError(f"{raw.where}: the weights lack the matrix model.layers.0.mlp.gate_proj.weight")
    return ModelConfig(
        d_model=d_model, vocab_size=raw.integer("vocab_size"), pattern=tuple(pattern),
        mixers={name: options for name, options in mixers.items() if name in pattern}, d_ff=width.shape[0],
        tied=raw.flag("tie_word_embeddings", False), norm_eps=raw.number("norm_eps", NORM_EPS),
    )  # fmt: skip


def gdn(raw: Fields) -> dict[str, Any]:
    raw.only(use_gate=(True,), use_short_conv=(True,), output_gate_activation=(None, *SWISH, "sigmoid"))
    gate = "sigmoid" if raw.data.get("output_gate_activation") == "sigmoid" else "silu"
    sizes = _sizes(raw, heads=6, width=256, expand=2.0)
    return {"mixer": "gdn", **sizes, "gate": gate, "beta_max": _beta_max(raw)}


def kda(raw: Fields) -> dict[str, Any]:
    raw.only(use_short_conv=(True,))
    bound = raw.number("lower_bound") if raw.has("lower_bound") else None
    if raw.flag("safe_gate", False) and bound is None:
        raise raw.refuse("lower_bound", "a number where safe_gate is true")
    sizes = _sizes(raw, heads=16, width=128, expand=1.0)
    return {"mixer": "kda", **sizes, "beta_max": _beta_max(raw), "lower_bound": bound}


def gdn2(raw: Fields) -> dict[str, Any]:
    raw.only(use_short_conv=(True,), output_gate_activation=("sigmoid",))
    sizes = _sizes(raw, heads=16, width=128, expand=1.0)
    return {"mixer": "gdn2", **sizes, "gate": "sigmoid", "erase_max": _beta_max(raw)}


def deltanet(raw: Fields) -> dict[str, Any]:
    raw.only(
        use_gate=(False,), use_short_conv=(True,), use_beta=(True,), use_output_norm=(True,), qk_norm=("l2",),
        qk_activation=("silu",),
    )  # fmt: skip
    d_model, heads = raw.integer("hidden_size"), raw.integer("num_heads", 16)
    d_key, d_value = (d_model * raw.number(f"expand_{kind}", 1.0) / heads for kind in "kv")
    return {
        "mixer": "deltanet", "n_heads": heads, "d_key": _whole(raw, "expand_k", d_key),
        "d_value": _whole(raw, "expand_v", d_value),
        "conv_taps": raw.integer("conv_size", 4), "beta_max": _beta_max(raw),
        "norm_eps": raw.number("norm_eps", NORM_EPS),
    }  # fmt: skip


def attention(raw: Fields, d_model: int) -> dict[str, Any]:
    """Softmax attention: the whole configuration of a transformer, or the `attn` object of a hybrid."""
    heads = raw.integer("num_heads", 32)
    width = d_model // heads if d_model % heads == 0 else 0
    if not width:
        raise raw.refuse("num_heads", f"a divisor of hidden_size {d_model}")
    return {
        "mixer": "attention", "n_heads": heads, "n_kv_heads": raw.integer("num_kv_heads", heads), "d_head": width,
        "window": raw.integer("window_size") if raw.has("window_size") else None,
        "rotary_base": raw.number("rope_theta", 10000.0), "qkv_bias": raw.flag("qkv_bias", False),
        "qk_norm": "head" if raw.flag("qk_norm", False) else "none",
        "norm_eps": QK_NORM_EPS,
    }  # fmt: skip


def _sizes(raw: Fields, heads: int, width: int, expand: float) -> dict[str, Any]:
    """Sizes of the layers with head_dim and expand_v, where defaults are the layer's."""
    heads, width = raw.integer("num_heads", heads), raw.integer("head_dim", width)
    return {
        "n_heads": heads, "d_key": width, "d_value": _whole(raw, "expand_v", width * raw.number("expand_v", expand)),
        "n_value_heads": raw.integer("num_v_heads", heads), "conv_taps": raw.integer("conv_size", 4),
        "norm_eps": raw.number("norm_eps", NORM_EPS),
    }  # fmt: skip


def _whole(raw: Fields, key: str, width: float) -> int:
    if width != int(width) or width < 1:
        raise raw.refuse(key, f"a factor that makes a whole width, not {width}")
    return int(width)


def _beta_max(raw: Fields) -> int:
    return 2 if raw.flag("allow_neg_eigval", False) else 1


def table(model: Decoder) -> Table:
    """fla's names for a model whose layers fla has."""
    return build_table(model, TOP, [LayerNames(f"model.layers.{i}.", LAYER) for i in range(model.config.n_layers)],
                       tied_copy="lm_head.weight")  # fmt: skip


def describe(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that fla can hold.

    Raises:
        CheckpointError: a mixer or option that fla does not have; the message names it.
    """
    names = list(dict.fromkeys(config.pattern))
    kinds = {config.mixers[name]["mixer"]: name for name in names}
    main = [kind for kind in kinds if kind != "attention"] or ["attention"]
    if (
        len(main) != 1
        or len(kinds) != len(names)
        or main[0] not in MIXERS.values()
        or config.d_ff is None
        or config.post_norm
    ):
        raise CheckpointError(f"fla has no model of {', '.join(names)} layers{'' if config.d_ff else ' without MLP'}")
    model_type = {mixer: kind for kind, mixer in MIXERS.items()}[main[0]]
    out: dict[str, Any] = {
        "model_type": model_type, "hidden_size": config.d_model, "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layers, "intermediate_size": config.d_ff, "hidden_act": "swish",
        "norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, "dtype": "float32",
    }  # fmt: skip
    if model_type in ARCHITECTURES:
        out["architectures"] = [ARCHITECTURES[model_type]]
    if main[0] != "attention":
        out |= _describe_mixer(main[0], kinds[main[0]], config)
    if "attention" in kinds:
        softmax = describe_attention(mixer_config(config, kinds["attention"]), config.d_model)
        layers = [i for i, name in enumerate(config.pattern) if name == kinds["attention"]]
        out |= softmax if main[0] == "attention" else {"attn": {"layers": layers, **softmax}}
    return out


def describe_attention(o: AttentionConfig, d_model: int) -> dict[str, Any]:
    """The `attn` object of a hybrid, or what a transformer's configuration has of it. Raises CheckpointError."""
    plain = (o.rotated == o.d_head, not o.rotary_bf16, not o.out_bias, not o.conv_taps, not o.gate)
    normed = o.qk_norm == "none" or (o.qk_norm == "head" and o.norm_eps == QK_NORM_EPS)
    if o.n_heads * o.d_head != d_model or not all(plain) or not normed:
        raise CheckpointError(
            "fla's attention is plain: heads as wide as the model, full rotary, no gate, no convolution"
        )
    return {
        "num_heads": o.n_heads, "num_kv_heads": o.kv_heads, "qkv_bias": o.qkv_bias, "window_size": o.window,
        "rope_theta": o.rotary_base, "qk_norm": o.qk_norm == "head",
    }  # fmt: skip


def _describe_mixer(kind: str, name: str, config: ModelConfig) -> dict[str, Any]:
    o = mixer_config(config, name)
    if o.norm_eps != config.norm_eps:
        raise CheckpointError(
            f"fla has one norm_eps; this model has {config.norm_eps} in blocks, {o.norm_eps} in {kind}"
        )
    if not o.conv_taps:
        raise CheckpointError("a model without short convolutions is not written in fla's format")
    neg = {"conv_size": o.conv_taps, "allow_neg_eigval": getattr(o, "erase_max" if kind == "gdn2" else "beta_max") == 2}
    if kind == "deltanet":
        expand = {f"expand_{n[0]}": o.n_heads * w / config.d_model for n, w in (("k", o.d_key), ("v", o.d_value))}
        return {**neg, **expand, "num_heads": o.n_heads}
    sizes = {"num_heads": o.n_heads, "head_dim": o.d_key, "num_v_heads": o.value_heads, "expand_v": o.d_value / o.d_key}
    if kind == "gdn2":
        if o.gate != "sigmoid":
            raise CheckpointError(
                "fla's GDN-2 layer has a sigmoid output gate and this model SiLU: fla would compute something else"
            )
        if o.scalar_erase or o.scalar_write:
            raise CheckpointError("fla's GDN-2 layer has no scalar erase or write gate")
        return {**neg, **sizes, "output_gate_activation": "sigmoid"}
    if kind == "kda":
        if not o.gate_bias:
            raise CheckpointError("fla's KDA layer has a bias on its output gate; this model has none")
        return {**neg, **sizes, "lower_bound": o.lower_bound, "safe_gate": o.lower_bound is not None}
    if o.beta_bias:
        raise CheckpointError("fla's Gated DeltaNet has no bias on beta; this model (the authors' first version) has")
    return {**neg, **sizes, "use_gate": True, "output_gate_activation": "swish" if o.gate == "silu" else "sigmoid"}
