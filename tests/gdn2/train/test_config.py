"""Training configurations: what is read, and the one line a mistake gives."""

from dataclasses import replace
from pathlib import Path

import pytest

import gdn2
from gdn2.errors import UserError
from gdn2.models import PRESETS
from gdn2.train.config import load_config

ZOO = Path(gdn2.__file__).parent / "zoo"
TEXT = """\
name = "t"
tokenizer = "tokenizer.json"
[model]
d_model = 16
vocab_size = 64
pattern = ["a"]
[model.mixers.a]
mixer = "gdn2"
[optimizer]
lr = 1e-3
[run]
steps = 10
[[stages]]
length = 64
kinds = { noise = 1 }
steps = 5
[[stages]]
length = [64, 128]
kinds = { noise = 1, essay = 0.5 }
[[evaluate]]
length = 64
"""


def load(tmp_path: Path, text: str) -> object:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "c.toml").write_text(text)
    return load_config(tmp_path / "c.toml")


def test_every_configuration_of_the_zoo_is_valid() -> None:
    files = sorted(ZOO.glob("*.toml"))
    assert files
    for file in files:
        assert load_config(file).name == file.stem


def test_a_preset_is_a_model_and_what_differs_is_said(tmp_path: Path) -> None:
    table = TEXT.split("[model]")[1].split("[optimizer]")[0]
    text = TEXT.replace(table, '\npreset = "kda-hybrid-tiny"\ntrain_length = 99\n')
    assert load(tmp_path, text).model == replace(PRESETS["kda-hybrid-tiny"](), train_length=99)
    other = load_config(tmp_path / "c.toml", "gdn-tiny")
    assert other.model == replace(PRESETS["gdn-tiny"](), train_length=99)
    assert (other.name, other.model.name) == ("gdn-tiny", "gdn-tiny")
    with pytest.raises(UserError, match="line 4: preset 'gdn-tny' is unknown; did you mean gdn-tiny"):
        load(tmp_path, text.replace("kda-hybrid-tiny", "gdn-tny"))
    with pytest.raises(UserError, match="^preset 'zzz' is unknown; `gdn2-eval list models --long` names them"):
        load_config(tmp_path / "c.toml", "zzz")
    load(tmp_path, TEXT)
    with pytest.raises(UserError, match=r"line 3: --preset gdn-tiny takes the place of one that \[model\] names"):
        load_config(tmp_path / "c.toml", "gdn-tiny")


def test_values_and_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    assert config.model.d_model == 16 and config.model.name == "t"
    assert config.optimizer.lr == 1e-3 and config.optimizer.beta2 == 0.95
    first, last = config.stages
    assert first.steps == 5 and last.steps is None
    assert first.mixture()["length"] == (64, 64) and last.mixture()["length"] == (64, 128)
    assert dict(last.kinds) == {"noise": 1.0, "essay": 0.5}
    assert load(tmp_path, TEXT.replace("1e-3", "2e-3")).digest != config.digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lr = 1e-3", "lr = 1e-3\nmomentum = 1", "c.toml line 11: unknown key 'momentum'; known: lr, min_lr"),
        ("steps = 10", "steps = 10\nseconds = 1", "line 13: unknown key 'seconds'"),
        ("steps = 10", 'steps = "ten"', "line 12: steps = 'ten' must be a whole number"),
        ("steps = 10", "steps = true", "line 12: steps = True must be a whole number"),
        ("steps = 10", 'steps = 10\nstored = "int8"', "line 13: stored 'int8' must be float32, bfloat16 or float16"),
        ("steps = 10", "steps = 0", "line 12: steps 0 must be above 0"),
        ("steps = 5", "steps = 5.5", "line 16: steps = 5.5 must be a whole number"),
        ("steps = 5\n", "", "line 13: stage 1 needs steps"),
        ("length = [64, 128]", "length = [128, 64]", r"line 18: length \[128, 64\] must be two rising"),
        ("length = [64, 128]", "length = [1, 2, 3]", "line 18: length = .* must be \\[smallest, largest\\] or a whole"),
        ("essay = 0.5", 'essay = "x"', "line 19: essay = 'x' must be a number"),
        ("lr = 1e-3", "lr = 1e-3\nmin_lr = 1", r"line 11: min_lr 1.0 must lie in \[0, lr\]"),
        ("lr = 1e-3\n", "", "line 9: 'lr' is missing"),
        ("[run]\nsteps = 10\n", "", "'run' is missing"),
        ("d_model = 16", "d_modl = 16", "line 3: unknown key 'd_modl'"),
        ("tokenizer.json", "nowhere.json", "line 2: tokenizer 'nowhere.json' is not a file"),
        ("name = ", "name ", "is not TOML"),
        ("[[stages]]\nlength = 64", '[[stages]]\nsource = "text"\nlength = 64', 'line 13: source "text" needs files'),
        ("[[stages]]\nlength = 64", '[[stages]]\nfiles = ["no"]\nlength = 64', "line 14: 'no' is not a file"),
    ],
)
def test_mistakes_name_their_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TEXT
    with pytest.raises(UserError, match=words):
        load(tmp_path, TEXT.replace(old, new, 1))


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read configuration .*none.toml: No such file"):
        load_config(tmp_path / "none.toml")
