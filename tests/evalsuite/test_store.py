"""The store: no acknowledged record is lost, none is there twice, whatever happens to the file."""

import dataclasses
import errno
import json
import os
import resource
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from evalsuite import store as store_module
from evalsuite.schema import NewerSchemaError, Record, table, to_line
from evalsuite.store import RunStore, check_writable, read_index, read_json, read_records, write_json
from gdn2.errors import DataError, RunLockedError, StorageError

BY_TYPE = {"integer": 1, "number": 1.0, "string": "c", "boolean": False}
RECORD = Record(**{name: BY_TYPE.get(kind) for name, kind, _ in table() if name != "crc"})
RECORD = dataclasses.replace(RECORD, family="recurrent", score=1.0)


def record(key, metric="match", **changes):
    return dataclasses.replace(RECORD, key=f"{key:032d}", metric=metric, **changes)


def failed(key, text="no answer"):
    return record(key, score=None, error=text)


def opened(directory, warnings=None, rank=0):
    return RunStore(directory, {"checkpoint": "c"}, (warnings if warnings is not None else []).append, rank)


def test_what_is_appended_is_there_again_and_done(tmp_path):
    with opened(tmp_path / "a" / "b") as store:
        store.append([record(1)])
        assert store.index.done(record(1).key) and not store.index.done(record(2).key)
    with opened(tmp_path / "a" / "b") as store:
        assert store.index.done(record(1).key)
        store.append([record(1)])
    assert read_records(tmp_path / "a" / "b") == [record(1)]
    assert (tmp_path / "a" / "b" / "records.jsonl").read_text() == to_line(record(1))


def test_a_sample_counts_only_with_all_its_metrics(tmp_path):
    both = [record(1, "acc", metric_count=2), record(1, "acc_norm", metric_count=2)]
    with opened(tmp_path) as store:
        store.append(both[:1])
        assert not store.index.done(both[0].key)
        store.append(both)
        assert store.index.done(both[0].key)
    assert read_records(tmp_path) == both


def test_an_error_is_asked_again_and_replaced_by_an_answer(tmp_path):
    with opened(tmp_path) as store:
        store.append([failed(1, "first")])
        store.append([failed(1, "second")])
        assert not store.index.done(record(1).key)
        assert [r.error for r in read_records(tmp_path)] == ["second"]
        store.append([record(1)])
        assert store.index.done(record(1).key)
    assert read_records(tmp_path) == [record(1)]


@pytest.mark.parametrize("cut", range(1, len(to_line(RECORD)) + 1, 11))
def test_a_torn_last_line_is_dropped_and_said_so_once(tmp_path, cut):
    line = to_line(record(2))
    (tmp_path / "records.jsonl").write_text(to_line(record(1)) + line[:-cut])
    warnings = []
    with opened(tmp_path, warnings) as store:
        assert store.index.done(record(1).key)
        assert store.index.done(record(2).key) == (cut == 1)  # only its newline is missing
        store.append([record(2)])
    assert len(warnings) == (cut not in (1, len(line)))
    assert all("torn" in w for w in warnings)
    again = []
    with opened(tmp_path, again):
        pass
    assert again == [] and read_records(tmp_path) == [record(1), record(2)]


@pytest.mark.parametrize(
    "damage", [b"garbage\n", b"\xff\xfe\n", to_line(record(5)).encode()[:40] + to_line(record(6)).encode(), b"[]\n"]
)
def test_a_damaged_line_is_reported_by_number_and_its_neighbours_stay(tmp_path, damage):
    path = tmp_path / "records.jsonl"
    path.write_bytes(to_line(record(1)).encode() + damage + to_line(record(2)).encode())
    warnings = []
    assert read_records(tmp_path, warnings.append) == [record(1), record(2)]
    assert len(warnings) == 1 and "records.jsonl:2: damaged" in warnings[0]


def test_marks_of_other_systems_do_no_harm(tmp_path):
    line = to_line(record(1)).encode()
    data = b"\xef\xbb\xbf" + line.replace(b"\n", b"\r\n") + b"\x00" * 64 + to_line(record(2)).encode() + b"\x00" * 64
    (tmp_path / "records.jsonl").write_bytes(data)
    warnings = []
    with opened(tmp_path, warnings) as store:
        store.append([record(3)])
    assert read_records(tmp_path) == [record(1), record(2), record(3)]
    assert len(warnings) == 1 and "torn" in warnings[0]


def test_a_newer_schema_is_refused_and_nothing_is_touched(tmp_path):
    newer = to_line(RECORD).replace('"schema_version": 1', '"schema_version": 3').split(', "crc"')[0] + "}\n"
    path = tmp_path / "records.jsonl"
    path.write_text(newer + "torn")
    with pytest.raises(NewerSchemaError, match=r"records.jsonl:1: schema version 3 is newer"), opened(tmp_path):
        pass
    assert path.read_text() == newer + "torn"
    with pytest.raises(NewerSchemaError):
        read_records(tmp_path)


def test_records_of_another_checkpoint_are_refused_by_name(tmp_path):
    (tmp_path / "records.jsonl").write_text(to_line(record(1, checkpoint="other")))
    with pytest.raises(DataError, match="checkpoint is 'other', not 'c'"), opened(tmp_path):
        pass


def test_an_older_task_version_gives_way_to_a_newer_one(tmp_path):
    with opened(tmp_path) as store:
        store.append([record(1)])
        store.append([record(2, task_version=2)])
        store.append([record(3, task="other")])
    assert [r.key for r in read_records(tmp_path)] == [record(2).key, record(3).key]


def test_ranks_write_files_of_their_own_and_are_read_together(tmp_path):
    with opened(tmp_path) as first, opened(tmp_path, rank=1) as second:
        first.append([record(1)])
        second.append([record(1, latency_s=9.0)])
        second.append([record(2)])
    assert read_records(tmp_path) == [record(1), record(2)]
    with opened(tmp_path) as store:
        assert store.index.done(record(2).key)
    assert read_index(tmp_path).done(record(2).key)


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    with opened(tmp_path), pytest.raises(RunLockedError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
        opened(tmp_path).__enter__()
    with opened(tmp_path):
        pass


def test_a_dead_lock_is_taken_over_here_and_refused_from_elsewhere(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": "999999", "host": socket.gethostname(), "start": "then"}))
    warnings = []
    with opened(tmp_path, warnings):
        pass
    assert len(warnings) == 1 and "999999" in warnings[0] and lock.read_text() == ""
    lock.write_text(json.dumps({"pid": "7", "host": "elsewhere", "start": "then"}))
    with pytest.raises(RunLockedError, match=f"elsewhere.*delete {lock}"), opened(tmp_path):
        pass
    lock.write_text("rubbish")
    with opened(tmp_path):
        pass


def test_a_full_disk_keeps_what_was_there(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        store.append([record(1)])
        before = store.path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
        try:
            with pytest.raises(StorageError, match=r"records.jsonl: File too large \([\d,]+ bytes free\)"):
                store.append([record(2)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.path.read_bytes() == before and not store.index.done(record(2).key)
        store.append([record(2)])
    assert read_records(tmp_path) == [record(1), record(2)]


def test_a_device_without_room_is_one_line(tmp_path):
    with pytest.raises(StorageError, match=r"records.jsonl: No space left on device \("), opened(tmp_path) as store:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, store._descriptor)
        os.close(full)
        store.append([record(1)])


@pytest.mark.parametrize("name", ["records.jsonl", "lock"])
def test_a_link_in_place_of_a_file_is_not_followed(tmp_path, name):
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(other)
    with pytest.raises(StorageError, match="cannot write"), opened(tmp_path / "run"):
        pass
    assert other.read_text() == "precious"


def test_a_run_deleted_under_way_is_not_silent(tmp_path):
    with opened(tmp_path) as store:
        store.path.unlink()
        with pytest.raises(StorageError, match="deleted"):
            store.append([record(1)])


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, call, full)
        with pytest.raises(StorageError, match="No space left on device"):
            write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["run.json"]
    write_json(path, {"a": "\ud800"})
    assert read_json(path) == {"a": "\ud800"}
    path.write_text("{")
    with pytest.raises(DataError, match=str(path)):
        read_json(path)


@pytest.mark.parametrize(
    "path, message",
    [
        ("file/x", "not a directory"),
        ("x" * 300, "longer than"),
        ("a/" + "é" * 200 + "/b", "longer than"),
        ("a\0b", "NUL"),
    ],
)
def test_an_impossible_place_is_refused_before_anything_is_written(tmp_path, path, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=message):
        check_writable(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]
    check_writable(tmp_path / "new" / "run")


class Crashes(RuleBasedStateMachine):
    """A dict is the model; crashes cut the file anywhere behind the last acknowledged byte, or just close it."""

    @initialize()
    def start(self):
        self.place = tempfile.TemporaryDirectory()
        self.directory = Path(self.place.name)
        self.store = opened(self.directory).__enter__()
        self.acknowledged = {}

    @rule(key=st.integers(0, 8), error=st.booleans())
    def append(self, key, error):
        new = failed(key) if error else record(key)
        self.store.append([new])
        if self.acknowledged.get(new.key, failed(0)).error is not None:
            self.acknowledged[new.key] = new

    @rule(key=st.integers(9, 15), cut=st.integers(0, 2000))
    def crash_while_appending(self, key, cut):
        self.store.__exit__(None)
        path = self.directory / "records.jsonl"
        line = to_line(record(key)).encode()
        with path.open("ab") as file:
            file.write(line[: cut % len(line)])
        self.store = opened(self.directory).__enter__()
        if cut % len(line) == len(line) - 1:
            self.acknowledged.setdefault(record(key).key, record(key))

    @rule()
    def reopen(self):
        self.store.__exit__(None)
        self.store = opened(self.directory).__enter__()

    @invariant()
    def nothing_lost_nothing_twice(self):
        read = read_records(self.directory)
        assert {r.key: r for r in read} == self.acknowledged and len(read) == len(self.acknowledged)
        for r in read:
            assert self.store.index.done(r.key) == (r.error is None)

    def teardown(self):
        self.store.__exit__(None)
        self.place.cleanup()


Crashes.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
test_crashes = Crashes.TestCase


def test_records_are_synced_at_once_but_not_each_of_a_burst(tmp_path, monkeypatch):
    calls, clock = [], [100.0]
    for name in ("write", "fsync"):
        call = getattr(os, name)
        monkeypatch.setattr(store_module.os, name, lambda *a, name=name, call=call: (calls.append(name), call(*a))[1])

    def sync(descriptor):
        calls.append("fsync")
        clock[0] += 1.0

    with opened(tmp_path) as store:
        monkeypatch.setattr(store_module.os, "fsync", sync)
        monkeypatch.setattr(store_module.time, "monotonic", lambda: clock[0])
        calls.clear()
        store.append([record(1), record(2)])
        assert calls == ["write", "fsync"]  # took a second: the next one is ten seconds away
        store.append([record(1)])
        store.append([record(3)])
        assert calls == ["write", "fsync", "write"]
        clock[0] += 10.0
        store.append([record(4)])
        assert calls[3:] == ["write", "fsync"]
        store.append([record(5)])
        store.sync()
        store.sync()
        assert calls[5:] == ["write", "fsync"]
        store.append([record(6)])
    assert calls[7:] == ["write", "fsync"]


def test_a_write_in_pieces_is_whole_and_a_sync_that_fails_is_said(tmp_path, monkeypatch):
    write = os.write
    with opened(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store_module.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
            store.append([record(1)])
        with monkeypatch.context() as patch:
            patch.setattr(store_module.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O")))
            store.append([record(2)])
            with pytest.raises(StorageError, match="I/O"):
                store.sync()
        store.append([record(3)])
    assert read_records(tmp_path) == [record(1), record(2), record(3)]


def test_reading_grows_with_the_records_and_the_index_stays_small(tmp_path):
    import tracemalloc

    path = tmp_path / "records.jsonl"

    def indexed(n):
        path.write_text("".join(to_line(record(i, output="x" * 500)) for i in range(n)))
        tracemalloc.start()
        index = read_index(tmp_path)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert index.done(record(n - 1).key)
        return held, peak

    (small, _), (large, peak) = indexed(1000), indexed(4000)
    assert large / 4000 < 400 and large < 6 * small and peak < large + 500_000
