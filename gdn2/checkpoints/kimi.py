"""Kimi-Linear: Kimi Delta Attention, and every few layers latent attention without rotation.

Its authors' configurations and those of transformers differ: layers counted from one in `linear_attn_config`, or named
in `layer_types`. transformers renames parameters in memory, not on disk; it writes a dense MLP as `block_sparse_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.huggingface import FULL, LINEAR, MLP
from gdn2.checkpoints.mamba import SILU, Read
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.tables import Entry, LayerNames, Table, build_table
from gdn2.models import Decoder, ModelConfig

TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
KDA = {
    "mixer.f_proj.0.weight": "self_attn.f_a_proj.weight",
    "mixer.f_proj.1.weight": "self_attn.f_b_proj.weight",
    "mixer.g_proj.0.weight": "self_attn.g_a_proj.weight",
    "mixer.g_proj.1.weight": "self_attn.g_b_proj.weight",
}
EXPERTS = "layers of experts run through the hf backend only"


def kimi(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """Configuration and names of a directory without experts."""
    heads = raw.integer("num_attention_heads")
    raw.only(
        hidden_act=SILU, attention_bias=(False,), q_lora_rank=(None,), mla_use_nope=(True,),
        num_key_value_heads=(None, heads),
    )  # fmt: skip
    n = raw.integer("num_hidden_layers")
    _refuse_experts(raw, n)
    linear = raw.table("linear_attn_config")
    width = linear.integer("head_dim", raw.integer("linear_head_dim", 128))
    eps = raw.number("rms_norm_eps", 1e-5)
    taps = linear.integer("short_conv_kernel_size", raw.integer("linear_conv_kernel_dim", 4))
    kda = {
        "mixer": "kda", "n_heads": linear.integer("num_heads", raw.integer("linear_num_heads", 32)), "d_key": width,
        "d_value": width, "conv_taps": taps, "gate_bias": False, "norm_eps": eps,
    }  # fmt: skip
    latent = {
        "mixer": "mla", "n_heads": heads, "d_latent": raw.integer("kv_lora_rank", 512),
        "d_key": raw.integer("qk_nope_head_dim", 128), "d_shared": raw.integer("qk_rope_head_dim", 64),
        "d_value": raw.integer("v_head_dim", 128),
    }  # fmt: skip
    pattern = _pattern(raw, linear, n)
    config = ModelConfig(
        d_model=raw.integer("hidden_size"), vocab_size=raw.integer("vocab_size"), pattern=pattern,
        mixers={name: options for name, options in {"kda": kda, "mla": latent}.items() if name in pattern},
        d_ff=raw.integer("intermediate_size"), tied=raw.flag("tie_word_embeddings", False), norm_eps=eps,
    )  # fmt: skip

    def table(model: Decoder) -> Table:
        layers = [_layer(f"model.layers.{i}.", kind, model, tensors) for i, kind in enumerate(pattern)]
        return build_table(model, TOP, layers, "lm_head.weight")

    return config, table


def _refuse_experts(raw: Fields, n: int) -> None:
    if raw.has("mlp_layer_types"):
        if set(raw.choices("mlp_layer_types", ("dense", "sparse"), n)) != {"dense"}:
            raise raw.refuse("mlp_layer_types", f"dense throughout: {EXPERTS}")
        return
    count = next((key for key in ("num_experts", "num_local_experts") if raw.has(key)), "num_experts")
    if raw.integer(count, 256, low=0) and raw.integer("first_k_dense_replace", 1, low=0) < n:
        raise raw.refuse(count, f"0: {EXPERTS}")


def _pattern(raw: Fields, linear: Fields, n: int) -> tuple[str, ...]:
    if raw.has("layer_types"):
        kinds = raw.choices("layer_types", (LINEAR, FULL), n)
        return tuple("mla" if kind == FULL else "kda" for kind in kinds)
    full, recurrent = (linear.integers(key, ()) for key in ("full_attn_layers", "kda_layers"))
    if sorted([*full, *recurrent]) != list(range(1, n + 1)):
        raise linear.refuse("full_attn_layers", f"with kda_layers all layers from 1 to {n}, each once")
    return tuple("mla" if i + 1 in full else "kda" for i in range(n))


def _layer(prefix: str, kind: str, model: Decoder, tensors: Mapping[str, TensorInfo]) -> LayerNames:
    mlp = "block_sparse_moe." if f"{prefix}block_sparse_moe.gate_proj.weight" in tensors else "mlp."
    names = {
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        **{ours: theirs.replace("mlp.", mlp) for ours, theirs in MLP.items()},
    }
    if kind == "mla":
        return LayerNames(prefix, {**names, "mixer.*": "self_attn."})
    heads = model.config.mixers[kind]["n_heads"]
    rates = Entry(
        ("self_attn.A_log",), ("mixer.A_log",), lambda a: (a.reshape(heads),), lambda a: (a.view(1, 1, heads, 1),)
    )  # fmt: skip
    return LayerNames(prefix, {**names, **KDA, "mixer.*": "self_attn."}, [rates])
