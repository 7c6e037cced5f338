"""Training configurations: what is read, and the one line a mistake gives."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


RUN, OPTIMIZER, STAGE, EVALUATE = (12, "steps = 10"), (10, "lr = 1e-3"), (14, "length = 64"), (21, "length = 64")


@pytest.mark.parametrize(
    ("place", "entry", "words"),
    [
        (RUN, "evaluate_every = 0", "evaluate_every 0 must be above 0"),
        (RUN, "checkpoint_every = -1", "checkpoint_every -1 must be above 0"),
        (RUN, "max_seconds = 0", "max_seconds 0.0 must be above 0"),
        (RUN, "max_seconds = nan", "max_seconds nan must be above 0"),
        (RUN, "workers = -1", "workers -1 must be 0 or more"),
        (RUN, "seed = -1", "seed -1 must be 0 or more"),
        (RUN, f"seed = {1 << 63}", f"seed {1 << 63} must be 0 or more, and below 2\\^63"),
        (RUN, "mixer_gain = 100", r"mixer_gain 100.0 must lie in \(0, 100\)"),
        (RUN, "mixer_gain = 0", r"mixer_gain 0.0 must lie in \(0, 100\)"),
        (OPTIMIZER, "weight_decay = nan", "weight_decay nan must be 0 or more"),
        (OPTIMIZER, "weight_decay = -0.1", "weight_decay -0.1 must be 0 or more"),
        (OPTIMIZER, "warmup_steps = -1", "warmup_steps -1 must be 0 or more"),
        (OPTIMIZER, "min_lr = nan", r"min_lr nan must lie in \[0, lr\]"),
        (OPTIMIZER, "min_lr = -1e-9", r"min_lr -1e-09 must lie in \[0, lr\]"),
        (OPTIMIZER, "eps = inf", "eps inf must be above 0"),
        (OPTIMIZER, "beta1 = 1", r"beta1 1.0 must lie in \[0, 1\)"),
        (OPTIMIZER, "beta2 = -0.5", r"beta2 -0.5 must lie in \[0, 1\)"),
        (OPTIMIZER, "accumulate = 0", "accumulate 0 must be above 0"),
        (STAGE, "batch_tokens = 0", "batch_tokens 0 must be above 0"),
        (STAGE, "until = nan", "until nan must be 0 or more"),
        (STAGE, "needles = 0", r"needles \[0, 0\] must be two rising"),
        (STAGE, "questions = [2, 1]", r"questions \[2, 1\] must be two rising"),
        (EVALUATE, "documents = 0", "documents 0 must be above 0"),
    ],
)
def test_values_out_of_range_name_their_line(tmp_path: Path, place: tuple[int, str], entry: str, words: str) -> None:
    """Each would stop the run with a bug's traceback, or never end it, or quietly train something else."""
    number, before = place
    lines = TEXT.splitlines()
    assert lines[number - 1] == before
    lines.insert(number, entry)
    with pytest.raises(UserError, match=f"c.toml line {number + 1}: {words}"):
        load(tmp_path, "\n".join(lines))


def test_the_ends_of_the_ranges_are_inside(tmp_path: Path) -> None:
    text = TEXT.replace("lr = 1e-3", "lr = 1e-3\nmin_lr = 1e-3\nweight_decay = 0\nwarmup_steps = 0\nbeta1 = 0")
    text = text.replace("steps = 10", f"steps = 1\nseed = {(1 << 63) - 1}\nworkers = 0\nevaluate_every = 1")
    config = load(tmp_path, text.replace("steps = 5", "steps = 1\nbatch_tokens = 1\nneedles = [1, 1]"))
    assert (config.run.steps, config.run.seed, config.optimizer.min_lr) == (1, (1 << 63) - 1, 1e-3)
    assert config.stages[0].mixture()["needles"] == (1, 1) and config.stages[0].batch_tokens == 1


def test_a_fixed_stage_takes_one_batch_a_step(tmp_path: Path) -> None:
    fixed = TEXT.replace("steps = 5", "steps = 5\nfixed = true")
    assert load(tmp_path, fixed).stages[0].fixed
    with pytest.raises(UserError, match="line 18: fixed does not go with accumulate 2"):
        load(tmp_path, fixed.replace("lr = 1e-3", "lr = 1e-3\naccumulate = 2"))


def test_tables_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    for old, new, words in (
        ("[[stages]]", "[stages]", "stages must be an array of tables"),
        ("[optimizer]\nlr = 1e-3", "optimizer = 3", "optimizer must be a table"),
        ("kinds = { noise = 1 }", "kinds = 3", "line 15: kinds = 3 must be a table"),
        ("length = 64", "length = [64.5, 70.5]", "line 14: length = .* must be"),
        ('name = "t"', "name = 3", "line 1: name = 3 must be a string"),
        ('name = "t"', "", "'name' is missing"),
        ("steps = 5", 'files = ["a", 3]', "line 16: files = .* must be a list of strings"),
        ("steps = 5", "fixed = 1", "line 16: fixed = 1 must be true or false"),
    ):
        text = TEXT.replace(old, new) if old == "[[stages]]" else TEXT.replace(old, new, 1)
        if new == "[stages]":
            text = text.split("[[evaluate]]")[0].rpartition("[stages]")[0]
        if old.startswith("[optimizer]"):
            text = f"{new}\n{TEXT.replace(old, '')}"
        with pytest.raises(UserError, match=words) as caught:
            load(tmp_path, text)
        assert str(tmp_path / "c.toml") in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    line=st.integers(1, len(TEXT.splitlines())),
    value=st.sampled_from(["-1", "0", "1", "nan", "-inf", "[]", "[0, 1]", '""', '"x"', "{}", "true", "1e400", "[[1]]"]),
)
def test_any_value_anywhere_is_taken_or_refused_in_one_line(tmp_path: Path, line: int, value: str) -> None:
    lines = TEXT.splitlines()
    key, equals, _ = lines[line - 1].partition(" = ")
    lines[line - 1] = f"{key} = {value}" if equals else lines[line - 1]
    try:
        config = load(tmp_path, "\n".join(lines))
    except UserError as problem:
        assert "\n" not in str(problem) and "c.toml" in str(problem) and problem.exit_code == 2
    else:
        assert config.run.steps >= 1 and config.digest == load_config(tmp_path / "c.toml").digest


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read configuration .*none.toml: No such file"):
        load_config(tmp_path / "none.toml")
