"""Formats whose own code needs a GPU, held to a plain fp64 transcription: 300 tokens, prefill and decoding, 1e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gdn2.checkpoints import Options, open_model
from gdn2.errors import CheckpointError
from tests.gdn2.checkpoints import golden, peers

IDS = torch.randint(0, 85, (2, 300), generator=torch.Generator().manual_seed(5)).tolist()


def agrees(path: Path, logits: peers.Logits, options: Options) -> None:
    model = open_model(str(path), options=options).model
    wanted = [logits(ids) for ids in IDS]
    for made in (golden.prefill(model, IDS), golden.decode(model, IDS)):
        for mine, theirs in zip(made, wanted, strict=True):
            assert golden.error(mine, theirs) < golden.TOLERANCE


@pytest.mark.parametrize("first", [False, True])
def test_nvlabs_hybrid(tmp_path: Path, first: bool) -> None:
    tensors, logits = peers.nvlabs(first)
    torch.save({"model": tensors, "iter_num": 1}, tmp_path / "model.pth")
    values = {"window": "24", "rope_base": "5000", "attention_heads": "4"}
    agrees(tmp_path / "model.pth", logits, Options(allow_pickle_weights=True, values=values))


@pytest.mark.parametrize("config", [peers.FLA, peers.FLA_TRANSFORMER], ids=["delta_net", "transformer"])
def test_fla(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors, logits = peers.fla(config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    agrees(tmp_path, logits, Options())


def test_samba(tmp_path: Path) -> None:
    tensors, logits = peers.samba()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(peers.SAMBA))
    agrees(tmp_path, logits, Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn": {"layers": [3], "num_heads": 4}}, "layers must be numbers below 3"),
        ({"use_conv_bias": False}, "use_conv_bias must be True"),
        ({"attnres_block_size": 2}, "attnres_block_size must be None"),
        ({"time_step_rank": "large"}, "time_step_rank must be an integer"),
    ],
)
def test_samba_that_computes_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_file(peers.samba()[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**peers.SAMBA, **changes}))
    with pytest.raises(CheckpointError, match=message):
        open_model(str(tmp_path))


@pytest.mark.parametrize("name", ["MAMBA2_ATTENTION", "MAMBA3_MIMO", "TRANSFORMERPP"])
def test_mamba_ssm(tmp_path: Path, name: str) -> None:
    config = getattr(peers, name)
    tensors, logits = peers.mamba_ssm(config)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = {"a_activation": "heavy_tail"} if name == "MAMBA3_MIMO" else {}
    agrees(tmp_path, logits, Options(allow_pickle_weights=True, values=values))


def test_fla_mamba3_has_mamba_ssm_layers_with_softplus(tmp_path: Path) -> None:
    """The same layers under fla's names; fla computes A by softplus."""
    tensors, _ = peers.mamba_ssm(peers.MAMBA3_MIMO)
    (tmp_path / "ssm").mkdir()
    torch.save(tensors, tmp_path / "ssm" / "pytorch_model.bin")
    (tmp_path / "ssm" / "config.json").write_text(json.dumps(peers.MAMBA3_MIMO))
    options = Options(allow_pickle_weights=True, values={"a_activation": "softplus"})
    reference = golden.prefill(open_model(str(tmp_path / "ssm"), options=options).model, IDS)
    renamed = {n.replace("backbone.embedding.", "backbone.embeddings."): t for n, t in tensors.items()}
    save_file({n: t.clone() for n, t in renamed.items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    config = {
        "model_type": "mamba3", "hidden_size": peers.D, "vocab_size": 96, "num_hidden_layers": 2, "expand": 2,
        "head_dim": 16, "state_size": 8, "is_mimo": True, "mimo_rank": 4, "is_outproj_norm": True,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = golden.prefill(open_model(str(tmp_path)).model, IDS)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
