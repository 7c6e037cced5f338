"""What a probe writes: `probe.json` says what was probed, `samples.jsonl` has one line a sample, only appended to.

README.md explains every field. Numbers have five significant digits; null stands for what does not exist (a retention
before the needle, a half-life where nothing decays).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalsuite.schema import NewerSchemaError
from evalsuite.store import Warn, read_json, storage, write_json
from gdn2.errors import DataError

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
SETTINGS, SAMPLES = "probe.json", "samples.jsonl"


@dataclass(frozen=True)
class Probe:
    """A probe read back. `settings` is `probe.json`; `samples` are the lines, as they stand in the file."""

    directory: Path
    settings: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]

    @property
    def heads(self) -> list[tuple[str, str, int]]:
        """Layer, mixer and number of each head, in the order of every array's last axis."""
        return [(str(layer), str(mixer), int(head)) for layer, mixer, head in self.settings["heads"]]

    @property
    def model(self) -> str:
        return str(self.settings["model"].get("name"))


def array(values: object) -> np.ndarray[Any, Any]:
    """A nested list of a sample as fp64; null is NaN."""
    import numpy as np

    return np.array(values, dtype=np.float64)


def begin(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write `probe.json`, or see that it is of the same probe. Raises DataError where it is of another."""
    path = directory / SETTINGS
    content = {"version": VERSION, **settings}
    if not path.exists():
        write_json(path, content)
        return
    found = _settings(path)
    for name in ("identity", "heads"):
        if found.get(name) != json.loads(json.dumps(content[name])):
            raise DataError(f"{path} is of another probe, its {name} differs: move it away")


def append(directory: Path, sample: Mapping[str, Any]) -> None:
    """Add one sample; on disk when this returns. Raises StorageError."""
    path = directory / SAMPLES
    line = json.dumps({"version": VERSION, **sample}, ensure_ascii=True, allow_nan=False) + "\n"
    with storage(path), open(path, "ab") as file:
        file.write(line.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())


def repair(directory: Path, warn: Warn) -> None:
    """Cut off a last line that a kill has torn."""
    path = directory / SAMPLES
    if not path.exists():
        return
    with storage(path), open(path, "r+b") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        if whole < file.tell():
            warn(f"{path}: dropped a torn last line; its sample is probed again")
            file.truncate(whole)


def lines(directory: Path, warn: Warn) -> Iterator[dict[str, Any]]:
    """The samples of a probe, one a key; a damaged line is reported and counts as missing."""
    path = directory / SAMPLES
    seen: set[str] = set()
    if not path.exists():
        return
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for number, line in enumerate(file, 1):
                sample = _sample(line)
                if sample is None:
                    warn(f"{path}:{number}: damaged sample counts as missing")
                elif sample["version"] > VERSION:
                    raise NewerSchemaError(f"{path}:{number}: version {sample['version']} is newer than {VERSION}")
                elif sample["key"] not in seen:
                    seen.add(sample["key"])
                    yield sample
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def load(directory: Path, warn: Warn) -> Probe:
    """Read a probe. Raises DataError where there is none, or where it is damaged or of a later version."""
    return Probe(directory, _settings(directory / SETTINGS), list(lines(directory, warn)))


def beside(probe: Probe, warn: Warn) -> list[Probe]:
    """All probes in the directory that holds `probe`, by model, task and length; it is one of them."""
    there = probe.directory.parent
    others = [path.parent for path in there.glob(f"*/{SETTINGS}") if path.parent != probe.directory]
    found = [probe, *(load(path, warn) for path in others)]
    return sorted((p for p in found if p.samples), key=lambda p: (p.model, p.settings["task"], p.settings["length"]))


def _settings(path: Path) -> dict[str, Any]:
    content = read_json(path)
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise NewerSchemaError(f"{path}: version {version} is newer than {VERSION}: update gdn2-eval to read it")
    for name, kind in {"identity": dict, "model": dict, "heads": list, "task": str, "length": int}.items():
        if not isinstance(content.get(name), kind):
            raise DataError(f"cannot read {path}: {name} is missing or not a {kind.__name__}")
    return content


def _sample(line: str) -> dict[str, Any] | None:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(sample, dict) and type(sample.get("version")) is int and isinstance(sample.get("key"), str)
    return sample if good else None
