"""Other people's models once more, in fp64 and under their own tensor names: what their files mean, written plainly.

Each function draws the tensors of a tiny checkpoint and returns them with the logits they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.gdn2.mixers import transcribed

Tensors = dict[str, Tensor]
Logits = Callable[[list[int]], Tensor]
D, FF, VOCAB = 32, 48, 90


class Drawn:
    """Random tensors by name."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def matrix(self, name: str, *shape: int) -> None:
        self.tensors[name] = torch.randn(*shape, generator=self.random) * shape[-1] ** -0.5

    def vector(self, name: str, *shape: int, around: float = 0.0) -> None:
        self.tensors[name] = around + 0.3 * torch.randn(*shape, generator=self.random)

    def wide(self) -> Tensors:
        return {name: t.double() for name, t in self.tensors.items()}


def layer(w: Tensors, prefix: str, renamed: dict[str, str] | None = None) -> Any:
    """Tensors under `prefix` as the transcribed layers want them: an object with named parameters."""
    found = {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
    for old, new in (renamed or {}).items():
        if old in found:
            found[new] = found.pop(old)
    return SimpleNamespace(named_parameters=lambda: list(found.items()))


def rotated(x: Tensor, rotary: int, base: float, bf16: bool = False) -> Tensor:
    """x [T, heads, d], first half of the rotary channels against the second."""
    half = rotary // 2
    angle = torch.arange(x.shape[0])[:, None].double() / base ** (torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    if bf16:
        cos, sin = cos.bfloat16().double(), sin.bfloat16().double()
    a, b = x[..., :half], x[..., half:rotary]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., rotary:]], -1)


def attended(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax attention of q [T, H, d] over k, v [T, G, d], each row seeing itself and window - 1 rows before."""
    t, share = torch.arange(q.shape[0]), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    hidden = t[None] > t[:, None]
    if window is not None:
        hidden |= t[None] <= t[:, None] - window
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def nvlabs(first: bool, window: int = 24, base: float = 5000.0) -> tuple[Tensors, Logits]:
    """The authors' hybrid: delta layer, window attention, delta layer. `first`: Gated DeltaNet, tied, bf16 rotary."""
    d, heads, width, key, value, eps = Drawn(3 + first), 4, D // 4, 8, 16, 1e-5
    for i in range(3):
        h = f"transformer.h.{i}."
        for name in ("norm_1.weight", "norm_2.weight"):
            d.vector(h + name, D, around=1)
        for name, shape in {"w1": (FF, D), "w2": (FF, D), "w3": (D, FF)}.items():
            d.matrix(f"{h}mlp.swiglu.{name}.weight", *shape)
        if i == 1:
            d.matrix(h + "attn.attn.weight", 3 * D, D)
            d.matrix(h + "attn.proj.weight", D, D)
            continue
        keys, values = 2 * key, 2 * value
        for name, rows in {"q": keys, "k": keys, "v": values}.items():
            d.matrix(f"{h}attn.{name}_proj.weight", rows, D)
            d.matrix(f"{h}attn.{name}_conv1d.weight", rows, 1, 4)
        d.matrix(h + "attn.o_proj.weight", D, values)
        d.vector(h + "attn.A_log", 2)
        if first:
            d.matrix(h + "attn.g_proj.weight", values, D)
            d.matrix(h + "attn.gk_proj.weight", 2, D)
            d.matrix(h + "attn.b_proj.weight", 2, D)
            for name in ("b_proj.bias", "dt_bias", "D"):
                d.vector(h + "attn." + name, 2)
            d.vector(h + "attn.g_norm_swish_gate.weight", value, around=1)
            continue
        for name, shape in {
            "b_proj": (keys, D), "w_proj": (values, D), "f_proj.0": (value, D), "f_proj.1": (keys, value),
            "g_proj.0": (value, D), "g_proj.1": (values, value),
        }.items():  # fmt: skip
            d.matrix(f"{h}attn.{name}.weight", *shape)
        d.vector(h + "attn.g_proj.1.bias", values)
        d.vector(h + "attn.dt_bias", keys)
        d.vector(h + "attn.o_norm.weight", value, around=1)
    d.matrix("transformer.wte.weight", VOCAB, D)
    d.vector("transformer.ln_f.weight", D, around=1)
    if first:
        d.tensors["lm_head.weight"] = d.tensors["transformer.wte.weight"].clone()
    else:
        d.matrix("lm_head.weight", VOCAB, D)
    w = d.wide()
    sizes = {"n_heads": 2, "d_key": key, "norm_eps": eps}
    old = {"gk_proj.weight": "a_proj.weight", "g_norm_swish_gate.weight": "o_norm.weight"}

    def window_attention(x: Tensor, h: str) -> Tensor:
        fused = w[h + "attn.attn.weight"]
        parts = [[fused[(3 * n + j) * width : (3 * n + j + 1) * width] for n in range(heads)] for j in range(3)]
        q, k, v = (torch.stack([x @ rows.T for rows in part], 1) for part in parts)
        q, k = rotated(q, width, base, first), rotated(k, width, base, first)
        return attended(q, k, v, window) @ w[h + "attn.proj.weight"].T

    def logits(ids: list[int]) -> Tensor:
        x = w["transformer.wte.weight"][ids]
        for i in range(3):
            h = f"transformer.h.{i}."
            y = transcribed.normed(x, w[h + "norm_1.weight"], eps)
            if i == 1:
                x = x + window_attention(y, h)
            else:
                x = x + transcribed.delta_family("gdn" if first else "gdn2", layer(w, h + "attn.", old), y, sizes)
            y = transcribed.normed(x, w[h + "norm_2.weight"], eps)
            gate, up, down = (w[f"{h}mlp.swiglu.{n}.weight"] for n in ("w1", "w2", "w3"))
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return transcribed.normed(x, w["transformer.ln_f.weight"], eps) @ w["lm_head.weight"].T

    return d.tensors, logits


FLA = {
    "model_type": "delta_net", "hidden_size": D, "vocab_size": VOCAB, "num_hidden_layers": 3, "num_heads": 2,
    "expand_k": 0.5, "expand_v": 1.0, "norm_eps": 1e-4, "hidden_act": "swish", "tie_word_embeddings": False,
    "allow_neg_eigval": True, "conv_size": 4, "use_gate": False,
    "attn": {
        "layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 20, "rope_theta": 900.0,
    },
}  # fmt: skip
FLA_TRANSFORMER = {
    "model_type": "transformer", "hidden_size": D, "vocab_size": VOCAB, "num_hidden_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "qk_norm": True, "norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


def fla(config: dict[str, Any]) -> tuple[Tensors, Logits]:
    """fla's DeltaNet with attention layers, and its transformer."""
    d, eps = Drawn(11), config["norm_eps"]
    soft = config.get("attn") or config
    full = config["attn"]["layers"] if "attn" in config else range(config["num_hidden_layers"])
    groups, width = soft["num_kv_heads"], D // soft["num_heads"]
    for i in range(config["num_hidden_layers"]):
        h = f"model.layers.{i}."
        d.vector(h + "attn_norm.weight", D, around=1)
        d.vector(h + "mlp_norm.weight", D, around=1)
        for name, shape in {"gate": (FF, D), "up": (FF, D), "down": (D, FF)}.items():
            d.matrix(f"{h}mlp.{name}_proj.weight", *shape)
        if i in full:
            for name, rows in {"q": D, "k": groups * width, "v": groups * width, "o": D}.items():
                d.matrix(f"{h}attn.{name}_proj.weight", rows, D)
                if name != "o" and soft.get("qkv_bias"):
                    d.vector(f"{h}attn.{name}_proj.bias", rows)
            for name in "qk" if soft.get("qk_norm") else "":
                d.vector(f"{h}attn.{name}_norm.weight", width, around=1)
            continue
        for name, rows in {"q": D // 2, "k": D // 2, "v": D}.items():
            d.matrix(f"{h}attn.{name}_proj.weight", rows, D)
            d.matrix(f"{h}attn.{name}_conv1d.weight", rows, 1, 4)
        d.matrix(h + "attn.b_proj.weight", 2, D)
        d.matrix(h + "attn.o_proj.weight", D, D)
        d.vector(h + "attn.o_norm.weight", D // 2, around=1)
    d.matrix("model.embeddings.weight", VOCAB, D)
    d.vector("model.norm.weight", D, around=1)
    if not config["tie_word_embeddings"]:
        d.matrix("lm_head.weight", VOCAB, D)
    w = d.wide()
    sizes = {"n_heads": 2, "d_key": D // 4, "norm_eps": eps, "beta_max": 2}

    def softmax(x: Tensor, h: str) -> Tensor:
        q, k, v = (F.linear(x, w[f"{h}{n}_proj.weight"], w.get(f"{h}{n}_proj.bias")) for n in "qkv")
        q, k, v = (y.unflatten(-1, (-1, width)) for y in (q, k, v))
        if soft.get("qk_norm"):
            q = transcribed.normed(q, w[h + "q_norm.weight"], 1e-5)
            k = transcribed.normed(k, w[h + "k_norm.weight"], 1e-5)
        q, k = (rotated(y, width, soft["rope_theta"]) for y in (q, k))
        return attended(q, k, v, soft.get("window_size")) @ w[h + "o_proj.weight"].T

    def logits(ids: list[int]) -> Tensor:
        x = w["model.embeddings.weight"][ids]
        for i in range(config["num_hidden_layers"]):
            h = f"model.layers.{i}."
            y = transcribed.normed(x, w[h + "attn_norm.weight"], eps)
            if i in full:
                x = x + softmax(y, h + "attn.")
            else:
                x = x + transcribed.delta_family("deltanet", layer(w, h + "attn."), y, sizes)
            y = transcribed.normed(x, w[h + "mlp_norm.weight"], eps)
            gate, up, down = (w[f"{h}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
        head = w.get("lm_head.weight", w["model.embeddings.weight"])
        return transcribed.normed(x, w["model.norm.weight"], eps) @ head.T

    return d.tensors, logits


SAMBA = {
    "model_type": "samba", "hidden_size": D, "vocab_size": VOCAB, "num_hidden_layers": 3, "state_size": 8, "expand": 2,
    "norm_eps": 1e-4, "hidden_act": "swish", "tie_word_embeddings": False, "use_bias": True, "time_step_rank": 3,
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 20, "rope_theta": 900.0},
}  # fmt: skip


def samba() -> tuple[Tensors, Logits]:
    """fla's Samba: Mamba-1, a window of attention, Mamba-1, each with an MLP."""
    d, inner, states, rank, eps, soft = Drawn(29), 2 * D, 8, 3, SAMBA["norm_eps"], SAMBA["attn"]
    for i in range(3):
        h = f"backbone.layers.{i}."
        for name in ("mixer_norm.weight", "mlp_norm.weight"):
            d.vector(h + name, D, around=1)
        for name, shape in {"gate": (FF, D), "up": (FF, D), "down": (D, FF)}.items():
            d.matrix(f"{h}mlp.{name}_proj.weight", *shape)
        m = h + "mixer."
        if i in soft["layers"]:
            for name, rows in {"q": D, "k": D // 2, "v": D // 2, "o": D}.items():
                d.matrix(f"{m}{name}_proj.weight", rows, D)
            continue
        shapes = {"in_proj": (2 * inner, D), "x_proj": (rank + 2 * states, inner), "dt_proj": (inner, rank)}
        for name, shape in {**shapes, "out_proj": (D, inner), "conv1d": (inner, 1, 4)}.items():
            d.matrix(f"{m}{name}.weight", *shape)
        for name, rows in {"in_proj": 2 * inner, "dt_proj": inner, "out_proj": D, "conv1d": inner}.items():
            d.vector(f"{m}{name}.bias", rows)
        d.vector(m + "D", inner, around=1)
        d.vector(m + "A_log", inner, states)
    d.matrix("backbone.embeddings.weight", VOCAB, D)
    d.vector("backbone.norm_f.weight", D, around=1)
    d.matrix("lm_head.weight", VOCAB, D)
    w = d.wide()

    def logits(ids: list[int]) -> Tensor:
        x = w["backbone.embeddings.weight"][ids]
        for i in range(3):
            h = f"backbone.layers.{i}."
            y = transcribed.normed(x, w[h + "mixer_norm.weight"], eps)
            if i in soft["layers"]:
                q, k, v = ((y @ w[f"{h}mixer.{n}_proj.weight"].T).unflatten(-1, (-1, D // 4)) for n in "qkv")
                q, k = (rotated(z, D // 4, soft["rope_theta"]) for z in (q, k))
                x = x + attended(q, k, v, soft["window_size"]) @ w[h + "mixer.o_proj.weight"].T
            else:
                x = x + transcribed.mamba1(
                    layer(w, h + "mixer."), y, {"d_inner": inner, "d_state": states, "dt_rank": rank}
                )
            y = transcribed.normed(x, w[h + "mlp_norm.weight"], eps)
            gate, up, down = (w[f"{h}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return transcribed.normed(x, w["backbone.norm_f.weight"], eps) @ w["lm_head.weight"].T

    return d.tensors, logits


ATTENTION = {
    "causal": True, "num_heads": 4, "num_heads_kv": 2, "head_dim": 12, "d_conv": 4, "rotary_emb_dim": 6,
    "qkv_proj_bias": True, "out_proj_bias": True,
}  # fmt: skip
MAMBA2_ATTENTION = {
    "d_model": D, "d_intermediate": 40, "n_layer": 3, "vocab_size": 85, "pad_vocab_size_multiple": 16,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2}, "attn_layer_idx": [1],
    "attn_cfg": ATTENTION, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True,
}  # fmt: skip
MAMBA3_MIMO = {
    **MAMBA2_ATTENTION, "d_intermediate": 0, "n_layer": 2, "attn_layer_idx": [], "attn_cfg": {},
    "ssm_cfg": {
        "layer": "Mamba3", "d_state": 8, "headdim": 16, "is_mimo": True, "mimo_rank": 4, "is_outproj_norm": True,
    },
}  # fmt: skip
TRANSFORMERPP = {
    **MAMBA2_ATTENTION, "n_layer": 2, "attn_layer_idx": [0, 1], "ssm_cfg": {}, "tie_embeddings": False,
    "attn_cfg": {"num_heads": 4, "rotary_emb_dim": 8, "qkv_proj_bias": False, "out_proj_bias": False, "causal": True},
}  # fmt: skip


def mamba_ssm(config: dict[str, Any]) -> tuple[Tensors, Logits]:
    """state-spaces/mamba: Mamba-2 and attention with a gated MLP wider than stated, Mamba-3 MIMO, softmax."""
    d, vocab, ff, inner, heads = Drawn(23), 96, 128 if config["d_intermediate"] else 0, 2 * D, 4
    ssm, soft = config["ssm_cfg"], config["attn_cfg"]
    rank = ssm.get("mimo_rank", 0)
    for i in range(config["n_layer"]):
        h = f"backbone.layers.{i}."
        d.vector(h + "norm.weight", D, around=1)
        if ff:
            d.vector(h + "norm2.weight", D, around=1)
            d.matrix(h + "mlp.fc1.weight", 2 * ff, D)
            d.matrix(h + "mlp.fc2.weight", D, ff)
        m = h + "mixer."
        if i in config["attn_layer_idx"]:
            width, groups = soft.get("head_dim", D // 4), soft.get("num_heads_kv", 4)
            rows = (4 + 2 * groups) * width
            d.matrix(m + "in_proj.weight", rows, D)
            d.matrix(m + "out_proj.weight", D, 4 * width)
            if soft.get("qkv_proj_bias"):
                d.vector(m + "in_proj.bias", rows)
                d.vector(m + "out_proj.bias", D)
            if soft.get("d_conv"):
                d.matrix(m + "conv1d.weight", rows, 1, soft["d_conv"])
                d.vector(m + "conv1d.bias", rows)
            continue
        d.matrix(m + "out_proj.weight", D, inner)
        for name in ("D", "dt_bias"):
            d.vector(m + name, heads)
        d.vector(m + "norm.weight", inner, around=1)
        if ssm["layer"] == "Mamba2":
            channels = inner + 2 * ssm["ngroups"] * ssm["d_state"]
            d.matrix(m + "in_proj.weight", inner + channels + heads, D)
            d.matrix(m + "conv1d.weight", channels, 1, 4)
            d.vector(m + "conv1d.bias", channels)
            d.vector(m + "A_log", heads)
            continue
        states = ssm["d_state"]
        d.matrix(m + "in_proj.weight", 2 * inner + 2 * states * rank + 3 * heads + states // 4, D)
        for name in "BC":
            d.vector(f"{m}{name}_bias", heads, rank, states, around=1)
            d.vector(f"{m}{name}_norm.weight", states, around=1)
        for name in "xzo":
            d.vector(f"{m}mimo_{name}", heads, rank, 16, around=1 if name == "z" else 1 / 3)
    d.matrix("backbone.embedding.weight", vocab, D)
    d.vector("backbone.norm_f.weight", D, around=1)
    if config["tie_embeddings"]:
        d.tensors["lm_head.weight"] = d.tensors["backbone.embedding.weight"].clone()
    else:
        d.matrix("lm_head.weight", vocab, D)
    w = d.wide()

    def softmax(x: Tensor, m: str) -> Tensor:
        width, groups = soft.get("head_dim", D // 4), soft.get("num_heads_kv", 4)
        packed = F.linear(x, w[m + "in_proj.weight"], w.get(m + "in_proj.bias"))
        if soft.get("d_conv"):
            packed = transcribed.Weights(layer(w, m)).conv(packed, "conv1d")
        q, k, v = packed.unflatten(-1, (-1, width)).split([4, groups, groups], 1)
        q, k = (rotated(y, soft["rotary_emb_dim"], 1e4) for y in (q, k))
        return F.linear(attended(q, k, v, None), w[m + "out_proj.weight"], w.get(m + "out_proj.bias"))

    def logits(ids: list[int]) -> Tensor:
        x = w["backbone.embedding.weight"][ids]
        for i in range(config["n_layer"]):
            h = f"backbone.layers.{i}."
            y = transcribed.normed(x, w[h + "norm.weight"], 1e-5)
            sizes = {"n_heads": heads, "d_head": 16, "d_state": ssm.get("d_state")}
            if i in config["attn_layer_idx"]:
                x = x + softmax(y, h + "mixer.")
            elif ssm["layer"] == "Mamba2":
                x = x + transcribed.mamba2(layer(w, h + "mixer."), y, {**sizes, "n_groups": ssm["ngroups"]})
            else:
                options = {**sizes, "rank": rank, "out_norm": True, "a_activation": "heavy_tail"}
                x = x + transcribed.mamba3(layer(w, h + "mixer."), y, options)
            if ff:
                y = transcribed.normed(x, w[h + "norm2.weight"], 1e-5)
                up, gate = (y @ w[h + "mlp.fc1.weight"].T).chunk(2, -1)
                x = x + (up * F.silu(gate)) @ w[h + "mlp.fc2.weight"].T
        return transcribed.normed(x, w["backbone.norm_f.weight"], 1e-5) @ w["lm_head.weight"].T

    return d.tensors, logits
