"""The record: one line of JSON for one metric of one sample, written once and never edited.

`Record` is the schema; `table()` is its documentation, made from the same annotations. A line ends with the CRC-32 of
what precedes it, so that a damaged line is told from a good one in any version. A record is written in the lowest
version that holds it: version 2 adds the columns of a metric that is made from all samples together.
"""

from __future__ import annotations

import json
import math
import re
import types
import zlib
from dataclasses import dataclass, fields
from typing import Annotated, NoReturn, get_args, get_origin, get_type_hints

from gdn2.errors import DataError

SCHEMA_VERSION = 2
PLAIN = 1  # version of a record whose score is its own
FAMILIES = ("recurrent", "hybrid", "transformer", "other")

_MAX_LINE = 1 << 26
_CRC = re.compile(r', "crc": "([0-9a-f]{8})"\}\Z')


class NewerSchemaError(DataError):
    """A record of a later version of this program: refused, because guessing at its meaning would be worse."""


@dataclass(frozen=True, slots=True)
class Record:
    """One metric of one sample. (`key`, `metric`) names it; exactly one of `score`, `error` and `item` is not null."""

    schema_version: Annotated[int, "version of these columns"]
    run_id: Annotated[str, "directory of the run below results/runs"]
    key: Annotated[str, "sha256 of all that determines the answer, 32 hex digits; shared by the metrics of a sample"]
    model: Annotated[str, "name of the model"]
    mixer: Annotated[str, "sequence mixer of the model"]
    family: Annotated[str, "recurrent, hybrid, transformer or other"]
    params: Annotated[int, "parameters of the model"]
    checkpoint: Annotated[str, "sha256 over weights and configuration"]
    task: Annotated[str, "name of the task"]
    task_version: Annotated[int, "version of the task's prompts and scores"]
    protocol: Annotated[str, "profile the task was asked under"]
    length: Annotated[int | None, "window asked for, in tokens, generation budget included; null without lengths"]
    sample_id: Annotated[str, "the sample, the same for every model and tokenizer"]
    seed: Annotated[int, "seed of the samples, and of answers that are drawn"]
    metric: Annotated[str, "name of the score"]
    score: Annotated[float | None, "value of the metric; null where there is an error or an item"]
    prompt_tokens: Annotated[int, "tokens of the prompt, the longest one where the sample asks several"]
    truncated_tokens: Annotated[int, "prompt tokens that did not fit the model's window"]
    depth: Annotated[float | None, "where the needle sits, 0 (start) to 1 (end)"]
    target: Annotated[str, "right answer, as the task states it"]
    output: Annotated[str, "what the model answered"]
    output_tokens: Annotated[int, "tokens generated or scored, over all requests of the sample"]
    outcome: Annotated[str, "what happened, in one word of the task's"]
    logprob: Annotated[float | None, "natural log-probability of the answer, where the sample asks one likelihood"]
    decided_early: Annotated[bool, "generation stopped because the score could no longer change"]
    error: Annotated[str | None, "why there is no score"]
    latency_s: Annotated[float, "seconds from asking to answer, the slowest request; monotonic clock"]
    created_at: Annotated[str, "when the record was written, ISO 8601, UTC"]
    data: Annotated[str, "sha256 of the data the sample was made from"]
    weight: Annotated[float, "units the score stands for, such as the words of a page"]
    metric_count: Annotated[int, "records this sample has in all; with fewer it counts as unanswered"]
    aggregation: Annotated[str | None, "version 2: what makes one number of the items of all samples"] = None
    item: Annotated[str | None, "version 2: what that needs of this sample, as JSON (`evalsuite.items`)"] = None


def _columns() -> dict[str, tuple[tuple[type, ...], bool, str]]:
    out = {}
    for name, hint in get_type_hints(Record, include_extras=True).items():
        kind, doc = get_args(hint)
        members = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
        out[name] = (tuple(m for m in members if m is not type(None)), type(None) in members, doc)
    return out


_COLUMNS = _columns()
_NAMES = tuple(f.name for f in fields(Record))
ADDED = ("aggregation", "item")  # by version 2


def table() -> list[tuple[str, str, str]]:
    """Name, JSON type and meaning of every column, in the order of the file."""
    json_types = {int: "integer", float: "number", str: "string", bool: "boolean"}
    rows = []
    for name, (kinds, optional, doc) in _COLUMNS.items():
        rows.append((name, json_types[kinds[0]] + (" or null" if optional else ""), doc))
    return [*rows, ("crc", "string", "CRC-32 of the line before this field, 8 hex digits")]


def check(record: Record) -> None:
    """Raise DataError naming the first column of `record` that breaks the schema."""
    for name, (kinds, optional, _) in _COLUMNS.items():
        value = getattr(record, name)
        if value is None:
            if not optional:
                raise DataError(f"column {name} is null")
        elif type(value) not in kinds:
            raise DataError(f"column {name} is {type(value).__name__} {value!r:.60}, not {kinds[0].__name__}")
        elif type(value) is float and not math.isfinite(value):
            raise DataError(f"column {name} is {value}, not a finite number")
        elif type(value) is int and value < 0:
            raise DataError(f"column {name} is {value}, below 0")
    if [record.score, record.error, record.item].count(None) != 2:
        raise DataError("exactly one of the columns score, error and item must not be null")
    if (record.item is None) != (record.schema_version == PLAIN) or (record.item is None) != (not record.aggregation):
        raise DataError(f"a record has an aggregation and an item in version {SCHEMA_VERSION}, and none in {PLAIN}")
    if record.family not in FAMILIES:
        raise DataError(f"column family is {record.family!r:.60}, not one of {', '.join(FAMILIES)}")
    if record.depth is not None and not 0 <= record.depth <= 1:
        raise DataError(f"column depth is {record.depth}, outside 0..1")
    if record.metric_count < 1 or record.weight < 0 or record.latency_s < 0:
        raise DataError("column metric_count is below 1, or weight or latency_s below 0")


def to_line(record: Record) -> str:
    """One line of ASCII JSON, newline included. Raises DataError where the record breaks the schema."""
    check(record)
    names = [name for name in _NAMES if record.schema_version > PLAIN or name not in ADDED]
    body = json.dumps({name: getattr(record, name) for name in names}, ensure_ascii=True, allow_nan=False)[:-1]
    return f'{body}, "crc": "{zlib.crc32(body.encode("ascii")):08x}"}}\n'


def from_line(line: str) -> Record:
    """Read what `to_line` wrote.

    Raises:
        NewerSchemaError: the line is whole, and of a later version.
        DataError: the line is damaged: torn, joined, flipped bits, columns unknown or missing, wrong types.
    """
    line = line.strip("\x00\ufeff \t\r\n")
    if len(line) > _MAX_LINE:
        raise DataError(f"the line has {len(line)} characters, more than {_MAX_LINE}")
    found = _CRC.search(line)
    if found and int(found[1], 16) != zlib.crc32(line[: found.start()].encode("utf-8", "surrogatepass")):
        raise DataError("the checksum does not fit the line")
    try:
        columns = json.loads(line, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a line of JSON ({error})") from None
    if not isinstance(columns, dict):
        raise DataError(f"a JSON {type(columns).__name__}, not an object")
    version = columns.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise NewerSchemaError(f"schema version {version} is newer than {SCHEMA_VERSION}: update gdn2-eval to read it")
    if not found:
        raise DataError("the checksum is missing")
    del columns["crc"]
    return _record(columns)


def _record(columns: dict[str, object]) -> Record:
    if unknown := [name for name in columns if name not in _COLUMNS]:
        raise DataError(f"unknown column {unknown[0]!r:.60}")
    version = columns.get("schema_version")
    if missing := [name for name in _NAMES if name not in columns and (version != PLAIN or name not in ADDED)]:
        raise DataError(f"column {missing[0]} is missing")
    if type(version) is not int or not PLAIN <= version <= SCHEMA_VERSION:
        raise DataError(f"schema version {version!r:.60} is unknown")
    record = Record(**columns)  # type: ignore[arg-type]
    check(record)
    return record


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a column appears twice")
    return out


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
