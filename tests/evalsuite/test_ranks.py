"""Several processes answer one run together: each sample once, whoever dies, with the results of one process."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import ranks
from evalsuite.plan import Entry
from evalsuite.ranks import Ranks, merged, shards
from evalsuite.store import read_records, record_files
from gdn2 import env
from gdn2.errors import UserError

TOY = Path(__file__).with_name("toy.py")
LIMIT_S = 60


def entries(tokens):
    return [Entry(str(i), f"key {i:03}", 1, n) for i, n in enumerate(tokens)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=40), st.integers(1, 6), st.randoms())
def test_every_sample_has_one_process_and_loads_are_even(tokens, world, rng):
    todo = entries(tokens)
    parts = shards(todo, world)
    assert len(parts) == world and sorted(key for part in parts for key in part) == [e.key for e in todo]
    shuffled = list(todo)
    rng.shuffle(shuffled)
    assert shards(shuffled, world) == parts
    size = {entry.key: max(entry.tokens, 1) for entry in todo}
    loads = [sum(size[key] for key in part) for part in parts]
    assert max(loads) - min(loads) <= max(size.values(), default=0)


def test_accounts_add_up_without_the_lost():
    found = merged([{"read": 3, "events": [1]}, None, {"read": 4, "events": [2], "moved": 1}])
    assert found == {"read": 7, "events": [1, 2], "moved": 1}


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with ranks.join() as alone:
        alone.meet()
        assert (alone.rank, alone.world) == (0, 1) and alone.gather({"a": 1}) == [{"a": 1}]
        assert alone.share(entries([1, 2])) == {"key 000", "key 001"}


def test_each_process_of_a_host_has_a_gpu_of_its_own(monkeypatch):
    assert ranks.device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert env.launched() == (6, 8)
    assert (ranks.device("cuda"), ranks.device("cpu"), ranks.device("cuda:5")) == ("cuda:2", "cpu", "cuda:5")
    monkeypatch.setenv("RANK", "nonsense")
    assert env.launched() == (0, 8)


@pytest.fixture
def store():
    from torch.distributed import HashStore

    return HashStore()


def test_a_process_that_failed_stops_those_that_wait_for_it(store):
    with pytest.raises(OSError, match="broken"), Ranks(1, 2, store):
        raise OSError("broken disk")
    with Ranks(0, 2, store) as first, pytest.raises(UserError, match="process 1 of the run stopped: broken disk"):
        first.meet()


def test_a_silent_process_is_lost_and_a_slow_one_is_not(store, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT_S", 0.05)

    def slow():
        with Ranks(1, 3, store, 0.5) as second:
            time.sleep(1.5)
            second.gather({"n": 1})

    thread = threading.Thread(target=slow)
    thread.start()
    with Ranks(0, 3, store, 0.5) as first:
        began = time.monotonic()
        assert first.gather({"n": 0}) == [{"n": 0}, {"n": 1}, None]
        assert 1.0 < time.monotonic() - began < 20
    thread.join()


def test_what_is_said_in_one_turn_is_not_heard_in_the_next(store):
    found = {}

    def second():
        with Ranks(1, 2, store) as other:
            with pytest.raises(ValueError), other.turn(1):
                raise ValueError("no memory")
            with other.turn(2):
                other.meet()
                found["second"] = other.gather({"n": 2})

    thread = threading.Thread(target=second)
    thread.start()
    with Ranks(0, 2, store) as first:
        with pytest.raises(UserError, match="process 1 of the run stopped: no memory"), first.turn(1):
            first.meet()
        with first.turn(2):
            first.meet()
            found["first"] = first.gather({"n": 1})
    thread.join()
    assert found == {"first": [{"n": 1}, {"n": 2}], "second": [{"n": 2}]}


def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(results, world, root, model="scripted:perfect", silence="5"):
    """Start `world` processes as a launcher would; they find each other by the environment."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(world)}
    out = []
    for rank in range(world):
        environment = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(root)}
        command = [sys.executable, str(TOY), str(results), model, "7", "256,512", silence]
        out.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return out


def ends(processes):
    codes = []
    for process in processes:
        _, said = process.communicate(timeout=LIMIT_S)
        codes.append(process.returncode)
        assert "Traceback" not in said, said
    return codes


def results_of(directory):
    (run,) = directory.iterdir()
    plain = {(r.key, r.metric): dataclasses.replace(r, latency_s=0.0, created_at="") for r in read_records(run)}
    return run, plain


@pytest.fixture(scope="module")
def single(tmp_path_factory, root):
    directory = tmp_path_factory.mktemp("single")
    command = [sys.executable, str(TOY), str(directory), "scripted:perfect", "7", "256,512"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(root)}, timeout=LIMIT_S)
    return results_of(directory)[1]


def test_three_processes_have_the_results_of_one(tmp_path, single, root):
    assert ends(start(tmp_path, 3, root)) == [0, 0, 0]
    run, found = results_of(tmp_path)
    assert found == single
    assert [p.name for p in record_files(run)] == ["records.jsonl", "records.1.jsonl", "records.2.jsonl"]
    written = [len(p.read_text().splitlines()) for p in record_files(run)]
    assert sum(written) == len(single) and min(written) > 0
    content = json.loads((run / "run.json").read_text())
    assert content["status"] == "complete" and content["totals"]["samples"] == 21
    # A single process finds nothing left to do.
    before = {p: p.read_bytes() for p in run.iterdir()}
    assert ends(start(tmp_path, 1, root)) == [0]
    assert all(p.read_bytes() == data for p, data in before.items())


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_is_noticed_and_any_number_goes_on(tmp_path, single, root, victim):
    processes = start(tmp_path, 3, root, "scripted:perfect:100ms")
    deadline = time.monotonic() + LIMIT_S
    name = f"records.{victim}.jsonl" if victim else "records.jsonl"
    while not any(p.stat().st_size for p in tmp_path.glob(f"*/{name}")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGKILL)
    codes = ends(processes)
    assert codes[victim] == -signal.SIGKILL
    run, kept = results_of(tmp_path)
    assert 0 < len(kept) < len(single) and all(kept[key] == single[key] for key in kept)
    if victim:  # rank 0 waited for it, and says so
        assert codes[0] == 5
        content = json.loads((run / "run.json").read_text())
        assert content["status"] == "incomplete" and content["invocations"][-1]["lost_processes"] == [victim]
    # The others answered all that was theirs.
    shares = [len(p.read_text().splitlines()) for p in record_files(run)]
    assert all(n >= 7 for rank, n in enumerate(shares) if rank != victim)
    assert ends(start(tmp_path, 2, root)) == [0, 0]
    assert results_of(tmp_path)[1] == single


@pytest.mark.slow
def test_torchrun_starts_them_and_a_signal_stops_all(tmp_path, single, root):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port())]
    command += [str(TOY), str(tmp_path), "scripted:perfect:100ms", "7", "256,512"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT_S
    while not any(p.stat().st_size for p in tmp_path.glob("*/records.1.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    run, kept = results_of(tmp_path)
    assert 0 < len(kept) < len(single)
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)[1] == single


@pytest.mark.gpu
def test_gpus_of_one_host_have_the_results_of_one(tmp_path, root):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    run = [str(root / "cli.py"), "run", "--model", "gdn2-tiny", "--tasks", "niah_single_2", "--lengths", "512,1k"]
    run += ["--samples", "20", "--device", "cuda", "--out"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    found = {}
    for name, before in ("one", []), ("two", launch):
        command = [sys.executable, *before, *run, str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[name] = results_of(tmp_path / name / "runs")
    assert found["two"][1] == found["one"][1] and len(found["one"][1]) >= 40
    assert all(p.stat().st_size for p in (found["two"][0] / "records.jsonl", found["two"][0] / "records.1.jsonl"))
