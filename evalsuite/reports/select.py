"""Filters over records: `--where NAME=VALUE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evalsuite.names import quoted, suggest
from evalsuite.plan import parse_lengths
from evalsuite.reports.frame import COLUMNS, Records
from gdn2.errors import DataError, UserError

DIGESTS = ("checkpoint", "data", "key", "run_id", "sample_id")  # their beginning is enough
NAMES = [name for name, kind in COLUMNS.items() if kind in ("category", "int", "text") and name != "item"]


def select(records: Records, filters: Sequence[str]) -> Records:
    """The records that fit every name of `filters` (NAME=VALUE each); several values of one name are alternatives.

    Raises UserError for a wrong filter, DataError where nothing is left.
    """
    wanted: dict[str, list[str]] = {}
    for text in filters:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise UserError(f"filter {quoted(text)} is not NAME=VALUE")
        if name not in NAMES:
            raise UserError(f"filter {quoted(text)}: column {quoted(name)} is unknown; {suggest(name, NAMES)}")
        wanted.setdefault(name, []).append(value)
    frame, errors = records.frame, records.errors
    for name, values in wanted.items():
        kept = _values(name, values)
        parts = []
        for rows in (frame, errors):
            texts = rows[name].astype("str")
            fits = texts.isin(kept)
            if name in DIGESTS:
                for value in kept:
                    fits |= texts.str.startswith(value)
            parts.append(rows[fits].reset_index(drop=True))
        frame, errors = parts
    if filters and not len(frame) and not len(errors):
        raise DataError(f"no records fit {', '.join(map(quoted, filters))}")
    return replace(records, frame=frame, errors=errors)


def _values(name: str, values: Sequence[str]) -> list[str]:
    if name == "length":
        return [str(length) for value in values for length in parse_lengths(value)]
    return list(values)
