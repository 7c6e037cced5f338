"""Mixers carry the numbers of the code that published them: golden tensors loaded by hand, one format each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gdn2.mixers import build
from gdn2.models import Decoder, ModelConfig
from gdn2.ragged import Ragged

FLA_NAMES = (
    ("model.embeddings", "embed"), ("model.norm", "norm"), ("lm_head", "head"), ("model.layers", "layers"),
    (".attn_norm.", ".mixer_norm."), (".attn.", ".mixer."), (".gate_proj.", ".gate."), (".up_proj.", ".up."),
    (".down_proj.", ".down."),
)  # fmt: skip
MAMBA_NAMES = (
    ("backbone.embeddings", "embed"), ("backbone.embedding", "embed"), ("backbone.norm_f", "norm"),
    ("backbone.layers", "layers"), (".norm.", ".mixer_norm."), (".mixer.mixer_norm.", ".mixer.norm."),
    (".norm2.", ".mlp_norm."), ("mlp.fc2", "mlp.down"),
)  # fmt: skip


def renamed(tensors: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    out = {}
    for key, tensor in tensors.items():
        for old, new in names:
            key = key.replace(old, new)
        out[key] = tensor
    return out


def check(folder: Path, model: Decoder, tensors: dict[str, Tensor], bound: float = 1e-5, key: str = "logits") -> None:
    """Logits and greedy tokens of the golden folder, by prefill, in a batch and by decoding."""
    model.load_state_dict(tensors, strict=True)
    ids = torch.tensor(json.loads((folder / "inputs.json").read_text())["input_ids"])
    want = load_file(folder / "logits.safetensors")[key]
    count = want.shape[0]
    with torch.no_grad():
        for implementation in ("torch", "reference"):
            hidden, state = model.use(implementation)(ids[:count].flatten(), Ragged([150] * count))
            got = model.logits(hidden).view(count, 150, -1)
            assert (got - want).abs().max() < bound * want.abs().max()
        first, part = model.use(None)(ids[:count, :100].flatten(), Ragged([100] * count))
        for t in range(100, 150):
            got = model.logits(model.step(ids[:count, t], part))
            assert (got - want[:, t]).abs().max() < bound * want.abs().max()
        if key != "logits":
            return
        golden = json.loads((folder / "generate.json").read_text())
        expected = next(v for v in golden.values() if isinstance(v, list) and isinstance(v[0], list))
        token, tokens = want[:, -1].argmax(-1), []
        for _ in range(20):
            tokens.append(token)
            token = model.logits(model.step(token, state)).argmax(-1)
        assert torch.stack(tokens, 1).tolist() == [row[-20:] for row in expected]


def fla_decoder(config: dict, mixer: dict) -> Decoder:
    return Decoder(
        ModelConfig(
            d_model=config["hidden_size"], vocab_size=config["vocab_size"], d_ff=config["intermediate_size"],
            pattern=("m",) * config["num_hidden_layers"], mixers={"m": mixer}, norm_eps=config["norm_eps"],
        )
    )  # fmt: skip


FLA: dict[str, Callable[[dict], dict]] = {
    "fla_gated_deltanet_gva": lambda c: {"mixer": "gdn"},
    "fla_kda_gva": lambda c: {"mixer": "kda"},
}


@pytest.mark.parametrize("name", FLA)
def test_fla_models(shared: Path, name: str) -> None:
    folder = shared / "golden" / "checkpoints" / name
    config = json.loads((folder / "config.json").read_text())
    width = config["head_dim"]
    mixer = FLA[name](config) | {
        "n_heads": config["num_heads"], "n_value_heads": config["num_v_heads"],
        "d_key": width, "d_value": int(width * config["expand_v"]), "norm_eps": config["norm_eps"],
    }  # fmt: skip
    tensors = renamed(load_file(folder / "model.safetensors"), FLA_NAMES)
    check(folder, fla_decoder(config, mixer), tensors)


@torch.no_grad()
def test_fla_gdn2_layer(shared: Path) -> None:
    """The doubled erase gate and the sigmoid output gate of fla's layer, with grouped value heads."""
    folder = shared / "golden" / "checkpoints" / "fla_gdn2_layer_gva_negeig"
    io = load_file(folder / "io.safetensors")
    options = {
        "n_heads": 2, "n_value_heads": 4, "d_key": 16, "d_value": 32, "norm_eps": 1e-4,
        "erase_max": 2, "gate": "sigmoid",
    }  # fmt: skip

    def run(changed: dict) -> float:
        layer = build("gdn2", 64, options | changed)
        layer.load_state_dict(load_file(folder / "layer.safetensors"), strict=True)
        y, _ = layer(io["input"].flatten(0, 1), Ragged([150, 150]))
        return ((y.view_as(io["output"]) - io["output"]).abs().max() / io["output"].abs().max()).item()

    assert run({}) < 1e-5
    assert run({"gate": "silu"}) > 1e-2
    assert run({"erase_max": 1}) > 1e-3


def test_transformers_mamba2(shared: Path) -> None:
    """dt limits and projection biases; decoding keeps the limits, which the peer's own cache forgets."""
    folder = shared / "golden" / "checkpoints" / "tf_mamba2_tied_bias"
    config = json.loads((folder / "config.json").read_text())
    mixer = {
        "mixer": "mamba2", "n_heads": config["num_heads"], "d_head": config["head_dim"],
        "d_state": config["state_size"], "n_groups": config["n_groups"], "proj_bias": config["use_bias"],
        "dt_limit": config["time_step_limit"], "norm_eps": config["layer_norm_epsilon"],
    }  # fmt: skip
    model = Decoder(
        ModelConfig(
            d_model=config["hidden_size"], vocab_size=config["vocab_size"], tied=True,
            pattern=("m",) * config["num_hidden_layers"], mixers={"m": mixer}, norm_eps=config["layer_norm_epsilon"],
        )
    )  # fmt: skip
    check(folder, model, renamed(load_file(folder / "model.safetensors"), MAMBA_NAMES))


@pytest.mark.parametrize(("activation", "key"), [("heavy_tail", "logits"), ("softplus", "logits_softplus_A")])
def test_mamba_ssm_mamba3(shared: Path, activation: str, key: str) -> None:
    folder = shared / "golden" / "checkpoints" / "mamba_ssm_mamba3_siso"
    config = json.loads((folder / "config.json").read_text())
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors = renamed(tensors, MAMBA_NAMES)
    assert torch.equal(tensors.pop("lm_head.weight"), tensors["embed.weight"])
    for i in range(config["n_layer"]):
        tensors[f"layers.{i}.mlp.up.weight"], tensors[f"layers.{i}.mlp.gate.weight"] = tensors.pop(
            f"layers.{i}.mlp.fc1.weight"
        ).chunk(2)
    mixer = {
        "mixer": "mamba3", "n_heads": 6, "d_head": config["ssm_cfg"]["headdim"],
        "d_state": config["ssm_cfg"]["d_state"], "a_activation": activation,
    }  # fmt: skip
    model = Decoder(
        ModelConfig(
            d_model=config["d_model"], vocab_size=256, d_ff=128, tied=True,
            pattern=("m",) * config["n_layer"], mixers={"m": mixer},
        )
    )  # fmt: skip
    check(folder, model, tensors, key=key)
