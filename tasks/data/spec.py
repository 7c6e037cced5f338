"""What a set of examples looks like: its columns, its size, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gdn2.errors import DataError

Row = Mapping[str, Any]
Kind = Literal["text", "texts", "label", "choices", "any"]

WHAT = {
    "text": "a text",
    "texts": "a list of texts",
    "label": "a whole number",
    "choices": "an object of the lists `text` and `label`, of one length",
    "any": "a JSON value",
}


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A set of examples, kept as JSON lines with `columns`, in their order.

    Args:
        name: of the data set; its file is NAME.jsonl.
        columns: name to kind. A `label` is a whole number, or a text of digits that becomes one.
        hub: OWNER/REPO on the Hugging Face hub.
        split: there.
        config: there.
        records: of the complete set; None where nobody said.
        licence: as its owners state it.
        adapt: makes our columns of a row as the hub or a user's file has it; None takes the columns as they are.
        original: reads the original distribution's own format, given the path of its main file.
    """

    name: str
    columns: Mapping[str, Kind]
    hub: str
    split: str
    config: str | None = None
    records: int | None = None
    licence: str = "see its page on the hub"
    adapt: Callable[[Row], Row] | None = None
    original: Callable[[Path], Iterable[Row]] | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.jsonl"


def conform(dataset: Dataset, row: Row, where: str) -> dict[str, Any]:
    """`row` with exactly the columns of `dataset`.

    Args:
        where: the place of the row, for an error.

    Raises:
        DataError: a column is missing or of another kind.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: not an object with columns {', '.join(dataset.columns)}")
    if dataset.adapt is not None and any(name not in row for name in dataset.columns):
        with suppress(KeyError, IndexError, TypeError, AttributeError, ValueError):  # what is missing is said below
            row = dataset.adapt(row)
    out = {}
    for name, kind in dataset.columns.items():
        if name not in row:
            raise DataError(f"{where}: column {name} of {dataset.name} is missing; there are {_names(row)}")
        value = _fitting(kind, row[name])
        if value is None:
            raise DataError(f"{where}: column {name} of {dataset.name} is {row[name]!r:.60}, not {WHAT[kind]}")
        out[name] = value
    return out


def _names(row: Row) -> str:
    return ", ".join(str(name)[:40] for name in list(row)[:12]) or "none"


def _fitting(kind: Kind, value: Any) -> Any:
    """`value` as a column of `kind` holds it, None where it cannot be one."""
    if kind == "text":
        return value if isinstance(value, str) else None
    if kind == "texts":
        return _texts(value)
    if kind == "label":
        return _label(value)
    if kind == "choices":
        if not isinstance(value, Mapping):
            return None
        texts, labels = _texts(value.get("text")), _texts(value.get("label"))
        good = texts is not None and labels is not None and len(texts) == len(labels) > 0
        return {"text": texts, "label": labels} if good else None
    return value


def _texts(value: Any) -> list[str] | None:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return None
    texts = list(value)
    return texts if all(isinstance(text, str) for text in texts) else None


def _label(value: Any) -> int | None:
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None
    return int(value) if isinstance(value, int) else None
