"""Mamba's three dialects: state-spaces/mamba's own directories, and the `mamba2` and `mamba3` directories of
transformers and fla, which share names and shapes.

Which library wrote a `model_type: mamba2` cannot be told and does not matter: everything is read from config.json and
the tensors, never from a library's defaults (fla takes the model type over from transformers when it is imported).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.sources import Source
from gdn2.checkpoints.tables import Entry, LayerNames, Table, build_table, mixer_config, rows
from gdn2.errors import CheckpointError, UserError
from gdn2.models import Decoder, ModelConfig

Read = tuple[ModelConfig, Callable[[Decoder], Table]]
SILU = ("silu", "swish")
ACTIVATIONS = ("softplus", "heavy_tail")
NORM_EPS = 1e-5  # of state-spaces/mamba, not in its configuration
LAYER = {"mixer_norm.weight": "norm.weight", "mixer.*": "mixer."}
HF_TOP = {
    "embed.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
SSM_TOP = {**HF_TOP, "embed.weight": "backbone.embedding.weight"}


# transformers and fla


def mamba2(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """`model_type: mamba2` of transformers (Codestral-Mamba) and of fla."""
    raw.only(hidden_act=SILU, D_has_hdim=(False,), rmsnorm=(True,))
    d_model = raw.integer("hidden_size")
    inner = raw.integer("expand") * d_model
    d_head = raw.integer("head_dim")
    if inner % d_head or raw.integer("num_heads", inner // d_head) * d_head != inner:
        raise raw.refuse("head_dim", f"such that num_heads heads make expand * hidden_size = {inner}")
    eps = raw.number("layer_norm_epsilon") if raw.has("layer_norm_epsilon") else raw.number("norm_eps")
    limit = "time_step_limit" if raw.has("time_step_limit") else "dt_limit"
    options = {
        "mixer": "mamba2", "n_heads": inner // d_head, "d_head": d_head, "d_state": raw.integer("state_size"),
        "n_groups": raw.integer("n_groups"), "conv_taps": raw.integer("conv_kernel"),
        "conv_bias": raw.flag("use_conv_bias", True), "proj_bias": raw.flag("use_bias", False),
        "dt_limit": time_step_limit(raw, limit), "norm_before_gate": raw.flag("norm_before_gate", False),
        "norm_eps": eps,
    }  # fmt: skip
    return _backbone(raw, "mamba2", options, eps), hf_table


def mamba3(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """`model_type: mamba3` of fla."""
    raw.only(hidden_act=SILU, use_bias=(False,))
    d_model, d_head = raw.integer("hidden_size"), raw.integer("head_dim")
    inner = raw.integer("expand") * d_model
    if inner % d_head:
        raise raw.refuse("head_dim", f"a divisor of expand * hidden_size = {inner}")
    eps = raw.number("norm_eps", NORM_EPS)
    said = "a_activation" in values.given
    options = {
        "mixer": "mamba3", "n_heads": inner // d_head, "d_head": d_head, "d_state": raw.integer("state_size"),
        "n_groups": raw.integer("n_groups", 1), "rope_fraction": raw.number("rope_fraction", 0.5),
        "rank": raw.integer("mimo_rank") if raw.flag("is_mimo", False) else None,
        "a_activation": values.text("a_activation", ACTIVATIONS, "softplus"), "a_floor": raw.number("A_floor", 1e-4),
        "out_norm": raw.flag("is_outproj_norm", False), "norm_eps": eps,
    }  # fmt: skip
    config = _backbone(raw, "mamba3", options, eps)

    def table(model: Decoder) -> Table:
        plain = hf_table(model)
        return plain if said else replace(plain, audit=lambda source: refuse_constant_a(source, model))

    return config, table


def _backbone(raw: Fields, mixer: str, options: Mapping[str, Any], eps: float) -> ModelConfig:
    return ModelConfig(
        d_model=raw.integer("hidden_size"), vocab_size=raw.integer("vocab_size"), norm_eps=eps,
        pattern=(mixer,) * raw.integer("num_hidden_layers"), mixers={mixer: options},
        tied=raw.flag("tie_word_embeddings", False), residual_fp32=raw.flag("residual_in_fp32", True),
    )  # fmt: skip


def hf_table(model: Decoder) -> Table:
    """The names that transformers and fla share."""
    layers = [LayerNames(f"backbone.layers.{i}.", LAYER) for i in range(model.config.n_layers)]
    return build_table(model, HF_TOP, layers, "lm_head.weight")


def time_step_limit(raw: Fields, key: str) -> tuple[float, float] | None:
    """Bounds on dt; None where they bound nothing."""
    low, high = raw.numbers(key, 2, (0.0, float("inf")))
    return None if low <= 0 and high == float("inf") else (low, high)


def refuse_constant_a(source: Source, model: Decoder) -> None:
    """Refuse a Mamba-3 model whose A was never trained: fla 0.5.1 computed the constant +A_floor in its place.

    Rows of in_proj that no gradient reached still have the spread they were drawn with, shrunk alike by weight decay:
    the same in every layer, to the accuracy of a standard deviation of that many numbers. Trained rows do not.

    Raises:
        UserError: it is so; the message says how to open the model all the same.
    """
    spreads: dict[str, list[float]] = {"A": [], "v": []}
    count = 0
    for i in range(model.config.n_layers):
        weight = source.read(f"backbone.layers.{i}.mixer.in_proj.weight").float()
        parts = weight.split(mixer_config(model.config, "mamba3").parts)
        spreads["A"].append(parts[5].std().item())
        spreads["v"].append(parts[1].std().item())
        count = parts[5].numel()
    noise = 5 / (2 * count) ** 0.5
    even = {key: max(found) <= min(found) * (1 + 2 * noise) for key, found in spreads.items()}
    if len(spreads["A"]) > 1 and even["A"] and not even["v"]:
        raise UserError(
            f"{source.where}: the rows of in_proj that make A are as they were drawn, in every layer: this model was "
            "trained with fla 0.5.1, whose Mamba-3 had A = +A_floor whatever the input (fixed in 0.5.2). It does not "
            "compute what the layer is defined to; give a_activation=softplus to open it as if it did"
        )


# state-spaces/mamba


def mamba_ssm(raw: Fields, tensors: Mapping[str, TensorInfo], values: Values) -> Read:
    """A directory of state-spaces/mamba: Mamba-1, Mamba-2, Mamba-3, attention layers among them, or a transformer."""
    raw.only(rms_norm=(True,))
    d_model, n = raw.integer("d_model"), raw.integer("n_layer")
    ssm, attn = raw.table("ssm_cfg"), raw.table("attn_cfg")
    full = set(raw.integers("attn_layer_idx", []))
    if full - set(range(n)):
        raise raw.refuse("attn_layer_idx", f"numbers below {n}")
    mixers: dict[str, dict[str, Any]] = {}
    if len(full) < n:
        kind = ssm.data.get("layer", "Mamba1")
        if kind not in ("Mamba1", "Mamba2", "Mamba3"):
            raise ssm.refuse("layer", "Mamba1, Mamba2 or Mamba3")
        readers = {"Mamba1": _ssm1, "Mamba2": _ssm2}
        mixers[kind.lower()] = readers[kind](ssm, d_model) if kind in readers else _ssm3(ssm, d_model, values)
    if full:
        mixers["attention"] = _mha(attn, d_model)
    recurrent = next((name for name in mixers if name != "attention"), "attention")
    pattern = tuple("attention" if i in full else recurrent for i in range(n))
    fc2 = tensors.get("backbone.layers.0.mlp.fc2.weight")
    embedding = tensors.get(SSM_TOP["embed.weight"])
    if embedding is None or len(embedding.shape) != 2 or (fc2 is not None and len(fc2.shape) != 2):
        raise CheckpointError(f"{raw.where}: the weights lack the matrix {SSM_TOP['embed.weight']}")
    config = ModelConfig(
        d_model=d_model, vocab_size=embedding.shape[0], pattern=pattern, mixers=mixers,
        d_ff=fc2.shape[1] if fc2 is not None else None, tied=raw.flag("tie_embeddings", True), norm_eps=NORM_EPS,
        residual_fp32=raw.flag("residual_in_fp32", True),
    )  # fmt: skip
    return config, _ssm_table


def _inner(ssm: Fields, d_model: int) -> tuple[int, int]:
    inner = ssm.integer("d_ssm", ssm.integer("expand", 2) * d_model)
    if inner != ssm.integer("expand", 2) * d_model:
        raise ssm.refuse("d_ssm", "the whole inner width")
    d_head = ssm.integer("headdim", 64)
    if inner % d_head:
        raise ssm.refuse("headdim", f"a divisor of the inner width {inner}")
    return inner // d_head, d_head


def _ssm1(ssm: Fields, d_model: int) -> dict[str, Any]:
    ssm.only(conv_bias=(True,))
    rank = ssm.data.get("dt_rank", "auto")
    return {
        "mixer": "mamba1", "d_inner": ssm.integer("expand", 2) * d_model, "d_state": ssm.integer("d_state", 16),
        "dt_rank": None if rank == "auto" else ssm.integer("dt_rank"), "conv_taps": ssm.integer("d_conv", 4),
        "proj_bias": ssm.flag("bias", False),
    }  # fmt: skip


def _ssm2(ssm: Fields, d_model: int) -> dict[str, Any]:
    ssm.only(D_has_hdim=(False,), rmsnorm=(True,), activation=SILU)
    heads, d_head = _inner(ssm, d_model)
    return {
        "mixer": "mamba2", "n_heads": heads, "d_head": d_head, "d_state": ssm.integer("d_state", 128),
        "n_groups": ssm.integer("ngroups", 1), "conv_taps": ssm.integer("d_conv", 4),
        "conv_bias": ssm.flag("conv_bias", True), "proj_bias": ssm.flag("bias", False),
        "dt_limit": time_step_limit(ssm, "dt_limit"), "norm_before_gate": ssm.flag("norm_before_gate", False),
        "norm_eps": NORM_EPS,
    }  # fmt: skip


def _ssm3(ssm: Fields, d_model: int, values: Values) -> dict[str, Any]:
    heads, d_head = _inner(ssm, d_model)
    why = " (mamba_ssm up to 2.3.2 computes softplus, its main branch since June 2026 heavy_tail, from the same file)"
    return {
        "mixer": "mamba3", "n_heads": heads, "d_head": d_head, "d_state": ssm.integer("d_state", 128),
        "n_groups": ssm.integer("ngroups", 1), "rope_fraction": ssm.number("rope_fraction", 0.5),
        "rank": ssm.integer("mimo_rank", 4) if ssm.flag("is_mimo", False) else None,
        "a_activation": values.text("a_activation", ACTIVATIONS, None, why), "a_floor": ssm.number("A_floor", 1e-4),
        "out_norm": ssm.flag("is_outproj_norm", False), "norm_eps": NORM_EPS,
    }  # fmt: skip


def _mha(attn: Fields, d_model: int) -> dict[str, Any]:
    attn.only(causal=(True,), mlp_dim=(0,), softmax_scale=(None,), rotary_emb_interleaved=(False,))
    heads = attn.integer("num_heads")
    d_head = attn.integer("head_dim", d_model // heads)
    return {
        "mixer": "attention", "n_heads": heads, "n_kv_heads": attn.integer("num_heads_kv", heads), "d_head": d_head,
        "rotary": attn.integer("rotary_emb_dim", 0, low=0), "rotary_base": attn.number("rotary_emb_base", 10000.0),
        "qkv_bias": attn.flag("qkv_proj_bias", True), "out_bias": attn.flag("out_proj_bias", True),
        "conv_taps": attn.integer("d_conv", 0, low=0),
    }  # fmt: skip


def _ssm_table(model: Decoder) -> Table:
    layers = []
    for i, kind in enumerate(model.config.pattern):
        options, width = model.config.mixers[kind], model.config.d_ff
        entries: list[Entry] = []
        names = {**LAYER, "mlp_norm.weight": "norm2.weight", "mlp.down.weight": "mlp.fc2.weight"}
        if width is not None:  # y * SiLU(gate), y first
            entries.append(rows("mlp.fc1.weight", ["mlp.up.weight", "mlp.gate.weight"], [width, width]))
        if options["mixer"] == "attention":
            entries += _packed(options)
            names = {"mixer.o_proj.*": "mixer.out_proj.", **names}
        layers.append(LayerNames(f"backbone.layers.{i}.", names, entries))
    return build_table(model, SSM_TOP, layers, "lm_head.weight")


def _packed(options: Mapping[str, Any]) -> list[Entry]:
    """in_proj holds q, k and v below each other; so does the convolution behind it."""
    queries, keys = options["n_heads"] * options["d_head"], options["n_kv_heads"] * options["d_head"]
    sizes = [queries, keys, keys]
    parts = ["in_proj.weight", *(["in_proj.bias"] if options["qkv_bias"] else [])]
    parts += ["conv1d.weight", "conv1d.bias"] if options["conv_taps"] else []
    return [rows(f"mixer.{part}", [f"mixer.{n}_{part.replace('in_', '')}" for n in "qkv"], sizes) for part in parts]
