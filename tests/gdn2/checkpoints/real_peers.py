"""Run a model of fla's or mamba_ssm's own code and write its checkpoint, ids and logits: python real_peers.py NAME OUT.

Where OUT/model is there already, fla opens that one.

Without a GPU the libraries' Triton kernels run in Triton's interpreter, where each autotuned kernel takes its first
configuration. What cannot run there is replaced, and only that:

* fla's layers run in their own "fused_recurrent" mode: the chunk kernels do not run in the interpreter;
* flash-attn, which both call, by torch's attention with the same causal window and a rotation written out.

Mamba-3 of either library needs a GPU (its kernels hold inline assembly): `real_peers.py NAME OUT --cuda`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INTERPRETED = __name__ == "__main__" and "--cuda" not in sys.argv
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

UNIMPORTABLE = 77  # exit code
TOKENS, VOCAB, D = 300, 85, 32
ATTN = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 20, "rope_theta": 900.0}
GDN2 = {
    "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 2.0, "allow_neg_eigval": True, "norm_eps": 1e-4,
}  # fmt: skip
# The kernels for several ranks want heads of 32 at least and chunks of 64 rows, 4 for each of 16 tokens.
FLA: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_deltanet": ("GatedDeltaNet", {
        "attn_mode": "fused_recurrent", "head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 2.0,
        "intermediate_size": 48, "allow_neg_eigval": True, "attn": ATTN, "num_hidden_layers": 3,
    }),
    "gdn2": ("GatedDeltaNet", {"head_dim": 8, "num_heads": 2, "norm_eps": 1e-4, "intermediate_size": 48}),
    "kda_bounded": ("KDA", {
        "attn_mode": "fused_recurrent", "head_dim": 8, "num_heads": 2, "intermediate_size": 48, "safe_gate": True,
        "lower_bound": -5.0, "allow_neg_eigval": True,
    }),
    "kda": ("KDA", {
        "attn_mode": "fused_recurrent", "head_dim": 8, "num_heads": 2, "num_v_heads": 4, "intermediate_size": 48,
        "attn": ATTN, "num_hidden_layers": 2,
    }),
    "delta_net": ("DeltaNet", {
        "attn_mode": "fused_recurrent", "num_heads": 2, "expand_k": 0.5, "intermediate_size": 48, "attn": ATTN,
        "num_hidden_layers": 2,
    }),
    "transformer": ("Transformer", {
        "num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "intermediate_size": 48, "window_size": 50,
    }),
    # With more groups than one fla's path without a GPU gives heads other groups than its kernels do.
    "mamba2": ("Mamba2", {
        "head_dim": 8, "num_heads": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 32,
        "tie_word_embeddings": True,
    }),
    "mamba": ("Mamba", {"state_size": 8, "expand": 2, "use_bias": True}),
    "samba": ("Samba", {"state_size": 8, "attn": ATTN, "num_hidden_layers": 3, "hidden_ratio": 2, "use_bias": True}),
    "mamba3": ("Mamba3", {"head_dim": 16, "state_size": 16, "expand": 2, "is_mimo": False}),
    "mamba3_mimo": ("Mamba3", {
        "head_dim": 32, "state_size": 32, "expand": 2, "is_mimo": True, "mimo_rank": 4, "chunk_size": 16,
    }),
}  # fmt: skip
SOFTMAX = {"num_heads": 4, "head_dim": 8, "causal": True, "qkv_proj_bias": False, "out_proj_bias": False}
MAMBA2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 32, "use_mem_eff_path": False}
SSM: dict[str, dict[str, Any]] = {
    "ssm_mamba2": {"ssm_cfg": MAMBA2},
    "ssm_mamba2attn": {
        "ssm_cfg": MAMBA2, "attn_layer_idx": [1],
        "attn_cfg": {**SOFTMAX, "d_conv": 4, "num_heads_kv": 2, "rotary_emb_dim": 4}, "d_intermediate": 48,
    },
    "ssm_mamba3": {"ssm_cfg": {"layer": "Mamba3", "d_state": 16, "headdim": 16}, "d_intermediate": 48},
    "ssm_mamba3_mimo": {
        "ssm_cfg": {"layer": "Mamba3", "d_state": 32, "headdim": 32, "is_mimo": True, "mimo_rank": 4, "chunk_size": 16},
    },
    "ssm_transformer": {
        "ssm_cfg": {}, "attn_layer_idx": [0, 1], "attn_cfg": {**SOFTMAX, "rotary_emb_dim": 8}, "d_intermediate": 48,
    },
}  # fmt: skip


def take_first_configurations() -> None:
    """Autotuning times kernels on a device; the interpreter has none."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **{**self.configs[0].all_kwargs(), **kwargs})

    Autotuner.run = run


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """flash-attn's function on [B, T, H, d]: a token sees itself and window_size[0] before it, -1 all of them."""
    assert causal
    at = torch.arange(q.shape[1])
    visible = at <= at[:, None]
    if window_size[0] >= 0:
        visible &= at >= at[:, None] - window_size[0]
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)


class Rotary(nn.Module):
    """flash-attn's rotation of queries [B, T, H, d] and of the keys in [B, T, 2, G, d], first half against second."""

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False, device: object = None) -> None:
        super().__init__()
        assert not interleaved
        self.rate = base ** -(torch.arange(0, dim, 2).float() / dim)

    def forward(self, q: Tensor, kv: Tensor, seqlen_offset: int, max_seqlen: int | None) -> tuple[Tensor, Tensor]:
        k, v = kv.unbind(2)
        return self.turned(q), torch.stack([self.turned(k), v], 2)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None, None] * self.rate
        a, b, rest = x.split([len(self.rate), len(self.rate), x.shape[-1] - 2 * len(self.rate)], -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def moved(model: nn.Module) -> nn.Module:
    """Every parameter away from where it begins, so that none can go unread unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim < 2 or name.endswith("A_log") else 0.35 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def fla_model(name: str, out: Path, device: str) -> Callable[[Tensor], Tensor]:
    import fla.layers
    import fla.models

    if INTERPRETED:
        fla.layers.attn.flash_attn_func = attention
    kind, options = FLA[name]
    config = getattr(fla.models, f"{kind}Config")(
        **{"hidden_size": D, "vocab_size": VOCAB, "num_hidden_layers": 2, "fuse_cross_entropy": False, **options}
    )
    model = getattr(fla.models, f"{kind}ForCausalLM")(config)
    if name == "gdn2":  # fla has the layer and no model of it
        for i, layer in enumerate(model.model.layers):
            layer.attn = fla.layers.GatedDeltaNet2(D, mode="fused_recurrent", **GDN2, layer_idx=i)
    model = moved(model).to(device)
    model.save_pretrained(out / "model")
    if name == "gdn2":
        path = out / "model" / "config.json"
        named = {"model_type": "gdn2", "output_gate_activation": "sigmoid", **GDN2}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def reopened(name: str, out: Path, device: str) -> Callable[[Tensor], Tensor]:
    """A directory that we wrote, OUT/model, opened by fla."""
    import fla.layers
    import fla.models

    if INTERPRETED:
        fla.layers.attn.flash_attn_func = attention
    kind, options = FLA[name]
    mode = {"attn_mode": "fused_recurrent"} if "attn_mode" in options else {}
    model = getattr(fla.models, f"{kind}ForCausalLM").from_pretrained(out / "model", dtype=torch.float32, **mode)
    model = model.to(device).eval()
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def ssm_model(name: str, out: Path, device: str) -> Callable[[Tensor], Tensor]:
    if INTERPRETED:
        torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules import mha

    if INTERPRETED:
        mha.RotaryEmbedding = Rotary
    config = MambaConfig(d_model=D, n_layer=2, vocab_size=VOCAB, **SSM[name])
    model = moved(with_mamba3(config) if "mamba3" in name else MambaLMHeadModel(config)).to(device)
    model.save_pretrained(out / "model")
    return lambda ids: model(ids).logits


def with_mamba3(config: Any) -> nn.Module:
    """A model of Mamba-3 layers: releases up to 2.3.2 have the layer but not the model."""
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules.mamba3 import Mamba3

    options = {key: value for key, value in config.ssm_cfg.items() if key != "layer"}
    model = MambaLMHeadModel(replace(config, ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": 8}))
    for i, layer in enumerate(model.backbone.layers):
        layer.mixer = Mamba3(D, **options, layer_idx=i)
    model.config = config
    return model


def main(name: str, out: Path, device: str) -> int:
    if INTERPRETED:
        take_first_configurations()
    if INTERPRETED or find_spec("selective_scan_cuda") is None:
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # Mamba-1's, imported by all
    library = "mamba_ssm" if name in SSM else "fla"
    try:
        import_module(library)
        if "mimo" in name:
            import_module("tilelang")  # of mamba_ssm's kernels for several ranks, which fla calls too
    except (ImportError, AttributeError, RuntimeError) as error:  # triton's names move from version to version
        sys.stderr.write(f"{library} cannot be imported here: {type(error).__name__}: {error}\n")
        return UNIMPORTABLE
    torch.manual_seed(7)
    run = (reopened if (out / "model").exists() else ssm_model if name in SSM else fla_model)(name, out, device)
    ids = torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = run(ids.to(device)).float().cpu()
    save_file({"logits": logits.contiguous()}, out / "logits.safetensors")
    (out / "ids.json").write_text(json.dumps(ids.tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), "cpu" if INTERPRETED else "cuda"))
