"""The shipped model through the command line, in processes of its own: kills, signals, batches, broken files."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import cli
from evalsuite.store import read_records
from gdn2 import env, zoo

ASK = ("--tasks", "niah_single_1,niah_single_2", "--lengths", "256,512", "--samples", "4", "--budget", "24")


def start(root, out, *more):
    command = [sys.executable, str(root / "cli.py"), "run", "--model", "gdn2-tiny", *ASK, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out)


def finished(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def answers(out):
    (directory,) = (out / "runs").iterdir()
    lines = (directory / "records.jsonl").read_text().splitlines()
    records = read_records(directory)
    assert len(lines) == len(records) == len({(r.key, r.metric) for r in records})
    return sorted((dataclasses.replace(r, latency_s=0.0, created_at="") for r in records), key=lambda r: r.key)


def stored(out):
    return sum(file.read_bytes().count(b"\n") for file in out.glob("runs/*/records.jsonl"))


def until_stored(out, process, count):
    """Wait until `count` records are on disk or the run is over."""
    end = time.monotonic() + 240
    while stored(out) < count and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    code, shown, err = finished(start(root, out))
    assert code == 0, err
    assert "niah_single_2" in shown and "16 samples answered" in err
    return answers(out)


def test_answers_do_not_depend_on_batches_order_or_resuming(root, tmp_path, undisturbed):
    """Small batches, one sample first and the lengths the other way round, then the rest: the same records."""
    more = ["--batch-tokens", "64", "--tasks", "niah_single_2,niah_single_1"]
    first = [*more, "--samples", "1", "--lengths", "512"]
    assert cli.main(["run", "--model", "gdn2-tiny", *ASK, "--out", str(tmp_path), *first]) == 0
    assert stored(tmp_path) == 2
    again = [*more, "--lengths", "512,256"]
    assert cli.main(["run", "--model", "gdn2-tiny", *ASK, "--out", str(tmp_path), *again]) == 0
    assert answers(tmp_path) == undisturbed


def disturbed(root, out, kills, moments):
    """Kill a run again and again, at the start, while it reads and after it wrote; then let it finish."""
    for number in range(kills):
        process = start(root, out, "--batch-tokens", "512")
        if number % 2:
            time.sleep(moments.uniform(0.0, 4.0))
        else:
            until_stored(out, process, stored(out) + 1)
            time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        assert finished(process)[0] in (-signal.SIGKILL, 0)
    code, _, err = finished(start(root, out))
    assert code == 0, err


def test_two_kills_lose_nothing(root, tmp_path, undisturbed):
    disturbed(root, tmp_path, 2, random.Random(1))
    assert answers(tmp_path) == undisturbed


@pytest.mark.slow
def test_twenty_kills_lose_nothing(root, tmp_path, undisturbed):
    disturbed(root, tmp_path, 20, random.Random(2))
    assert answers(tmp_path) == undisturbed


def test_an_interruption_keeps_what_was_answered(root, tmp_path):
    process = start(root, tmp_path, "--lengths", "512,16k", "--samples", "24", "--batch-tokens", "256")  # half a minute
    until_stored(tmp_path, process, 1)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130 and "Traceback" not in err, err
    assert time.monotonic() - asked < 30 and stored(tmp_path) >= 1
    assert len(answers(tmp_path)) == stored(tmp_path)


def broken(tmp_path, how):
    """A copy of the shipped checkpoint with one thing wrong."""
    home = tmp_path / "broken"
    shutil.copytree(zoo.path("gdn2-tiny"), home)
    (home / "checksums.json").unlink()
    if how == "truncated":
        weights = (home / "model.safetensors").read_bytes()
        (home / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif how == "empty":
        (home / "model.safetensors").write_bytes(b"")
    elif how == "missing":
        (home / "model.safetensors").unlink()
    elif how == "wrong shape":
        config = json.loads((home / "config.json").read_text())
        config["model"]["d_ff"] += 1
        (home / "config.json").write_text(json.dumps(config))
    elif how == "not json":
        (home / "config.json").write_text("{")
    elif how == "large tokenizer":
        tokenizer = json.loads((home / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["qqqq"] = 1 << 20
        (home / "tokenizer.json").write_text(json.dumps(tokenizer))
    return home


HOWS = ["truncated", "empty", "missing", "wrong shape", "not json", "large tokenizer"]


@pytest.mark.parametrize("how", HOWS)
def test_a_broken_checkpoint_is_exit_code_4_and_nothing_is_written(tmp_path, monkeypatch, capsys, how):
    home = broken(tmp_path, how)
    monkeypatch.chdir(tmp_path)
    code = cli.main(["run", "--model", str(home), *ASK])
    out, err = capsys.readouterr()
    assert (code, out) == (4, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "results").exists()


def test_idle_threads_sleep(root):
    """What OpenMP itself says when torch loads it."""
    around = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    command = [sys.executable, str(root / "cli.py"), "list", "formats"]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_the_wait_policy_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    env.let_idle_threads_sleep()
    assert env.get("OMP_WAIT_POLICY") == "active"


LONG = [["list", "runs", "--out"], ["show", "checkpoint"], ["convert", "gdn2-tiny", "--to", "fla"]]


@pytest.mark.parametrize("arguments", LONG)
def test_a_path_too_long_for_the_system_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    for long in ("x" * 300, "../" * 2000):
        code = cli.main([*arguments, long])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and err.endswith(" is too long for a path\n") and len(err) < 200
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_file_for_samples(root, capsys):
    tokenizer = str(root / "gdn2" / "zoo" / "tokenizer.json")
    code = cli.main(["data", "ruler", "--task", "niah_single_2", "--length", "512", "--tokenizer", tokenizer,
                     "--samples", "1", "--out", "/"])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, out, err) == (6, "", "error: cannot write /: it is a directory\n")
