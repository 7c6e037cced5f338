"""Pickled weights are never executed and never trusted about sizes; shards are exactly what their index says."""

import json
import os
import pickle
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gdn2.checkpoints.sources import Source, find_weights, open_source
from gdn2.errors import CheckpointError

WEIGHTS = {"a.weight": torch.randn(4, 3), "b": torch.randn(5)}


def opened(path: Path, allow: bool = True) -> Source:
    """A source that outlives its files' handles (pickles are mapped, safetensors read in full headers)."""
    with ExitStack() as stack:
        return open_source(path, stack, allow_pickle=allow)


def read_all(path: Path) -> dict[str, Tensor]:
    with ExitStack() as stack:
        source = open_source(path, stack, allow_pickle=True)
        return {name: source.read(name) for name in source.tensors}


@pytest.mark.parametrize("wrap", ["", "_forward_module.", "module._orig_mod."])
@pytest.mark.parametrize("nested", [True, False])
def test_reads_what_torch_writes(tmp_path: Path, wrap: str, nested: bool) -> None:
    tensors = {wrap + name: t for name, t in WEIGHTS.items()}
    data = {"model": tensors, "optimizer": None, "hparams": {}, "iter_num": 3, "step_count": 2}
    torch.save(data if nested else tensors, tmp_path / "x.pth")
    found = read_all(tmp_path / "x.pth")
    assert set(found) == set(WEIGHTS) and all(torch.equal(found[n], WEIGHTS[n]) for n in WEIGHTS)


def test_pickles_need_permission(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="--allow-pickle-weights"):
        opened(tmp_path / "x.pth", allow=False)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"model": WEIGHTS, "extra": Payload(canary)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds more than plain weights") as caught:
        opened(tmp_path / "x.pth")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match="not a torch checkpoint"):
        opened(tmp_path / "y.bin")
    assert not canary.exists()


def test_tensors_larger_than_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 4096
    with pytest.raises(CheckpointError, match="a of shape .* more than the file holds"):
        opened(tmp_path / "x.pth")
    torch.save({"a": torch.zeros(3, 1).expand(3, 2)}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="more than the file holds"):
        opened(tmp_path / "y.pth")


def test_transposed_weights_are_read(tmp_path: Path) -> None:
    torch.save({"a": WEIGHTS["a.weight"].T}, tmp_path / "x.pth")
    assert torch.equal(read_all(tmp_path / "x.pth")["a"], WEIGHTS["a.weight"].T)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "y.pth").stat().st_size < 4096
    with pytest.raises(CheckpointError, match="is compressed"):
        opened(tmp_path / "y.pth")


@pytest.mark.parametrize("part", range(1, 16))
def test_truncated_pickles_are_refused(tmp_path: Path, part: int) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pth")
    raw = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(raw[: len(raw) * part // 16])
    with pytest.raises(CheckpointError):
        opened(tmp_path / "x.pth")


@pytest.mark.parametrize("data", [[1, 2], {}, {"a": 3}, {"a": torch.zeros(0, 4)}, {"a": torch.eye(3).to_sparse()}])
def test_anything_but_named_dense_tensors_is_refused(tmp_path: Path, data: object) -> None:
    torch.save(data, tmp_path / "x.pth")
    with pytest.raises(CheckpointError):
        opened(tmp_path / "x.pth")


def sharded(path: Path, weight_map: dict[str, str] | None = None) -> Path:
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        save_file({name: tensor}, path / f"model-{number}.safetensors")
    weight_map = weight_map or {name: f"model-{i}.safetensors" for i, name in enumerate(WEIGHTS)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards_are_one_source(tmp_path: Path) -> None:
    found = read_all(sharded(tmp_path))
    assert all(torch.equal(found[n], WEIGHTS[n]) for n in WEIGHTS)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "x.py", ".x.safetensors"])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="not a file beside it"):
        opened(sharded(tmp_path, {"a.weight": name}))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    wrong = {"a.weight": "model-0.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}
    with pytest.raises(CheckpointError, match="disagree about 1 tensors, first c"):
        opened(sharded(tmp_path, wrong))
    save_file({"a.weight": WEIGHTS["a.weight"]}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"both hold tensor a\.weight"):
        opened(sharded_map_only(tmp_path))


def sharded_map_only(path: Path) -> Path:
    weight_map = {"a.weight": "model-0.safetensors", "b": "model-1.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    save_file(WEIGHTS, tmp_path / "elsewhere.safetensors")
    (tmp_path / "ckpt" / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="link out of its directory"):
        opened(tmp_path / "ckpt")


def test_safetensors_are_preferred_and_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        find_weights(tmp_path)
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path)[0] == "pickle"
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert find_weights(tmp_path)[0] == "safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "none")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"neither \.safetensors nor"):
        find_weights(tmp_path / "x.txt")
