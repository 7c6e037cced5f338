"""Saves of a running training: complete or not there, and never taken for those of another model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from gdn2.errors import CheckpointError, StorageError
from gdn2.train import loop, saves


def trained(width: int = 3, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(width)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, width)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_save_holds_all_that_goes_on(tmp_path: Path) -> None:
    model, optimizer = trained()
    saves.save(tmp_path, 7, model, optimizer, {"digest": "d", "position": {"step": 7}})
    (path,) = saves.found(tmp_path)
    assert path.name == "step-00000007" and saves.load_state(path)["position"] == {"step": 7}
    other, fresh = trained(steps=0)
    saves.restore(path, other, fresh)
    for one, two in ((model, optimizer), (other, fresh)):
        two.zero_grad()
        one(torch.ones(4, 3)).square().sum().backward()
        two.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_newest_complete_save_is_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (3, 20, 100):
        saves.save(tmp_path, step, model, optimizer, {"step": step})
    assert [path.name for path in saves.found(tmp_path)] == ["step-00000100"]
    # Whatever else lies there is no save: a torn one, another program's, one of another width.
    for name in (".step-00000200", "step-200", "step-000000300", "step-00000400.bak", "steps"):
        (tmp_path / name).mkdir()
    assert [path.name for path in saves.found(tmp_path)] == ["step-00000100"]
    assert saves.found(tmp_path / "nowhere") == []


@pytest.mark.parametrize("when", ["model.safetensors", "optimizer.safetensors", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    model, optimizer = trained()
    saves.save(tmp_path, 1, model, optimizer, {"step": 1})
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if (tmp_path / name).is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "fsync":
            patch.setattr(os, "fsync", full)
        elif when == "rename":
            patch.setattr(Path, "rename", full)
        else:
            write = saves.save_file
            patch.setattr(saves, "save_file", lambda t, path: full() if path.name == when else write(t, path))
        with pytest.raises(StorageError, match="^cannot write .*step-00000002: No space left on device$"):
            saves.save(tmp_path, 2, model, optimizer, {"step": 2})
    assert [path.name for path in saves.found(tmp_path)] == ["step-00000001"]
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    saves.save(tmp_path, 2, model, optimizer, {"step": 2})  # what the failed one left is no hindrance
    assert [name.split("/")[0] for name in files(tmp_path)] == ["step-00000002"] * 4


def test_the_same_step_is_saved_again(tmp_path: Path) -> None:
    model, optimizer = trained()
    for word in ("old", "new"):
        saves.save(tmp_path, 5, model, optimizer, {"word": word})
    assert saves.load_state(saves.found(tmp_path)[0]) == {"word": "new"}


def test_a_place_that_is_none_is_one_line(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*file/step-00000001: ") as caught:
        saves.save(tmp_path / "file", 1, model, optimizer, {})
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)


def test_a_save_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    saves.save(tmp_path, 1, *trained(3), {})
    (path,) = saves.found(tmp_path)
    model, optimizer = trained(4)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match="model.safetensors does not fit the model of the configuration"):
        saves.restore(path, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(CheckpointError, match="does not fit"):
        saves.restore(path, nn.Sequential(nn.Linear(3, 2)), optimizer)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\x00" * 40, None])
def test_a_state_that_cannot_be_read_is_one_line(tmp_path: Path, content: str | None) -> None:
    saves.save(tmp_path, 1, *trained(), {"step": 1})
    (path,) = saves.found(tmp_path)
    if content is None:
        (path / saves.STATE).unlink()
    else:
        (path / saves.STATE).write_text(content)
    with pytest.raises(CheckpointError, match="state.json cannot be read") as caught:
        saves.load_state(path)
    assert "\n" not in str(caught.value)


def test_tensors_cut_short_are_refused(tmp_path: Path) -> None:
    saves.save(tmp_path, 1, *trained(), {})
    (path,) = saves.found(tmp_path)
    for name in (saves.MODEL, saves.OPTIMIZER):
        shutil.copytree(path, tmp_path / name)
        whole = (path / name).read_bytes()
        for end in (0, 7, len(whole) // 2, len(whole) - 1):
            (tmp_path / name / name).write_bytes(whole[:end])
            with pytest.raises(CheckpointError, match="cannot be read"):
                saves.restore(tmp_path / name, *trained())


def test_a_state_is_json_that_any_program_reads(tmp_path: Path) -> None:
    saves.save(tmp_path, 1, *trained(), {"digest": "d", "position": {"step": 1, "seconds": 0.5}})
    raw = (saves.found(tmp_path)[0] / saves.STATE).read_text(encoding="ascii")
    assert json.loads(raw) == {"digest": "d", "position": {"step": 1, "seconds": 0.5}}


def test_the_log_keeps_the_records_up_to_the_save_and_nothing_torn(tmp_path: Path) -> None:
    log = tmp_path / loop.LOG
    loop._truncate(log, 3)
    assert not log.exists()
    good = [json.dumps({"kind": "train", "step": step, "name": "é"}) for step in range(1, 7)]
    odd = [b"", b"{", b"7", b"[]", b'{"kind": "train"}', b"\x00\x00\x00", b"\xff\xfe", b'{"step": 2', b'{"step": "2"}']
    lines = [line for record, other in zip(good, odd, strict=False) for line in (record.encode(), other)]
    log.write_bytes(b"\n".join([*lines, *odd, good[5].encode()[:9]]))
    loop._truncate(log, 4)
    assert log.read_text(encoding="utf-8").splitlines() == good[:4]
    loop._truncate(log, 0)
    assert log.read_bytes() == b"" and files(tmp_path) == [loop.LOG]
