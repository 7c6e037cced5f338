"""The authors' `.pth` files (lit_gpt): Gated DeltaNet-2 and the first Gated DeltaNet, recurrent and hybrid.

The files hold no configuration. Sizes are inferred from the tensors; what tensors cannot tell is asked for by name
(window, rope_base, heads of another width than 128) or has the published value unless said otherwise (norm_eps,
mixer_norm_eps, negative_eigenvalues).

Axes: D model width, G heads of the window attention, P their width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdn2.checkpoints.fields import Values
from gdn2.checkpoints.safe import Shape, TensorInfo
from gdn2.checkpoints.tables import Entry, LayerNames, Table, build_table, mixer_config
from gdn2.errors import CheckpointError
from gdn2.mixers.attention import AttentionConfig
from gdn2.mixers.gdn import GDNConfig
from gdn2.mixers.gdn2 import GDN2Config
from gdn2.models import Decoder, ModelConfig

ATTENTION_WIDTH = 128  # head_size of every published configuration
TRAIN_LENGTH = 4096

TOP = {
    "embed.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "head.weight": "lm_head.weight",
}
LAYER = {
    "mixer_norm.weight": "norm_1.weight",
    "mlp_norm.weight": "norm_2.weight",
    "mlp.gate.weight": "mlp.swiglu.w1.weight",
    "mlp.up.weight": "mlp.swiglu.w2.weight",
    "mlp.down.weight": "mlp.swiglu.w3.weight",
}
GDN2 = {**LAYER, "mixer.*": "attn."}
GDN1 = {
    **LAYER,
    "mixer.a_proj.weight": "attn.gk_proj.weight",
    "mixer.o_norm.weight": "attn.g_norm_swish_gate.weight",
    "mixer.*": "attn.",
}
ATTENTION = {**LAYER, "mixer.o_proj.weight": "attn.proj.weight"}
UNUSED = ("attn.D",)  # the first version has it and never reads it


def looks_like(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether these are names of the authors' code."""
    return TOP["embed.weight"] in tensors


def configure(tensors: Mapping[str, TensorInfo], values: Values, where: object) -> ModelConfig:
    """The configuration that the tensors and the user's values describe.

    Raises:
        CheckpointError: tensors of no known layer.
        UserError: something that must be given by name.
    """
    shapes = {name: info.shape for name, info in tensors.items()}
    found = {int(m[1]) for name in shapes if (m := re.match(r"transformer\.h\.(\d{1,4})\.", name))}
    if not found or found != set(range(len(found))):
        raise CheckpointError(f"{where}: layers of transformer.h must be numbered from 0 without a gap")
    vocab, d_model = _shape(shapes, TOP["embed.weight"], 2, where)
    d_ff, _ = _shape(shapes, "transformer.h.0.mlp.swiglu.w1.weight", 2, where)
    pattern = tuple(_kind(shapes, i, where) for i in range(len(found)))
    eps = values.number("mixer_norm_eps", float, 1e-5)
    mixers: dict[str, dict[str, Any]] = {}
    for i, kind in enumerate(pattern):
        if kind not in mixers:
            read = {"gdn2": _gdn2, "gdn": _gdn1, "window": _window}[kind]
            mixers[kind] = read(shapes, f"transformer.h.{i}.attn.", values, where)
            if kind != "window":
                mixers[kind]["norm_eps"] = eps
    first = "gdn" in pattern  # the first version ties its embeddings and rounds its rotary tables
    tied = values.text("tied", ("yes", "no"), "yes" if first or "lm_head.weight" not in shapes else "no") == "yes"
    if "window" in mixers:
        mixers["window"]["rotary_bf16"] = values.text("rotary", ("bf16", "fp32"), "bf16" if first else "fp32") == "bf16"
    return ModelConfig(
        d_model=d_model, vocab_size=vocab, pattern=pattern, mixers=mixers, d_ff=d_ff, tied=tied,
        norm_eps=values.number("norm_eps", float, 1e-5), train_length=TRAIN_LENGTH,
    )  # fmt: skip


def _shape(shapes: Mapping[str, Shape], name: str, axes: int, where: object) -> Shape:
    shape = shapes.get(name, ())
    if len(shape) != axes:
        raise CheckpointError(f"{where}: {name} must have {axes} axes, {f'got {list(shape)}' if shape else 'missing'}")
    return shape


def _kind(shapes: Mapping[str, Shape], i: int, where: object) -> str:
    prefix = f"transformer.h.{i}.attn."
    for name, kind in {"w_proj.weight": "gdn2", "gk_proj.weight": "gdn", "attn.weight": "window"}.items():
        if prefix + name in shapes:
            return kind
    raise CheckpointError(f"{where}: layer {i} is none of GDN-2, Gated DeltaNet and window attention")


def _delta(shapes: Mapping[str, Shape], prefix: str, norm: str, where: object) -> dict[str, Any]:
    """Sizes both delta layers share; `heads` is the length of A_log."""
    heads, width = _shape(shapes, prefix + "A_log", 1, where)[0], _shape(shapes, prefix + norm, 1, where)[0]
    keys, values = (_shape(shapes, f"{prefix}{n}_proj.weight", 2, where)[0] for n in "qv")
    if keys % heads or values % width:
        sizes = f"q_proj has {keys} rows for {heads} heads, v_proj {values} for width {width}"
        raise CheckpointError(f"{where}: {prefix}{sizes}")
    return {"n_heads": heads, "d_key": keys // heads, "d_value": width, "n_value_heads": values // width}


def _gdn2(shapes: Mapping[str, Shape], prefix: str, values: Values, where: object) -> dict[str, Any]:
    conv = shapes.get(prefix + "q_conv1d.weight", (0, 1, 0))
    erase_max = 2 if values.text("negative_eigenvalues", ("yes", "no"), "no") == "yes" else 1
    sizes = _delta(shapes, prefix, "o_norm.weight", where)
    return {"mixer": "gdn2", **sizes, "conv_taps": conv[-1], "erase_max": erase_max, "gate": "silu"}


def _gdn1(shapes: Mapping[str, Shape], prefix: str, values: Values, where: object) -> dict[str, Any]:
    conv = shapes.get(prefix + "q_conv1d.weight", (0, 1, 4))
    sizes = _delta(shapes, prefix, "g_norm_swish_gate.weight", where)
    return {"mixer": "gdn", **sizes, "conv_taps": conv[-1], "gate": "silu", "beta_bias": True}


def _window(shapes: Mapping[str, Shape], prefix: str, values: Values, where: object) -> dict[str, Any]:
    rows, d_model = _shape(shapes, prefix + "attn.weight", 2, where)
    width_known = rows == 3 * d_model and d_model % ATTENTION_WIDTH == 0
    heads = values.number(
        "attention_heads", int, d_model // ATTENTION_WIDTH if width_known else None, f" (width {d_model}, {rows} rows)"
    )
    _, inner = _shape(shapes, prefix + "proj.weight", 2, where)
    groups = (rows * heads // inner - heads) // 2 if inner % heads == 0 else 0
    if groups < 1 or (heads + 2 * groups) * inner != rows * heads:
        raise CheckpointError(f"{where}: {prefix}attn.weight with {rows} rows does not divide into {heads} heads")
    return {
        "mixer": "attention", "n_heads": heads, "n_kv_heads": groups, "d_head": inner // heads,
        "window": values.number("window", int, None, " (published: 2048)"),
        "rotary_base": values.number("rope_base", float, None, " (published: 10000)"),
    }  # fmt: skip


def table(model: Decoder) -> Table:
    """Names of the authors' code for a model of GDN-2, Gated DeltaNet and window attention layers.

    Raises:
        CheckpointError: a layer that their code does not have.
    """
    layers = []
    for i, kind in enumerate(model.config.pattern):
        options = model.config.mixers[kind]
        prefix = f"transformer.h.{i}."
        if options["mixer"] == "attention":
            layers.append(LayerNames(prefix, ATTENTION, (_fused_qkv(mixer_config(model.config, kind)),)))
        elif options["mixer"] == "gdn2":
            layers.append(LayerNames(prefix, GDN2))
        elif options["mixer"] == "gdn" and options.get("beta_bias"):
            layers.append(LayerNames(prefix, GDN1, ignored=UNUSED))
        else:
            raise CheckpointError(
                f"the authors' code has no {options['mixer']} layer of this kind: it cannot be written"
            )
    return build_table(model, TOP, layers, tied_copy="lm_head.weight")


def write(model: Decoder) -> dict[str, Tensor]:
    """The state dict their code loads, with what it holds twice (tied heads) or without using it.

    Raises:
        CheckpointError: their code has no such model.
    """
    _refuse_foreign(model.config)
    names = table(model)
    tensors = names.save(model)
    tensors |= {copy: tensors[original] for copy, original in names.copies.items()}
    heads = {f"transformer.h.{i}.attn.D": layer.mixer for i, layer in enumerate(model.blocks())}
    for name in sorted(names.ignored):
        tensors[name] = torch.ones_like(heads[name].get_parameter("A_log"), device="cpu")
    return tensors


def _refuse_foreign(config: ModelConfig) -> None:
    """Refuse what their code would compute differently."""
    names = list(dict.fromkeys(config.pattern))
    kinds = {config.mixers[name]["mixer"] for name in names}
    if config.d_ff is None or config.post_norm or len(names) != len(kinds) or len(kinds - {"attention"}) != 1:
        raise CheckpointError(f"the authors' code has no model of {', '.join(names)} layers like this one")
    for name in names:
        o = mixer_config(config, name)
        if isinstance(o, AttentionConfig):
            extra = (o.qkv_bias, o.out_bias, o.conv_taps, o.gate, o.qk_norm != "none", o.rotated != o.d_head)
            if any(extra) or o.window is None:
                raise CheckpointError("the authors' attention is plain: a window, full rotary, no bias, norm or gate")
        elif o.gate != "silu":
            raise CheckpointError("the authors' code has a SiLU output gate and this model a sigmoid")
        elif isinstance(o, GDN2Config) and (o.scalar_erase or o.scalar_write):
            raise CheckpointError("the authors' GDN-2 has no scalar erase or write gate")
        elif isinstance(o, GDNConfig) and o.beta_max != 1:
            raise CheckpointError("the authors' first version has no negative eigenvalues")


def unsaid(config: ModelConfig) -> tuple[str, ...]:
    """Values that the file cannot hold and that differ from the published ones, as NAME=VALUE."""
    first = any(config.mixers[name]["mixer"] == "gdn" for name in config.pattern)
    out = [] if config.norm_eps == 1e-5 else [f"norm_eps={config.norm_eps}"]
    if config.tied != first:
        out.append(f"tied={'yes' if config.tied else 'no'}")
    for name in dict.fromkeys(config.pattern):
        o = mixer_config(config, name)
        if isinstance(o, AttentionConfig):
            out += [f"window={o.window}", f"rope_base={o.rotary_base}"]
            out += [] if config.d_model == ATTENTION_WIDTH * o.n_heads else [f"attention_heads={o.n_heads}"]
            out += [] if o.rotary_bf16 == first else [f"rotary={'bf16' if o.rotary_bf16 else 'fp32'}"]
        else:
            out += [] if o.norm_eps == 1e-5 else [f"mixer_norm_eps={o.norm_eps}"]
            out += ["negative_eigenvalues=yes"] if isinstance(o, GDN2Config) and o.erase_max == 2 else []
    return tuple(out)


def _fused_qkv(o: AttentionConfig) -> Entry:
    """Rows of attn.weight by group: the group's q heads, its k head, its v head, P rows each."""
    heads, groups, width = o.n_heads, o.kv_heads, o.d_head
    each = heads // groups

    def load(fused: Tensor) -> tuple[Tensor, ...]:
        parts = fused.view(groups, each + 2, width, -1).split([each, 1, 1], dim=1)
        return tuple(part.reshape(-1, fused.shape[1]) for part in parts)

    def save(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        parts = [t.view(groups, -1, width, t.shape[1]) for t in (q, k, v)]
        return (torch.cat(parts, dim=1).reshape(-1, q.shape[1]),)

    names = tuple(f"mixer.{n}_proj.weight" for n in "qkv")
    return Entry(("attn.attn.weight",), names, load, save)
