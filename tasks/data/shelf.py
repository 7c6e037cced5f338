"""The data directory: one file a data set, and `manifest.json`, which says of each file what it is and where from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from gdn2 import env
from gdn2.errors import DataError
from tasks.data import fetch
from tasks.data.spec import Dataset, Row

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Located:
    """A file of the data directory, whole and unchanged."""

    path: Path
    digest: str  # sha256 of its bytes
    records: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What the manifest says of one file."""

    sha256: str
    bytes: int
    records: int | None  # None for a file that has none, such as a tokenizer
    expected: int | None  # records of the complete set
    source: str
    licence: str
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def folder() -> Path:
    """The data directory: $GDN2_DATA (which `--data` sets), else the cache."""
    return env.data_dir()


def manifest(home: Path) -> dict[str, Entry]:
    """Relative path to entry; empty where there is no manifest. Raises DataError for a damaged one."""
    path = home / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise DataError(f"{path}: version {content['version']!r:.40} is not {VERSION}: update gdn2-eval to read it")
        found = {name: Entry(**entry) for name, entry in content["files"].items()}
        if odd := [name for name, entry in found.items() if not _well_typed(entry)]:
            raise DataError(f"cannot read {path}: what it says of {odd[0][:60]} is not what we write there")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def _well_typed(entry: Entry) -> bool:
    counts = (entry.records, entry.expected)
    texts = (entry.sha256, entry.source, entry.licence, entry.created_at)
    return (
        type(entry.bytes) is int and all(n is None or type(n) is int for n in counts) and set(map(type, texts)) == {str}
    )


def keep(home: Path, files: Mapping[str, bytes], entries: dict[str, Entry]) -> None:
    """Write `files`, then what the manifest says of them. Raises StorageError."""
    for name, data in files.items():
        fetch.keep(home / name, data)
    known = manifest(home) | entries
    content = {"version": VERSION, "files": {name: asdict(known[name]) for name in sorted(known)}}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # A file's name may hold half a surrogate pair, which JSON spells as an escape.
    fetch.keep(home / MANIFEST, text.encode("utf-8", "backslashreplace") + b"\n")


def store(home: Path, dataset: Dataset, made: Sequence[Row], source: str) -> Entry:
    """Keep rows that conform as the file of `dataset`."""
    data = to_lines(made)
    entry = entry_of(data, source, dataset.licence, len(made), dataset.records)
    keep(home, {dataset.file: data}, {dataset.file: entry})
    return entry


def entry_of(
    data: bytes, source: str, licence: str, records: int | None = None, expected: int | None = None
) -> Entry:
    """The manifest's entry of a file with content `data`."""
    return Entry(sha256(data).hexdigest(), len(data), records, expected, source, licence)


def to_lines(made: Iterable[Row]) -> bytes:
    """Rows as the bytes of a file: equal rows give equal bytes, whatever they came from."""
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in made).encode("ascii")


def locate(dataset: Dataset) -> Located:
    """The file of `dataset`.

    Raises:
        DataError: it is not there, or not as it was kept; names the command that brings it.
    """
    return _opened(dataset)[0]


def rows(dataset: Dataset) -> tuple[dict[str, Any], ...]:
    """The examples of `dataset`, in order. Raises as `locate` does."""
    return _opened(dataset)[1]


def digest(dataset: Dataset) -> str:
    """sha256 of the file of `dataset`. Raises as `locate` does."""
    return locate(dataset).digest


def how(name: str, home: Path, own: bool = True) -> str:
    """The commands that bring `name` into `home`; `own` where a user's copy may serve."""
    to = "" if home == env.cache_dir() else f" --to {home}"
    text = f"`gdn2-eval data fetch {name}{to}` brings them"
    return text + (f", `gdn2-eval data import {name} FILE{to}` takes your own copy" if own else "")


def _opened(dataset: Dataset) -> tuple[Located, tuple[dict[str, Any], ...]]:
    home = folder()
    path = home / dataset.file
    entry = manifest(home).get(dataset.file)
    if entry is None or not path.is_file():
        raise DataError(f"the data of {dataset.name} are not in {home}: {how(dataset.name, home)}")
    state = path.stat()
    return _parsed(path, entry.sha256, dataset.name, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=16)
def _parsed(
    path: Path, expected: str, name: str, state: tuple[int, int]
) -> tuple[Located, tuple[dict[str, Any], ...]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if (found := sha256(data).hexdigest()) != expected:
        raise DataError(
            f"{path} has changed since it was kept (sha256 {found[:12]}, not {expected[:12]}): {how(name, path.parent)}"
        )
    made = tuple(json.loads(line) for line in data.splitlines())
    return Located(path, found, len(made)), made
