"""Native checkpoints: what is saved comes back, and nothing damaged or foreign gets in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn2.checkpoints import native
from gdn2.errors import CheckpointError
from gdn2.models import Decoder, ModelConfig
from gdn2.ragged import Ragged

CONFIG = ModelConfig(
    d_model=32,
    vocab_size=96,
    pattern=("gdn2", "gdn2"),
    mixers={"gdn2": {"mixer": "gdn2", "n_heads": 2, "d_key": 16, "d_value": 16}},
    d_ff=64,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = Decoder(CONFIG)
    model.reset_parameters(seed=1)
    tokenizer = tmp_path / "source.json"
    tokenizer.write_text('{"version": "1.0"}')
    native.save(tmp_path / "model", model, tokenizer, {"steps": 3})
    return tmp_path / "model"


def rewrite(path: Path, change) -> None:
    """Change the tensors of a checkpoint and make its checksums fit again."""
    tensors = load_file(path / native.WEIGHTS)
    change(tensors)
    save_file(tensors, path / native.WEIGHTS)
    reseal(path)


def reseal(path: Path) -> None:
    sums = {name: native.file_digest(path / name) for name in (native.CONFIG, native.WEIGHTS, native.TOKENIZER)}
    (path / native.CHECKSUMS).write_text(json.dumps(sums))


def test_round_trip_gives_the_same_bits(saved: Path) -> None:
    original = Decoder(CONFIG)
    original.reset_parameters(seed=1)
    model, header = native.load(saved)
    assert header.config == CONFIG
    assert header.extra == {"steps": 3}
    for (name, a), (_, b) in zip(original.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.arange(40)
    with torch.no_grad():
        assert torch.equal(model(ids, Ragged([40]))[0], original(ids, Ragged([40]))[0])


def test_half_precision_keeps_the_rates_of_decay(saved: Path) -> None:
    model, _ = native.load(saved, dtype=torch.bfloat16)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["A_log"] == kinds["dt_bias"] == torch.float32
    assert kinds["weight"] == torch.bfloat16


def test_digest_follows_weights_and_configuration_but_not_the_name(saved: Path) -> None:
    before = native.read_header(saved).digest
    config = json.loads((saved / native.CONFIG).read_text())
    config["model"]["name"] = "renamed"
    (saved / native.CONFIG).write_text(json.dumps(config))
    reseal(saved)
    assert native.read_header(saved).digest == before
    rewrite(saved, lambda tensors: tensors["norm.weight"].mul_(2))
    assert native.read_header(saved).digest != before


@pytest.mark.parametrize("part", range(16))
def test_truncated_weights_are_refused(saved: Path, part: int) -> None:
    weights = saved / native.WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) * part // 16])
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        native.load(saved)
    reseal(saved)
    with pytest.raises(CheckpointError, match="is cut short|too few for a safetensors file"):
        native.load(saved)


def test_every_mismatch_is_named(saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["norm.weight"]
        tensors["foreign"] = torch.zeros(1)
        tensors["embed.weight"] = torch.zeros(96, 16)

    rewrite(saved, change)
    with pytest.raises(CheckpointError) as caught:
        native.load(saved)
    message = str(caught.value)
    assert "norm.weight is missing" in message
    assert "foreign is not part of the model" in message
    assert "embed.weight is [96, 16], expected [96, 32]" in message
    assert "\n" not in message


def test_values_that_are_not_finite_are_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors["layers.1.mixer.o_proj.weight"][0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"layers.1.mixer.o_proj.weight has 32 of 1024 values that are NaN"):
        native.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 1 << 40}, "d_model must be an integer from 1"),
        ({"d_model": True}, "d_model must be an integer"),
        ({"vocab_size": -5}, "vocab_size must be an integer"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"pattern": ["swish"]}, "pattern names 'swish'"),
        ({"mixers": {"gdn2": {"mixer": "gdn9"}}}, "unknown mixer 'gdn9'"),
        ({"mixers": {"gdn2": {"mixer": "gdn2", "auto_map": "x"}}}, "no option 'auto_map'"),
    ],
)
def test_a_wrong_configuration_is_refused_before_memory_is_taken(saved: Path, change: dict, message: str) -> None:
    config = json.loads((saved / native.CONFIG).read_text())
    config["model"].update(change)
    (saved / native.CONFIG).write_text(json.dumps(config))
    reseal(saved)
    with pytest.raises(CheckpointError, match=message):
        native.read_header(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    config = json.loads((saved / native.CONFIG).read_text())
    (saved / native.CONFIG).write_text(json.dumps({**config, "version": native.VERSION + 1}))
    with pytest.raises(CheckpointError, match="reads up to"):
        native.read_header(saved)


@pytest.mark.parametrize("name", [native.CONFIG, native.WEIGHTS, native.TOKENIZER, native.CHECKSUMS])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        native.load(saved)


def test_saving_again_replaces_the_whole_directory(saved: Path) -> None:
    (saved / "leftover").write_text("x")
    model = Decoder(CONFIG)
    model.reset_parameters(seed=2)
    native.save(saved, model, saved / native.TOKENIZER)
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [native.CONFIG, native.WEIGHTS, native.TOKENIZER, native.CHECKSUMS]
    )
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []
