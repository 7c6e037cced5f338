"""Checkpoints on the command line: looked at without loading, converted, and opened with what the user says."""

import json
import re
from pathlib import Path

import pytest
import torch

import cli
from evalsuite import backends
from evalsuite.backends import looking, opening
from gdn2 import zoo
from gdn2.checkpoints import Options
from gdn2.errors import UserError
from gdn2.models import PRESETS

GIVEN = "norm_eps=3e-4"


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "checkpoints"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    vocab = {chr(0x100 + i): i for i in range(200)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": chr(0x100)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return str(tmp_path / "tokenizer.json")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_opening_reads_what_was_said() -> None:
    assert opening({}) == Options()
    given = {
        "allow_pickle_weights": "True", "given": " window=2048, rope_base=1e4 ", "tokenizer": "t", "bos": "no",
        "offline": True, "model": "x",
    }  # fmt: skip
    assert opening(given) == Options(
        allow_pickle_weights=True, tokenizer="t", bos="no", offline=True, values={"window": "2048", "rope_base": "1e4"}
    )
    for wrong in ("window", "=3", "window="):
        with pytest.raises(UserError, match=r"--set takes NAME=VALUE, separated by commas; '.*' is not"):
            opening({"given": wrong})


def test_show_checkpoint_prints_what_it_is(capsys: pytest.CaptureFixture[str], golden: Path) -> None:
    code, out, err = call(capsys, "show", "checkpoint", str(golden / "fla_kda_gva"))
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err, lines["format"], lines["layers"]) == (0, "", "fla", "4 kda")
    assert "n_heads=2" in lines["kda"] and len(lines["digest"]) == 64 and "refused" not in lines
    assert lines["parameters"].endswith("float32)")


def test_show_checkpoint_lists_what_would_be_refused(capsys: pytest.CaptureFixture[str], golden: Path) -> None:
    path = str(golden / "nvlabs_gdn2_recurrent" / "final-model-ckpt.pth")
    code, out, _ = call(capsys, "show", "checkpoint", path)
    assert code == 4 and "--allow-pickle-weights" in out.splitlines()[-1]
    code, out, _ = call(capsys, "show", "checkpoint", path, "--allow-pickle-weights", "--set", GIVEN)
    assert code == 0 and "norm_eps       0.0003" in out
    code, _, err = call(capsys, "show", "some-run", path)
    assert code == 2 and "checkpoint PATH" in err


def test_list_models_long_states_what_each_costs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list", "models", "--long")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    rows = {(row[0], row[1]): row[2:] for row in lines[1:]}
    assert code == 0 and lines[0] == list(looking.COSTS)
    assert {(name, "trained") for name in zoo.names()} | {(name, "preset") for name in PRESETS} == set(rows)
    # 9 layers of 16 x 128 x 128 floats and three windows of 3 x 2048 in bf16; 9 windows of 2048 tokens of 2 x 2304.
    assert rows["gdn2-hybrid-1.3b", "preset"] == [
        "1,447,772,688", "1,300,314,384", "2,934.2", "-", "9,540.0", "165,888.0", "165,888.0",
    ]  # fmt: skip
    assert 9540 * 1024 == 9 * (4 * 16 * 128 * 128 + 2 * 3 * 3 * 2048)
    assert 165_888 * 1024 == 9 * 2 * 2 * 2048 * 2304
    assert rows["transformer-1.3b", "preset"][4:] == ["-", "663,552.0", "21,233,664.0"]
    assert rows["gdn2-tiny", "trained"][0] == "1,163,656"


def test_convert_writes_and_says_what_files_cannot(
    capsys: pytest.CaptureFixture[str], golden: Path, tmp_path: Path, tokenizer: str
) -> None:
    path = str(golden / "nvlabs_gdn2_recurrent" / "final-model-ckpt.pth")
    opened = ["--allow-pickle-weights", "--set", GIVEN]
    code, _, err = call(capsys, "convert", path, str(tmp_path / "a"), "--to", "native")
    assert code == 4 and "--allow-pickle-weights" in err and len(err.splitlines()) == 1
    code, out, _ = call(
        capsys, "convert", path, str(tmp_path / "a"), "--to", "native", *opened, "--tokenizer", tokenizer
    )
    assert (code, out) == (0, f"written to {tmp_path / 'a'}\n")
    code, out, _ = call(capsys, "convert", str(tmp_path / "a"), str(tmp_path / "b.pth"), "--to", "nvlabs")
    assert code == 0 and out.splitlines()[1].endswith("--set norm_eps=0.0003")
    theirs, ours = (torch.load(p, weights_only=True)["model"] for p in (path, tmp_path / "b.pth"))
    assert set(theirs) == set(ours) and all(torch.equal(theirs[n], ours[n]) for n in theirs)


def test_formats_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list", "formats")
    assert code == 0 and len(out.splitlines()) == len(looking.format_rows()) + 1
    assert "qwen3_next" in out and "through transformers" in out


def test_models_are_loaded_by_any_name(golden: Path, tokenizer: str) -> None:
    backend = backends.load(str(golden / "fla_kda_gva"), device="cpu", given={"tokenizer": tokenizer})
    assert (backend.info.mixer, backend.info.family, backend.info.name) == ("kda", "recurrent", "fla_kda_gva")
    with pytest.raises(UserError, match="brings no tokenizer: give --tokenizer"):
        backends.load(str(golden / "fla_kda_gva"), device="cpu")
    with pytest.raises(UserError, match="neither known nor a checkpoint"):
        backends.load("transformers:nowhere")
