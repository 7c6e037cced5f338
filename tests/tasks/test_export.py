"""Samples written to a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gdn2.errors import DataError, StorageError, UserError
from tasks.ruler.commands import Export, data_ruler


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multiquery", "niah_multikey_3"])
def test_exact(trained: Callable, tmp_path: Path, task: str) -> None:
    out = tmp_path / "f.jsonl"
    tokenizer = trained("prefix")
    said = data_ruler(Export(task, 1500, out, samples=4), tokenizer)
    assert said == f"{out}: 4 samples of {task} at 1500 tokens, profile exact"
    for i, line in enumerate(lines(out)):
        assert list(line) == [
            "index",
            "input",
            "outputs",
            "length",
            "answer_prefix",
            "token_position_answer",
            "sample",
            "depth",
            "key",
        ]
        assert line["index"] == line["sample"] == i
        assert line["input"].endswith("provided text?") and line["answer_prefix"].startswith(" The special magic")
        assert line["length"] == len(tokenizer.encode(line["input"] + line["answer_prefix"])) + 1 + 128
        assert 1492 <= line["length"] <= 1500
        assert line["key"] in line["answer_prefix"] and line["input"].count(line["outputs"][0]) == 1
        before = line["input"][: line["input"].index(line["outputs"][0])]
        assert line["token_position_answer"] == len(tokenizer.encode(before))
    assert os.listdir(tmp_path) == ["f.jsonl"]


@pytest.mark.parametrize("profile", ["nvidia-main", "nvidia-2024", "lm-eval"])
def test_compatible_lines_begin_with_the_originals_fields(
    public: Callable, punkt_home: Path, emerson: str, shared: Path, tmp_path: Path, profile: str
) -> None:
    out = tmp_path / "f.jsonl"
    export = Export("niah_single_2", 1024, out, 10, profile, options={"haystack": emerson})
    data_ruler(export, public("gpt-neox"))
    golden = lines(shared / "golden" / "ruler" / profile / "niah_single_2@1024.jsonl")
    for i, (ours, theirs) in enumerate(zip(lines(out), golden, strict=False)):
        assert list(ours) == [*theirs, "sample", "depth", "key"]
        assert {name: ours[name] for name in theirs} == theirs
        assert ours["sample"] == i and ours["key"] in ours["input"]


def test_the_same_bytes_twice(trained: Callable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        data_ruler(Export("niah_multikey_1", 1024, tmp_path / name, 5, seed=3), trained("plain"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_refusals_leave_nothing_behind(trained: Callable, tmp_path: Path) -> None:
    out = tmp_path / "f.jsonl"
    bad = [
        (Export("niah_single_9", 1024, out), UserError),
        (Export("niah_single_2", 100, out), UserError),
        (Export("niah_single_2", 1024, out, samples=0), UserError),
        (Export("niah_single_2", 1024, out, profile="best"), UserError),
        (Export("niah_single_2", 1024, out, options={"haystack": str(tmp_path / "no")}), DataError),
        (Export("niah_single_2", 1024, tmp_path / "no" / "f.jsonl"), StorageError),
        (Export("niah_single_2", 1024, tmp_path), StorageError),
    ]
    for export, error in bad:
        with pytest.raises(error) as caught:
            data_ruler(export, trained("plain"))
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_old_file(trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.jsonl"
    out.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        data_ruler(Export("niah_single_1", 1024, out, 3), trained("plain"))
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["f.jsonl"]
