"""Records to a tidy frame: columns, duplicates, errors, damage, speed and memory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from evalsuite import schema
from evalsuite.reports import frame
from evalsuite.schema import Record, to_line
from evalsuite.store import read_records
from gdn2.errors import DataError


@pytest.fixture
def rows(synthetic):
    return list(synthetic.records(synthetic.MODELS[0]))


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(to_line, records)), encoding="ascii")
    return path


def test_every_column_of_the_record_is_declared():
    # The rest of a record only matters while it is read.
    unread = {"schema_version", "metric_count"}
    assert {f.name for f in dataclasses.fields(Record)} == frame.COLUMNS.keys() | frame.TEXTS.keys() | unread


def test_columns_have_the_declared_kinds(rows):
    made = frame.from_rows(map(dataclasses.asdict, rows), texts=True).frame
    assert list(made.columns) == [*frame.COLUMNS, *frame.TEXTS]
    kinds = {"category": "category", "int": "int64", "float": "float64", "bool": "bool", "text": "str"}
    for name, kind in (frame.COLUMNS | frame.TEXTS).items():
        found = str(made[name].dtype)
        assert found.startswith("datetime64") if kind == "time" else found == kinds[kind], name
    assert len(made) == len(rows)
    first = made.iloc[0]
    assert (first["task"], first["length"], first["target"]) == ("niah_single_1", 1024, "1000000")


def test_files_and_rows_give_the_same_frame(rows, tmp_path):
    write(tmp_path / "records.jsonl", rows)
    read = frame.load([tmp_path])
    given = frame.from_rows(map(dataclasses.asdict, rows))
    assert read.frame.equals(given.frame)
    assert read.warnings == ()


def test_absent_values_are_zero_or_missing(rows):
    none = dataclasses.replace(rows[0], length=None, depth=None, logprob=None)
    made = frame.from_rows([dataclasses.asdict(none)]).frame.iloc[0]
    assert made["length"] == 0
    assert made[["depth", "logprob"]].isna().all()


def test_a_run_a_results_directory_and_a_file_are_all_read(rows, tmp_path):
    half = len(rows) // 2
    write(tmp_path / "runs" / "a" / "records.jsonl", rows[:half])
    write(tmp_path / "runs" / "b" / "records.jsonl", rows[half:-5])
    write(tmp_path / "runs" / "b" / "records.1.jsonl", rows[-5:])
    whole = frame.load([tmp_path]).frame
    assert len(whole) == len(rows)
    assert frame.load([tmp_path / "runs"]).frame.equals(whole)
    assert len(frame.load([tmp_path / "runs" / "b"]).frame) == len(rows) - half
    assert len(frame.load([tmp_path / "runs" / "b" / "records.1.jsonl"]).frame) == 5


def test_half_a_surrogate_pair_is_kept_as_its_escape(rows):
    odd = dataclasses.replace(rows[0], model="\ud800", output="\udc00", outcome="")
    made = frame.from_rows([dataclasses.asdict(odd)], texts=True).frame.iloc[0]
    assert (made["model"], made["output"], made["error"]) == ("\\ud800", "\\udc00", "")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_place_without_records_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"no records at '{name}': give"):
        frame.load([Path(name)])


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_an_impossible_path_is_one_line(name):
    with pytest.raises(DataError, match="^cannot read .{1,150}$|^no records at .{1,150}$"):
        frame.load([Path(name)])


def test_duplicates_are_dropped_by_key_and_metric(rows, tmp_path):
    other = dataclasses.replace(rows[0], metric="exact_match", score=0.0)
    write(tmp_path / "a" / "records.jsonl", rows)
    write(tmp_path / "b" / "records.jsonl", [dataclasses.replace(rows[0], score=0.25), rows[1], other])
    made = frame.load([tmp_path / "a", tmp_path / "b"]).frame
    assert len(made) == len(rows) + 1
    assert made.loc[made["key"] == rows[0].key, "score"].tolist() == [rows[0].score, 0.0]


def test_errors_are_kept_apart_until_answered(rows, tmp_path):
    failed = [dataclasses.replace(r, score=None, error=f"out of memory {i}") for i, r in enumerate(rows[:3])]
    again = dataclasses.replace(failed[0], error="out of memory again")
    write(tmp_path / "records.jsonl", [*failed, again, *rows[1:]])
    made = frame.load([tmp_path])
    assert len(made.frame) == len(rows) - 1
    assert made.errors["error"].tolist() == ["out of memory again"]
    assert made.errors["key"].tolist() == [rows[0].key]


def test_frame_agrees_with_the_store(rows, tmp_path):
    older = [dataclasses.replace(r, task_version=0, key="0" * 31 + str(i)) for i, r in enumerate(rows[:4])]
    failed = dataclasses.replace(rows[5], score=None, error="x")
    write(tmp_path / "records.jsonl", [*older, failed, *rows, rows[2]])
    made, stored = frame.load([tmp_path]), read_records(tmp_path)
    assert sorted(made.frame["key"]) == sorted(r.key for r in stored)
    assert len(made.errors) == 0


def test_damaged_lines_are_named_and_left_out(rows, tmp_path):
    lines = [to_line(r) for r in rows]
    lines[3] = lines[3].replace('"score": 1.0', '"score": 0.0')
    lines[7] = lines[7][:100] + "\n"
    lines[9] = "[1, 2]\n"
    path = tmp_path / "records.jsonl"
    path.write_text("\n" + "".join(lines) + to_line(rows[0])[:50], encoding="ascii")
    made = frame.load([tmp_path])
    assert len(made.frame) == len(rows) - 3
    assert [w.split(":")[1] for w in made.warnings] == ["5", "9", "11", str(len(lines) + 2)]
    assert "checksum" in made.warnings[0]


def test_a_newer_version_is_refused(rows, tmp_path):
    path = write(tmp_path / "records.jsonl", rows[:2])
    path.write_text(path.read_text() + '{"schema_version": 99}\n')
    with pytest.raises(schema.NewerSchemaError, match=r"records.jsonl:3: .*99"):
        frame.load([path])


def test_a_number_out_of_range_is_one_line(rows, tmp_path):
    write(tmp_path / "records.jsonl", [dataclasses.replace(rows[0], params=10**30)])
    with pytest.raises(DataError, match="out of range"):
        frame.load([tmp_path])


@pytest.mark.parametrize(
    ("n", "seconds", "megabytes"), [(50_000, 4, 600), pytest.param(1_000_000, 20, 2000, marks=pytest.mark.slow)]
)
def test_many_records_are_read_fast_in_little_memory(synthetic, tmp_path, root, n, seconds, megabytes):
    synthetic.big(tmp_path / "records.jsonl", n)
    code = (
        "import re, sys, time; from pathlib import Path; import pandas; from evalsuite.reports import frame\n"
        "start = time.process_time(); made = frame.load([Path(sys.argv[1])])\n"
        # Not ru_maxrss: a child's begins at its parent's.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "print(len(made.frame), time.process_time() - start, peak)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=True)
    found, took, peak = done.stdout.split()
    assert int(found) == n
    assert float(took) < seconds
    assert int(peak) / 1000 < megabytes
