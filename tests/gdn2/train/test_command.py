"""`gdn2-eval train` on real episodes."""

from pathlib import Path

import pytest

import cli
import gdn2
from gdn2.checkpoints import native

CONFIG = """
name = "smoke"
tokenizer = "tokenizer.json"
[model]
d_model = 16
vocab_size = 2048
pattern = ["a"]
tied = true
mixers = { a = { mixer = "gdn2", n_heads = 1, d_key = 16, d_value = 16 } }
[optimizer]
lr = 1e-3
[run]
steps = 3
log_every = 1
[[stages]]
length = [128, 160]
kinds = { noise = 1 }
batch_tokens = 512
[[evaluate]]
name = "held-out"
length = 160
kinds = { noise = 1 }
documents = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tokenizer = Path(gdn2.__file__).parent / "zoo" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (tmp_path / "c.toml").write_text(CONFIG)
    return tmp_path / "c.toml"


def test_train_writes_a_model_and_does_nothing_twice(config: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["train", str(config), "--out", str(out), "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "step 3 stage 1 loss" in said and "held-out: loss" in said and str(out / "model") in said
    before = (out / "model" / native.WEIGHTS).read_bytes()
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "going on from step 3" in said and "stage 1 loss" not in said
    assert (out / "model" / native.WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = 3", "stepps = 3", "c.toml line 13: unknown key 'stepps'"),
        ("length = [128, 160]", "length = 32", "length 32 is too short"),
        ("noise = 1 }\nbatch", "prose = 1 }\nbatch", "prose"),
        ("noise = 1 }\nbatch", "noise = inf }\nbatch", "must give finite weights >= 0"),
        ("noise = 1 }\nbatch", "noise = nan }\nbatch", "must give finite weights >= 0"),
        ("noise = 1 }\nbatch", "noise = -1 }\nbatch", "must give finite weights >= 0"),
        ("vocab_size = 2048", "vocab_size = 2047", "vocab_size 2047 is less than the 2048 of"),
        ("steps = 3", 'steps = 3\nkernels = "tritn"', "kernels of [run]: implementation must be one of"),
        ("steps = 3", 'steps = 3\nkernels = "numba"', "kernels of [run]: implementation numba has no gradients"),
        ("steps = 3", 'steps = 3\nkernels = "triton"', "kernels of [run]: implementation triton needs a GPU"),
        ("[[stages]]", '[[stages]]\nsource = "tasks"', "source 'tasks' is not one of text, episodes"),
    ],
)
def test_mistakes_are_one_line(
    config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert old in CONFIG
    config.write_text(CONFIG.replace(old, new, 1))
    assert cli.main(["train", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_tokenizer_that_is_none_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, capsys, content: bytes
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert cli.main(["train", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 4
    error = capsys.readouterr().err
    assert "tokenizer.json" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_text_that_is_too_short_or_not_text_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    source = 'source = "text"\nfiles = ["t.txt"]\nlength = 20\n'
    config.write_text(CONFIG.replace("length = [128, 160]\nkinds = { noise = 1 }\n", source))
    command = ["train", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for content, words in (
        (b"", "the train part of the text has 0 tokens, fewer than length 20"),
        (b"Two words.", "fewer than length 20"),
        (b"\xff\xfe", "as UTF-8 text"),
    ):
        (tmp_path / "t.txt").write_bytes(content)
        assert cli.main(command) == 3
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (tmp_path / "t.txt").write_text("The river runs by the old town, and the town sleeps. " * 20, encoding="utf-8")
    assert cli.main(command) == 0
    assert "step 3 stage 1 loss" in capsys.readouterr().out


def test_a_damaged_save_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    command = ["train", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(command) == 0
    (save,) = (tmp_path / "out" / "saves").iterdir()
    whole = {file.name: file.read_bytes() for file in save.iterdir()}
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (save / name).write_bytes(whole[name][: len(whole[name]) // 2])
        capsys.readouterr()
        assert cli.main(command) == 4
        error = capsys.readouterr().err
        assert "step-00000003" in error and "cannot be read" in error and error.count("\n") == 1
        (save / name).write_bytes(whole[name])
    config.write_text(CONFIG.replace("lr = 1e-3", "lr = 2e-3"))
    assert cli.main(command) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err
