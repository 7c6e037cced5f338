"""Records to a tidy table: one row for one metric of one sample, with declared columns.

Repeated texts are categories and long ones are left out unless asked for, so a million records fit in a few hundred
megabytes. Records with an error are kept apart: they have no score, but a table says that they are missing. Those of a
metric made from all samples together have no score either, but an `item`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evalsuite import runfile, schema, store
from evalsuite.names import quoted
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["category", "int", "float", "bool", "time", "text"]

# 0 stands for no length; a missing float is NaN.
COLUMNS: dict[str, Kind] = {
    "run_id": "category",
    "key": "text",
    "model": "category",
    "mixer": "category",
    "family": "category",
    "params": "int",
    "checkpoint": "category",
    "task": "category",
    "task_version": "int",
    "protocol": "category",
    "length": "int",
    "sample_id": "category",
    "seed": "int",
    "data": "category",
    "metric": "category",
    "score": "float",
    "weight": "float",
    "prompt_tokens": "int",
    "truncated_tokens": "int",
    "depth": "float",
    "output_tokens": "int",
    "outcome": "category",
    "logprob": "float",
    "decided_early": "bool",
    "error": "category",
    "latency_s": "float",
    "created_at": "time",
    "aggregation": "category",  # "" for a score of its own
    "item": "category",
}
TEXTS: dict[str, Kind] = {"target": "text", "output": "text"}

_CHUNK = 256  # lines parsed at once: few enough for their objects to stay in the cache
_CRC_TAIL = len(', "crc": "01234567"}\n')


@dataclass(frozen=True, slots=True)
class Records:
    """What reports are made of.

    `frame` and `errors` have the columns of `COLUMNS` (and `TEXTS` where asked for); each (key, metric) occurs once in
    the two together. `runs` holds each run's run.json (`evalsuite.runfile`) by run id; `warnings` names damaged lines.
    """

    frame: pd.DataFrame
    errors: pd.DataFrame
    runs: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...] = ()


class _Codes(dict[object, int]):
    """Numbers the values it is asked for, in order of first appearance."""

    def __missing__(self, value: object) -> int:
        code = self[value] = len(self)
        return code


class _Builder:
    """Collects columns chunk by chunk, as arrays."""

    def __init__(self, texts: bool | Sequence[str]) -> None:
        kept = TEXTS if texts is True else {name: TEXTS[name] for name in texts or ()}
        self.columns: dict[str, Kind] = COLUMNS | kept
        self.codes = {name: _Codes() for name, kind in self.columns.items() if kind == "category"}
        self.chunks: dict[str, list[Any]] = {name: [] for name in self.columns}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append all `rows` or none: KeyError, TypeError, ValueError or OverflowError for a bad one."""
        if not rows:
            return
        columns = zip(*map(itemgetter(*self.columns), rows), strict=True)
        made = [self._column(name, values) for name, values in zip(self.columns, columns, strict=True)]
        for name, chunk in zip(self.columns, made, strict=True):
            self.chunks[name].append(chunk)

    def _column(self, name: str, values: tuple[Any, ...]) -> Any:
        kind = self.columns[name]
        if kind == "category":
            return np.fromiter(map(self.codes[name].__getitem__, values), dtype=np.int32, count=len(values))
        if kind == "int":
            return np.asarray([value or 0 for value in values], dtype=np.int64)
        return values if kind in ("text", "time") else np.asarray(values, dtype=kind)

    def frame(self) -> pd.DataFrame:
        """All rows so far. The builder is empty afterwards."""
        import pandas as pd

        made: dict[str, Any] = {}
        for name, kind in self.columns.items():
            chunks = self.chunks.pop(name)
            if kind in ("text", "time"):
                joined = [value for chunk in chunks for value in chunk]
                made[name] = (
                    pd.Series(list(map(_storable, joined)), dtype="str")
                    if kind == "text"
                    else pd.to_datetime(joined, utc=True, format="ISO8601", errors="coerce")
                )
            else:
                array = np.concatenate(chunks) if chunks else np.empty(0, dtype=_empty(kind))
                made[name] = array if kind != "category" else self._categorical(name, array)
        return pd.DataFrame(made, copy=False)

    def _categorical(self, name: str, codes: Any) -> pd.Categorical:
        import pandas as pd

        texts = [_storable(value) for value in self.codes[name]]
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        merged = np.asarray([places[text] for text in texts], dtype=np.int32)[codes]
        return pd.Categorical.from_codes(merged, categories=pd.Index(list(places), dtype="str"))


def _storable(value: object) -> str:
    """`value` as a text that UTF-8 can hold: a model may write half a surrogate pair."""
    text = "" if value is None else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _empty(kind: Kind) -> str:
    return {"category": "int32", "int": "int64", "bool": "bool"}.get(kind, "float64")


def from_rows(rows: Iterable[Mapping[str, Any]], texts: bool | Sequence[str] = False) -> Records:
    """Records given as mappings with the columns of `evalsuite.schema.Record`."""
    builder = _Builder(texts)
    builder.add(list(rows))
    return _finish(builder, {}, [])


def load(paths: Sequence[Path], texts: bool | Sequence[str] = False) -> Records:
    """Read the records below `paths`: run directories, a results directory that holds `runs/`, or .jsonl files.

    `texts` keeps targets and outputs, or those of the two it names. Damaged lines are left out and named in `warnings`;
    of records with one (key, metric) the first without an error counts.

    Raises:
        DataError: there are no records, or a file cannot be read.
        evalsuite.schema.NewerSchemaError: a later version wrote them.
    """
    builder, warnings = _Builder(texts), list[str]()
    runs: dict[str, Mapping[str, Any]] = {}
    for run in (run for path in paths for run in expand(path)):
        files = [run] if run.is_file() else store.record_files(run)
        if (run / runfile.NAME).is_file():
            runs[run.name] = runfile.read(run)
        for file in files:
            _read(file, builder, warnings)
    return _finish(builder, runs, warnings)


def expand(path: Path) -> list[Path]:
    """The run directories and record files that `path` stands for, sorted. Raises DataError where there are none."""
    try:
        if path.is_file() or store.record_files(path):
            return [path]
        below = path / "runs" if (path / "runs").is_dir() else path
        if path.is_dir() and (found := sorted(p for p in below.iterdir() if p.is_dir() and store.record_files(p))):
            return found
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {quoted(path)}: {getattr(error, 'strerror', None) or error}") from None
    raise DataError(f"no records at {quoted(path)}: give a run, a results directory or a .jsonl file")


def _read(path: Path, builder: _Builder, warnings: list[str]) -> None:
    try:
        with open(path, "rb") as file:
            number = 1
            while lines := list(islice(file, _CHUNK)):
                try:
                    builder.add(_parse(lines))
                except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
                    builder.add(list(_parse_slowly(lines, f"{path}:", number, warnings)))
                number += len(lines)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except OverflowError:
        raise DataError(f"{path}:{number}: a number in this line or one of the next {_CHUNK} is out of range") from None


def _parse(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Whole lines of these versions, whose checksums vouch for what `schema.check` saw when they were written.

    Raises ValueError, or whatever a damaged line leads to, where one is anything else.
    """
    if any(int(line[-11:-3], 16) != zlib.crc32(line[:-_CRC_TAIL]) for line in lines):
        raise ValueError("a checksum does not fit its line")
    # One document, so that the rows share their column names.
    rows: list[dict[str, Any]] = json.loads(b"[" + b",".join(lines) + b"]")
    if len(rows) != len(lines):
        raise ValueError("a line is not one record")
    for row in rows:
        if row["schema_version"] == schema.PLAIN:
            row["aggregation"] = row["item"] = None
        elif row["schema_version"] != schema.SCHEMA_VERSION:
            raise ValueError("a line is not one record of this version")
    return rows


def _parse_slowly(lines: list[bytes], place: str, first: int, warnings: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, first):
        if not line.strip(b"\x00 \t\r\n"):
            continue
        try:
            yield asdict(schema.from_line(line.decode("utf-8", "replace")))
        except schema.NewerSchemaError as error:
            raise schema.NewerSchemaError(f"{place}{number}: {error}") from None
        except DataError as error:
            warnings.append(f"{place}{number}: damaged record is left out: {error}")


def _finish(builder: _Builder, runs: Mapping[str, Mapping[str, Any]], warnings: list[str]) -> Records:
    """Drop duplicates and superseded task versions, and part scores from errors."""
    frame = builder.frame()
    newest = frame.groupby(["run_id", "task"], observed=True)["task_version"].transform("max")
    frame = frame[frame["task_version"] == newest]
    failed = frame["score"].isna() & (frame["item"] == "")
    scores = frame[~failed].drop_duplicates(["key", "metric"], ignore_index=True)
    errors = frame[failed].drop_duplicates(["key", "metric"], keep="last")
    if len(errors):
        import pandas as pd

        answered = pd.MultiIndex.from_frame(scores[["key", "metric"]].astype("str"))
        asked = pd.MultiIndex.from_frame(errors[["key", "metric"]].astype("str"))
        errors = errors[~asked.isin(answered)]
    return Records(scores, errors.reset_index(drop=True), runs, tuple(warnings))
