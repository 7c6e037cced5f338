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
        ("[[stages]]", '[[stages]]\nsource = "tasks"', "source 'tasks' is not one of text, episodes"),
    ],
)
def test_mistakes_are_one_line(config: Path, tmp_path: Path, capsys, old: str, new: str, words: str) -> None:
    config.write_text(CONFIG.replace(old, new, 1))
    assert cli.main(["train", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "model").exists()
