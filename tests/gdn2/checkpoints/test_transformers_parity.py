"""Checkpoints that transformers writes: every parameter moved at random, our logits are the peer's own.

300 tokens in fp32, prefill and decoding, to 1e-5 of the largest logit.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn2.checkpoints import Options, open_model
from gdn2.checkpoints.tables import on_meta
from gdn2.errors import CheckpointError
from tests.gdn2.checkpoints import golden

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 8, "expand": 2, "use_bias": True, "time_step_rank": 3}),
    "mamba2": ("Mamba2", {
        "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "expand": 2, "use_bias": True, "chunk_size": 32,
        "time_step_limit": (0.02, 0.5),
    }),
    "qwen3_next": ("Qwen3Next", {
        **ATTENTION, **LINEAR, "head_dim": 16, "num_experts": 0, "mlp_only_layers": [0, 1, 2], "rms_norm_eps": 1e-4,
    }),
    "qwen3_5_text": ("Qwen3_5", {**ATTENTION, **LINEAR, "head_dim": 16, "tie_word_embeddings": True}),
    "olmo_hybrid": ("OlmoHybrid", {**ATTENTION, **LINEAR, "rms_norm_eps": 1e-4}),
    "olmo_hybrid_nope": ("OlmoHybrid", {
        **ATTENTION, **LINEAR, "rope_parameters": {"rope_theta": None, "rope_type": "default"},
    }),
    "bamba": ("Bamba", {**ATTENTION, **MAMBA, "attn_layer_indices": [1], "mamba_proj_bias": True}),
    "falcon_h1": ("FalconH1", {
        **ATTENTION, **MAMBA, "mamba_d_ssm": 48, "mamba_rms_norm": False, "tie_word_embeddings": True,
        "lm_head_multiplier": 0.6, "embedding_multiplier": 2.5, "mlp_multipliers": [0.7, 1.4], "key_multiplier": 0.8,
        "attention_out_multiplier": 1.2, "attention_in_multiplier": 0.9, "ssm_multipliers": [0.5, 1.5, 1.1, 0.9, 1.3],
        "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.75,
    }),
    "falcon_h1_normed": ("FalconH1", {**ATTENTION, **MAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True}),
    "kimi_linear": ("KimiLinear", {
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "linear_head_dim": 8,
        "linear_num_heads": 3, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
        "mlp_layer_types": ["dense"] * 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rms_norm_eps": 1e-4,
    }),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        **ATTENTION, **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 40, "tie_word_embeddings": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "position_embedding_type": "rope",
        "embedding_multiplier": 3.0, "logits_scaling": 1.7, "residual_multiplier": 0.3, "attention_multiplier": 0.2,
    }),
    "granitemoehybrid_nope": ("GraniteMoeHybrid", {
        **ATTENTION, **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 40, "attention_bias": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "attention_multiplier": 0.5,
    }),
}  # fmt: skip


def peer(name: str) -> Any:
    """A model of transformers with every parameter away from where it begins."""
    kind, options = MODELS[name]
    config = {"Qwen3_5": "Qwen3_5TextConfig"}.get(kind, f"{kind}Config")
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config)(**SIZES, **options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.4 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * (0.3 if key.endswith("A_log") else spread * 0.35))
    return model.eval()


def theirs(model: Any, ids: list[list[int]]) -> list[torch.Tensor]:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [model(input_ids=torch.tensor([one]), use_cache=False).logits[0] for one in ids]


@pytest.fixture(scope="module", params=list(MODELS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    model, path = peer(request.param), tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return request.param, model, path


def test_logits_are_the_peers(written: tuple[str, Any, Path]) -> None:
    _, model, path = written
    ids = torch.randint(0, SIZES["vocab_size"], (2, 300), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = theirs(model, ids)
    ours = open_model(str(path)).model
    for made in (golden.prefill(ours, ids), golden.decode(ours, ids)):
        for mine, its in zip(made, wanted, strict=True):
            assert golden.error(mine, its) < golden.TOLERANCE


def test_the_table_runs_backwards(written: tuple[str, Any, Path]) -> None:
    """Our parameters, renamed back, are the file's tensors (to rounding where the format folds a factor)."""
    from contextlib import ExitStack

    from gdn2.checkpoints import formats
    from gdn2.checkpoints.fields import Values
    from gdn2.checkpoints.sources import open_source

    _, _, path = written
    with ExitStack() as stack:
        source = open_source(path, stack, allow_pickle=False)
        reading = formats.understand(path, formats.configuration(path), source.tensors, Values({}))
        saved = reading.table(on_meta(reading.config, path)).save(open_model(str(path)).model)
        assert set(saved) == set(source.tensors)
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, source.read(name), rtol=2e-6, atol=1e-6)


def test_the_text_model_of_qwen3_5_is_found_in_the_whole_one(tmp_path: Path) -> None:
    """On disk it lies beside the vision tower and the multi-token head, which are left out."""
    model = peer("qwen3_5_text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "text")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    nested = {f"model.language_model.{n.removeprefix('model.')}": t for n, t in tensors.items()}
    nested |= {"model.visual.patch_embed.weight": torch.ones(3, 2), "mtp.fc.weight": torch.ones(2, 2)}
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    save_file(nested, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    ids = [list(range(60))]
    whole, alone = (golden.prefill(open_model(str(p)).model, ids)[0] for p in (tmp_path, tmp_path / "text"))
    assert torch.equal(whole, alone)


def test_mamba1_of_state_spaces_is_that_of_transformers(tmp_path: Path) -> None:
    """The same tensors but for the embedding's name; `ssm_cfg` names no layer in checkpoints of that time."""
    model = peer("mamba")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    (tmp_path / "b").mkdir()
    renamed = {name.replace("embeddings", "embedding"): t for name, t in tensors.items()}
    torch.save(renamed, tmp_path / "b" / "pytorch_model.bin")
    ssm = {"d_state": 8, "expand": 2, "bias": True, "dt_rank": 3}
    config = {"d_model": 32, "n_layer": 3, "vocab_size": 97, "ssm_cfg": ssm, "rms_norm": True}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    ids = [list(range(90))]
    ours = open_model(str(tmp_path / "b"), options=Options(allow_pickle_weights=True)).model
    assert torch.equal(golden.prefill(ours, ids)[0], golden.prefill(open_model(str(tmp_path / "a")).model, ids)[0])


def test_kimi_linear_as_its_authors_write_it(tmp_path: Path) -> None:
    """Layers counted from one, sizes in a table of their own, the dense MLP under its plain name."""
    model = peer("kimi_linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    ours = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    linear = {"head_dim": 8, "num_heads": 3, "short_conv_kernel_size": 4, "kda_layers": [1, 3], "full_attn_layers": [2]}
    config = {key: value for key, value in config.items() if key not in ours} | {"linear_attn_config": linear}
    config |= {"num_experts": 8, "first_k_dense_replace": 3, "mla_use_nope": True}
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert any("block_sparse_moe" in name for name in tensors)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    plain = {name.replace("block_sparse_moe", "mlp"): t for name, t in tensors.items()}
    save_file(plain, tmp_path / "b" / "model.safetensors")
    ids = [list(range(90))]
    first, second = (golden.prefill(open_model(str(tmp_path / name)).model, ids)[0] for name in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_next", {"num_experts": 8, "mlp_only_layers": [0]}, "num_experts must be 0: layers of experts"),
        ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts must be 0"),
        ("bamba", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type must be 'default'"),
        ("bamba", {"mamba_d_head": 5}, "a divisor of 64 that agrees with mamba_d_head"),
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias must be False"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "layer_types must be a list of 3"),
        ("kimi_linear", {"mlp_layer_types": ["dense", "sparse", "dense"]}, "mlp_layer_types must be dense throughout"),
        ("kimi_linear", {"mlp_layer_types": None, "num_experts": 8}, "num_experts must be 0: layers of experts run"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope must be True"),
        ("kimi_linear", {"layer_types": None}, "full_attn_layers must be with kda_layers all layers from 1 to 3"),
    ],
)
def test_what_we_would_compute_differently_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError) as caught:
        open_model(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
