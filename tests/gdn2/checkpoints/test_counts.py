"""Published sizes: each format's own configuration builds a model of exactly the published number of parameters."""

from typing import Any

import pytest
import torch

from gdn2.checkpoints import fla, formats, nvlabs
from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.safe import TensorInfo
from gdn2.checkpoints.tables import on_meta
from gdn2.errors import UserError
from gdn2.models import PRESETS

FLA = {"vocab_size": 32000, "hidden_size": 2048, "tie_word_embeddings": False}
GATE = "model.layers.0.mlp.gate_proj.weight"
MAMBA = {"head_dim": 64, "state_size": 128, "expand": 2, "num_hidden_layers": 48, "norm_eps": 1e-5, "n_groups": 1}
MAMBA_1B = {
    "d_model": 2048, "d_intermediate": 0, "n_layer": 48, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def info(*shape: int) -> TensorInfo:
    return TensorInfo(torch.float32, shape)


def count(kind: str, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> int:
    model_config, _ = formats.FAMILIES[kind].read(Fields({"model_type": kind, **config}, kind), tensors, Values({}))
    return on_meta(model_config, kind).n_params()


@pytest.mark.parametrize(
    ("kind", "config", "width", "wanted"),
    [
        ("gated_deltanet", {**FLA, "num_hidden_layers": 21}, 5632, 1_387_348_732),
        ("kda", {**FLA, "num_hidden_layers": 24}, 5632, 1_390_941_568),
        ("transformer", {**FLA, "num_hidden_layers": 24}, 5632, 1_364_297_728),
        ("mamba2", {**FLA, **MAMBA, "conv_kernel": 4}, 0, 1_371_839_488),
        ("mamba3", {**FLA, **MAMBA}, 0, 1_387_122_688),
    ],
)
def test_fla_sizes_and_defaults(kind: str, config: dict[str, Any], width: int, wanted: int) -> None:
    tensors = {GATE: info(width, 2048)} if width else {}
    assert count(kind, config, tensors) == wanted


def test_state_spaces_size() -> None:
    assert count("mamba_ssm", MAMBA_1B, {"backbone.embedding.weight": info(50288, 2048)}) == 1_343_757_312


@pytest.mark.parametrize(
    ("layers", "d", "ff", "hybrid", "wanted"),
    [
        (11, 1536, 6144, False, 516_838_028),
        (12, 1536, 6144, True, 530_765_016),
        (16, 2400, 5888, False, 1_309_295_776),
        (18, 2304, 6144, True, 1_316_608_452),
    ],
)
def test_first_version_sizes(layers: int, d: int, ff: int, hybrid: bool, wanted: int) -> None:
    """Widths 192/384 and 200/400 a head; the file holds `D`, one number a head, that nothing reads."""
    keys, values, heads = d * 3 // 4, d * 3 // 2, 9
    tensors = {"transformer.wte.weight": info(32000, d), "lm_head.weight": info(32000, d)}
    for i in range(layers):
        h = f"transformer.h.{i}."
        tensors[h + "mlp.swiglu.w1.weight"] = info(ff, d)
        if hybrid and i % 2:
            tensors |= {h + "attn.attn.weight": info(3 * d, d), h + "attn.proj.weight": info(d, d)}
            continue
        tensors |= {
            h + "attn.gk_proj.weight": info(heads, d), h + "attn.A_log": info(heads),
            h + "attn.g_norm_swish_gate.weight": info(values // heads), h + "attn.q_proj.weight": info(keys, d),
            h + "attn.v_proj.weight": info(values, d), h + "attn.q_conv1d.weight": info(keys, 1, 4),
        }  # fmt: skip
    said = Values({"window": "2048", "rope_base": "10000"} if hybrid else {})
    config = nvlabs.configure(tensors, said, "file")
    unused = heads * config.pattern.count("gdn")
    assert on_meta(config, "file").n_params() + unused == wanted
    assert config.tied and config.mixers["gdn"]["d_value"] == values // heads
    if hybrid:
        assert config.mixers["window"]["rotary_bf16"] and config.mixers["window"]["n_heads"] == d // 128


@pytest.mark.parametrize(
    "name", sorted(n for n in PRESETS if n in ("gdn2-1.3b", "gdn2-hybrid-1.3b", "gdn2-1.3b-hybrid"))
)
def test_published_gdn2_is_inferred_from_its_own_tensors(name: str) -> None:
    preset = PRESETS[name]()
    model = on_meta(preset, name)
    shapes = nvlabs.table(model).shapes(model)
    values = {"window": "2048", "rope_base": "10000"} if len(set(preset.pattern)) > 1 else {}
    config = nvlabs.configure({n: info(*s) for n, s in shapes.items()}, Values(values), name)
    assert on_meta(config, name).n_params() == model.n_params()
    assert nvlabs.table(on_meta(config, name)).shapes(on_meta(config, name)) == shapes


def test_a_transformer_has_no_recurrent_model_to_be_described_as() -> None:
    with pytest.raises(UserError, match="fla has no model of"):
        fla.describe(formats.FAMILIES["mamba2"].read(
            Fields({**FLA, **MAMBA, "conv_kernel": 4, "model_type": "mamba2"}, "x"), {}, Values({})
        )[0])  # fmt: skip
