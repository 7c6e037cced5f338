"""The records of a run on disk: append-only, one writer a file, safe to kill at any moment.

A run directory holds `records.jsonl` (rank 0; `records.<rank>.jsonl` for the others), `run.json` and `lock`.
What `append` has returned from survives a kill, what `sync` has returned from a crash of the machine. A line that was
torn is cut off on the next opening; any other damaged line is reported and counts as missing, so that its sample is
asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from evalsuite.schema import NewerSchemaError, Record, from_line, to_line
from gdn2.errors import DataError, RunLockedError, StorageError

SYNC_SHARE = 0.1  # of the time, at most, goes into syncing records

Warn = Callable[[str], None]


def now() -> str:
    """The time as records hold it: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat()


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal below into one line that names `path` and the free bytes."""
    try:
        yield
    except OSError as error:
        there = next((p for p in (path, *path.parents) if os.path.exists(p)), Path("/"))
        free = f"{shutil.disk_usage(there).free:,} bytes free"
        raise StorageError(f"cannot write {path}: {error.strerror or error} ({free})") from error


def check_writable(directory: Path) -> None:
    """Raise StorageError where `directory` could not be made or written to. Writes nothing."""
    if "\x00" in str(directory):
        raise StorageError(f"cannot write {directory!s}: the path holds a NUL character")
    there, missing = directory, []
    while not os.path.exists(there):
        missing.append(there.name)
        there = there.parent
    if not there.is_dir():
        raise StorageError(f"cannot write {directory}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {directory}: no permission to write in {there}")
    with storage(directory):
        longest = os.pathconf(there, "PC_NAME_MAX")
    if too_long := [name for name in missing if len(os.fsencode(name)) > longest]:
        raise StorageError(f"cannot write {directory}: the name {too_long[0][:40]}... is longer than {longest} bytes")


def write_json(path: Path, content: object) -> None:
    """Replace `path` by `content`, as `write_file` does."""
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii"))


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content` at once or not at all: temporary file beside it, fsync, rename, fsync of both."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            try:
                _write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            _sync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def read_json(path: Path) -> dict[str, object]:
    """Read what `write_json` wrote. Raises DataError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text("ascii"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"cannot read {path}: not a JSON object")
    return content


def scan(path: Path, warn: Warn) -> Iterator[Record]:
    """Yield the good records of one file; report every damaged line with its number. Memory is one line.

    Raises NewerSchemaError for a record of a later version, DataError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8", "replace")
                if not text.strip("\x00\ufeff \t\r\n"):
                    if "\x00" in text and line.endswith(b"\n"):
                        warn(f"{path}:{number}: a block of NUL bytes is skipped")
                    continue
                try:
                    yield from_line(text)
                except NewerSchemaError as error:
                    raise NewerSchemaError(f"{path}:{number}: {error}") from None
                except DataError as error:
                    if line.endswith(b"\n"):
                        warn(f"{path}:{number}: damaged record counts as missing: {error}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def record_files(directory: Path) -> list[Path]:
    """The record files of a run, rank 0 first."""
    return sorted(directory.glob("records*.jsonl"), key=lambda p: (len(p.name), p.name))


def read_records(directory: Path, warn: Warn = lambda _: None) -> list[Record]:
    """Every record of a run, once each: the first without error of a (key, metric), else the last with one.

    A record of an older version of its task is left out where the run holds a newer one.
    """
    chosen: dict[tuple[str, str], Record] = {}
    versions: dict[str, int] = {}
    for path in record_files(directory):
        for record in scan(path, warn):
            known = chosen.get((record.key, record.metric))
            if known is None or known.error is not None:
                chosen[record.key, record.metric] = record
            versions[record.task] = max(record.task_version, versions.get(record.task, 0))
    return [record for record in chosen.values() if record.task_version == versions[record.task]]


class Index:
    """Which samples are answered: the metrics stored without error, by key. About 200 bytes a sample."""

    def __init__(self) -> None:
        self._metrics: dict[str, tuple[str, ...]] = {}
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._expected: dict[str, int] = {}

    def add(self, record: Record) -> None:
        if record.error is not None or self.has(record):
            return
        metrics = (*self._metrics.get(record.key, ()), record.metric)
        # One tuple serves all samples with the same metrics.
        self._metrics[record.key] = self._shared.setdefault(metrics, metrics)
        if record.metric_count > 1:
            self._expected[record.key] = record.metric_count

    def has(self, record: Record) -> bool:
        """Whether this metric of this sample is stored without error."""
        return record.metric in self._metrics.get(record.key, ())

    def done(self, key: str) -> bool:
        """Whether every metric of the sample `key` is stored without error."""
        return len(self._metrics.get(key, ())) >= self._expected.get(key, 1)


def read_index(directory: Path, warn: Warn = lambda _: None) -> Index:
    """What a run holds, without locking, repairing or writing anything."""
    index = Index()
    for path in record_files(directory):
        for record in scan(path, warn):
            index.add(record)
    return index


class RunStore:
    """The one writer of a run directory's file for `rank`. A context manager: entering locks, repairs and reads.

    Args:
        directory: made if missing.
        identity: columns that every record of the run shares; a stored record that differs is refused.
        warn: told of repairs and damaged lines, one line each.
    """

    def __init__(self, directory: Path, identity: Mapping[str, object], warn: Warn, rank: int = 0) -> None:
        self.directory = directory
        self.path = directory / (f"records.{rank}.jsonl" if rank else "records.jsonl")
        self._lock_path = directory / (f"lock.{rank}" if rank else "lock")
        self._identity = identity
        self._warn = warn
        self._descriptor = self._lock = -1
        self._synced = True
        self._next_sync = 0.0
        self.index = Index()

    def __enter__(self) -> RunStore:
        with storage(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._lock_path, self._warn)
        try:
            with storage(self.path):
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
                self._descriptor = os.open(self.path, flags, 0o666)
            self._read()
            with storage(self.path):
                self._repair()
                _sync_directory(self.directory)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.sync()
        finally:
            self._close()

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one sample; those already there are left out.

        A kill of the process cannot lose them from here on. A crash of the machine cannot once they are synced: at
        once, except in a burst, where syncing each would take most of the time; there the next one or `sync` does.
        Raises StorageError; the file then ends where it ended before.
        """
        new = [r for r in records if not self.index.has(r)]
        if not new:
            return
        data = "".join(map(to_line, new)).encode("ascii")
        with storage(self.path):
            before = os.fstat(self._descriptor)
            if before.st_nlink == 0:
                raise StorageError(f"cannot write {self.path}: it was deleted while the run was going")
            try:
                _write_all(self._descriptor, data)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, before.st_size)
                raise
        for record in new:
            self.index.add(record)
        self._synced = False
        if time.monotonic() >= self._next_sync:
            self.sync()

    def sync(self) -> None:
        """Return when everything appended is on disk. Raises StorageError."""
        if self._synced:
            return
        start = time.monotonic()
        with storage(self.path):
            os.fsync(self._descriptor)
        end = time.monotonic()
        self._synced = True
        self._next_sync = end + (end - start) / SYNC_SHARE

    def _read(self) -> None:
        for path in record_files(self.directory):
            for record in scan(path, self._warn):
                for name, value in self._identity.items():
                    if getattr(record, name) != value:
                        raise DataError(
                            f"{path} holds a record whose {name} is {getattr(record, name)!r:.80}, "
                            f"not {value!r:.80}: move it away, runs are never mixed"
                        )
                self.index.add(record)

    def _repair(self) -> None:
        """Give the file a whole last line: cut off a torn one, end a whole one that lacks its newline."""
        size = os.fstat(self._descriptor).st_size
        start = _last_line(self._descriptor, size)
        tail = os.pread(self._descriptor, size - start, start)
        if not tail:
            return
        try:
            from_line(tail.decode("utf-8", "replace"))
        except DataError:
            os.ftruncate(self._descriptor, start)
            self._warn(f"{self.path}: dropped a torn last line of {len(tail)} bytes; its sample is asked again")
        else:
            _write_all(self._descriptor, b"\n")
        os.fsync(self._descriptor)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._lock >= 0:
            # Emptied, not removed: a second process may already hold the same file open.
            with suppress(OSError):
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
        self._descriptor = self._lock = -1


def _lock(path: Path, warn: Warn) -> int:
    """Open and lock `path`, and write who holds it. Raises RunLockedError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor) or {"pid": "unknown", "host": "this host", "start": "an unknown time"}
            raise RunLockedError(
                f"{path.parent} is in use by process {holder['pid']} on {holder['host']} since {holder['start']}: "
                "wait for it or stop it"
            ) from None
        if stale := _holder(descriptor):
            # flock says nothing about other hosts on some network file systems.
            if stale["host"] != socket.gethostname():
                raise RunLockedError(
                    f"{path.parent} was in use by process {stale['pid']} on {stale['host']} since {stale['start']}: "
                    f"if that process is gone, delete {path}"
                )
            warn(f"{path.parent}: process {stale['pid']}, started {stale['start']}, ended without closing; taking over")
        info = {"pid": str(os.getpid()), "host": socket.gethostname(), "start": now()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(info).encode("ascii"), 0)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(directory: Path, warn: Warn) -> Iterator[None]:
    """Make `directory` and hold it against other processes. Raises RunLockedError."""
    with storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(directory / "lock", warn)
    try:
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def in_use(directory: Path) -> bool:
    """Whether a process of this host holds the run."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, str] | None:
    try:
        info = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return None
    if not isinstance(info, dict):
        return None
    return {name: str(info.get(name, "unknown"))[:100] for name in ("pid", "host", "start")}


def _last_line(descriptor: int, size: int) -> int:
    """Offset behind the last newline."""
    end = size
    while end > 0:
        start = max(0, end - (1 << 16))
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
