"""A real process, killed at random moments and started again, ends with the records of an undisturbed one."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evalsuite.schema import from_line
from evalsuite.store import read_records

TOY = Path(__file__).with_name("toy.py")
KILLS = 20


def start(root, directory, model="scripted:perfect", **options):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOY), str(directory), model, "24", "256,512"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def finished(process, timeout=30):
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def the_run(directory):
    (found,) = directory.iterdir()
    return found


def until_written(directory, size=1):
    """Wait until the run has `size` bytes of records: only then is there something to disturb."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        files = list(directory.glob("*/records.jsonl"))
        if files and files[0].stat().st_size >= size:
            return files[0]
        time.sleep(0.002)
    raise AssertionError("the run wrote nothing")


def timeless(records):
    made = [dataclasses.replace(r, latency_s=0.0, created_at="") for r in records]
    return sorted(made, key=lambda r: (r.key, r.metric))


def test_twenty_kills_lose_nothing_and_repeat_nothing(root, tmp_path):
    assert finished(start(root, tmp_path / "whole", "scripted:perfect")) == (0, "")
    whole = read_records(the_run(tmp_path / "whole"))
    assert len(whole) == 2 * 24 + 24 * 2

    moments = random.Random(7)
    survivors: dict[tuple[str, str], str] = {}
    killed = 0
    while killed < KILLS:
        size = sum(f.stat().st_size for f in (tmp_path / "killed").glob("*/records.jsonl"))
        process = start(root, tmp_path / "killed", "scripted:perfect:30ms")
        # Half of the kills come while it starts, repairs and plans, half after it wrote something new.
        if killed % 2:
            time.sleep(moments.uniform(0.0, 0.4))
        else:
            until_written(tmp_path / "killed", size + 1)
            time.sleep(moments.uniform(0.0, 0.02))
        process.kill()
        code, errors = finished(process)
        assert code in (-signal.SIGKILL, 0), errors
        killed += 1
        for record in read_records(the_run(tmp_path / "killed")) if (tmp_path / "killed").exists() else []:
            # What was there once stays, byte for byte.
            survivors.setdefault((record.key, record.metric), record.created_at)
            assert survivors[record.key, record.metric] == record.created_at
        assert len(survivors) < len(whole), "the run was over before it was killed often enough"

    assert finished(start(root, tmp_path / "killed", "scripted:perfect")) == (0, "")
    run = the_run(tmp_path / "killed")
    assert timeless(read_records(run)) == timeless(whole)
    assert {(r.key, r.metric): r.created_at for r in read_records(run)}.items() >= survivors.items()
    lines = [from_line(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert len(lines) == len({(r.key, r.metric) for r in lines}) == len(whole)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_within_seconds(root, tmp_path, number, code):
    process = start(root, tmp_path, "scripted:perfect:300ms")
    file = until_written(tmp_path)
    start_of_end = time.monotonic()
    process.send_signal(number)
    assert finished(process) == (code, "") and time.monotonic() - start_of_end < 5
    assert [from_line(line) for line in file.read_text().splitlines()]
    assert (file.parent / "lock").read_text() == ""


def test_a_second_process_is_turned_away(root, tmp_path):
    first = start(root, tmp_path, "scripted:perfect:50ms")
    until_written(tmp_path)
    code, errors = finished(start(root, tmp_path, "scripted:perfect:50ms"))
    assert code == 7 and f"in use by process {first.pid} on " in errors and errors.count("\n") == 1
    first.send_signal(signal.SIGINT)
    assert finished(first)[0] == 130


def test_a_file_size_limit_is_one_line_and_can_be_lifted(root, tmp_path):
    import resource

    limit = 20_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, errors = finished(start(root, tmp_path, "scripted:perfect", preexec_fn=limited))
    assert code == 6 and "records.jsonl: File too large" in errors and errors.count("\n") == 1
    kept = read_records(the_run(tmp_path))
    assert 5 < len(kept) < 96
    assert finished(start(root, tmp_path, "scripted:perfect")) == (0, "")
    after = read_records(the_run(tmp_path))
    assert after[: len(kept)] == kept and len(after) == 96


DIES = """
import os, signal, sys
name, when, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
call, left = getattr(os, name), [count]

def dying(*arguments):
    left[0] -= 1
    if left[0]:
        return call(*arguments)
    if when == "half":
        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
    elif when == "after":
        call(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, name, dying)
import toy
toy.main(*sys.argv[4:])
"""


def test_a_kill_at_any_step_of_writing_is_survived(root, tmp_path):
    assert finished(start(root, tmp_path / "whole")) == (0, "")
    environment = {**os.environ, "PYTHONPATH": f"{root}:{TOY.parent}", "OMP_NUM_THREADS": "1"}
    torn = 0
    # The first writes are those of run.json, the later ones those of records.
    for name, when, count in [
        ("write", "half", 1),
        ("replace", "before", 1),
        ("replace", "after", 1),
        ("write", "half", 5),
        ("fsync", "before", 6),  # of the first record
        ("write", "after", 12),
        ("write", "half", 15),
        ("ftruncate", "before", 2),
        ("ftruncate", "after", 2),
        ("replace", "before", 2),
    ]:
        command = [sys.executable, "-c", DIES, name, when, str(count), str(tmp_path / "killed"), "scripted:perfect"]
        done = subprocess.run([*command, "24", "256,512"], env=environment, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, (name, when, count, done.stderr)
        records = the_run(tmp_path / "killed") / "records.jsonl"
        torn += records.exists() and not records.read_bytes().endswith(b"\n") and records.stat().st_size > 0
    assert torn >= 2
    assert finished(start(root, tmp_path / "killed")) == (0, "")
    whole, killed = (the_run(tmp_path / name) for name in ("whole", "killed"))
    assert timeless(read_records(killed)) == timeless(read_records(whole))
    assert len((killed / "records.jsonl").read_text().splitlines()) == len(read_records(whole))
