"""The same run wherever it is made: another locale, another time zone, another umask, names in any script."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from evalsuite.store import read_records

ODD = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kathmandu"}
TEXT = "Το ποτάμι κυλά. 河水流过古镇。 Река течёт мимо. The river runs by. " * 120


def command(root: Path, where: Path, out: str, **environment: str) -> subprocess.CompletedProcess:
    (where / "текст").mkdir(exist_ok=True)
    (where / "текст" / "河.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["run", "--model", "scripted:last", "--tasks", "niah_single_2", "--lengths", "1k", "--samples", "2"]
    return subprocess.run(
        [sys.executable, str(root / "cli.py"), *arguments, "--haystack", "текст/河.txt", "--out", out],
        cwd=where, env={**os.environ, **environment}, capture_output=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(root, tmp_path_factory):
    """One run here and one elsewhere: the process, and the directory of the run."""
    where = tmp_path_factory.mktemp("anywhere")
    made = {}
    for out, environment in (("plain", {}), ("där", ODD)):
        done = command(root, where, out, **environment)
        assert done.returncode == 0, done.stderr
        (directory,) = (where / out / "runs").iterdir()
        made[out] = done, directory
    return made


def test_the_records_are_the_same_but_for_when_they_were_made(both):
    here, there = (read_records(directory) for _, directory in both.values())
    unlike = {"created_at", "latency_s"}
    for one, other in zip(here, there, strict=True):
        differ = {name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)}
        assert differ <= unlike
    assert both["plain"][1].name == both["där"][1].name
    assert len({record.key for record in here}) == 2


def test_times_are_utc_whatever_the_clock_on_the_wall_says(both):
    for _, directory in both.values():
        for record in read_records(directory):
            made = datetime.fromisoformat(record.created_at)
            assert made.utcoffset() == timedelta(0) and abs(datetime.now(UTC) - made) < timedelta(minutes=10)
        run = json.loads((directory / "run.json").read_bytes())
        assert run["invocations"][0]["started_at"].endswith("+00:00")


def test_files_are_ascii_and_names_in_any_script_survive(both):
    for _, directory in both.values():
        for file in directory.iterdir():
            assert file.read_bytes().isascii(), file
    passed = [
        json.loads((directory / "run.json").read_bytes())["invocations"][0]["passed"] for _, directory in both.values()
    ]
    assert passed[0]["haystack"] == "текст/河.txt"
    # Where the locale has no such letters a name is its bytes.
    assert passed[1]["haystack"].encode("utf-8", "surrogateescape").decode() == "текст/河.txt"


def test_what_a_terminal_cannot_show_is_left_out(both, root, tmp_path):
    done, directory = both["där"]
    assert b"Traceback" not in done.stderr and done.stdout.isascii()
    shown = subprocess.run(
        [sys.executable, str(root / "cli.py"), "show", str(directory)],
        cwd=tmp_path, env={**os.environ, **ODD}, capture_output=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0 and shown.stdout.isascii() and b"last.passed.haystack" in shown.stdout


def test_a_mistake_is_one_line_in_any_locale(root, tmp_path):
    done = subprocess.run(
        [sys.executable, str(root / "cli.py"), "run", "--model", "scripted:last", "--tasks", "ниях"],
        cwd=tmp_path, env={**os.environ, **ODD}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"error: no task or suite")
    assert not list(tmp_path.iterdir())
