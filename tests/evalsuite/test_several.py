"""Several models in one command: each has its own run, and one that fails costs the others nothing."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from evalsuite import backends, evaluate, runner, store
from evalsuite.evaluate import Asked, Voice
from gdn2 import zoo
from gdn2.errors import DeviceLostError, UserError


@pytest.fixture
def ask(toy, tmp_path, monkeypatch):
    """`ask(models)`: the exit code, and every line said on the way."""
    monkeypatch.chdir(tmp_path)

    def run(models, dry_run=False):
        said = []
        voice = Voice(said.append, lambda header, rows: said.append(str(rows)), said.append, said.append)
        passed = {"model": models, "seed": "42"}
        asked = Asked(models, [toy.Find()], "256", 2, None, 42, Path("results"), "cpu", None, None, True, passed)
        code = evaluate.evaluate(asked, voice, dry_run, lambda directory: said.append(f"scores of {directory.name}"))
        return code, "\n".join(said)

    return run


def runs():
    found = {}
    for path in Path("results/runs").glob("*/run.json"):
        content = json.loads(path.read_text())
        found[content["invocations"][-1]["passed"]["model"]] = content["status"], len(store.read_records(path.parent))
    return found


def test_each_model_has_a_run_of_its_own(ask):
    code, said = ask("scripted:perfect, scripted:last,scripted:perfect")
    assert code == 0 and "model 2 of 2: scripted:last" in said and said.endswith("2 models")
    assert said.count("scores of scripted-") == 2
    assert runs() == {"scripted:perfect": ("complete", 2), "scripted:last": ("complete", 2)}
    code, said = ask("scripted:perfect,scripted:last")
    assert code == 0 and said.count("0 samples answered") == 2


def test_a_refused_model_costs_the_others_nothing(ask, tmp_path):
    (tmp_path / "broken").mkdir()
    code, said = ask("scripted:perfect,broken,scripted:last")
    assert code == 5 and "broken failed: broken holds no weights" in said
    assert said.endswith("3 models, 1 failed or partial: broken")
    assert set(runs()) == {"scripted:perfect", "scripted:last"}
    assert ask("broken,transformers:broken")[0] == 4  # all alike: their own code


def test_a_bug_comes_up_when_the_others_are_done(ask, monkeypatch):
    load = backends.load

    def broken(model, **rest):
        if model == "scripted:last":
            raise ZeroDivisionError("ours")
        return load(model, **rest)

    monkeypatch.setattr(backends, "load", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        ask("scripted:last,scripted:perfect")
    assert set(runs()) == {"scripted:perfect"}


def test_a_lost_device_and_a_signal_end_it_all(ask, monkeypatch):
    def lost(*_):
        raise DeviceLostError("the device is gone")

    monkeypatch.setattr(runner, "run", lost)
    with pytest.raises(DeviceLostError):
        ask("scripted:perfect,scripted:last")
    monkeypatch.setattr(runner, "run", lambda *_: runner.Outcome(2, 0, 1, 0, 9, 0.1, signal=15))
    code, said = ask("scripted:perfect,scripted:last")
    assert code == 143 and "model 2" not in said


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("scripted:perfect,scriptd:last", "model 'scriptd:last' is neither known nor a checkpoint"),
        ("scripted:perfect,,scripted:last", "holds a blank name"),
        ("scripted:perfect,scripted:first", "scripted:first"),
        (",", "holds a blank name"),
    ],
)
def test_a_wrong_name_is_said_before_anything_runs(ask, models, message):
    with pytest.raises(UserError, match=message):
        ask(models)
    assert not Path("results").exists()


def test_the_zoo_is_every_checkpoint_of_the_package(tmp_path, monkeypatch):
    assert backends.expand("zoo") == zoo.names()
    assert backends.expand("zoo,scripted:last,gdn2-tiny") == [*zoo.names(), "scripted:last"]
    assert "zoo" in backends.names()
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "zoo"):
        (tmp_path / name).mkdir()
    assert backends.expand("a,b") == ["a,b"] and backends.expand("zoo") == zoo.names()


def test_a_dry_run_prices_them_all_and_writes_nothing(ask):
    code, said = ask("scripted:perfect,scripted:last", dry_run=True)
    assert code == 0 and said.count("records would go to") == 2 and not list(Path("results").rglob("*.json*"))


def test_two_processes_take_the_models_one_after_another(root, tmp_path):
    """The second model of a pair whose first is refused in both processes, shared between them like any other."""
    (tmp_path / "broken").mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "cli.py"), "run", "--model", "scripted:last,broken,scripted:perfect"]
    command += ["--tasks", "niah_single_1", "--lengths", "1k", "--samples", "6", "--device", "cpu"]
    processes = [
        subprocess.Popen(command, env=os.environ | meeting | {"RANK": rank}, cwd=tmp_path, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [5, 0], said
    for directory in (tmp_path / "results" / "runs").iterdir():
        assert len(store.read_records(directory)) == 6
        assert {p.name for p in directory.glob("records*.jsonl")} == {"records.jsonl", "records.1.jsonl"}
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 2
