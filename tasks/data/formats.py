"""A user's own copy of a data set: JSON lines, a JSON list, Parquet, or the original distribution's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gdn2.errors import DataError
from tasks.data.spec import Dataset, Row, conform


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError where it cannot be read, naming the first bad byte."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def read_json_lines(path: Path) -> list[Row]:
    """Objects of JSON lines, or of one JSON list. Raises DataError naming the first bad line."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        found = _parsed(text, str(path))
        if isinstance(found, list):
            return found
    # Only \n ends a line here: JSON may hold U+2028 and its like as they are.
    lines = enumerate(text.split("\n"), start=1)
    return [_parsed(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def read_parquet(path: Path) -> list[Row]:
    """Rows of a Parquet file. Raises DataError where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        made: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {' '.join(str(error).split())[:200]}") from None
    return made


def read_copy(dataset: Dataset, path: Path) -> list[dict[str, Any]]:
    """The examples of a user's file, in its order.

    Raises:
        DataError: no such file, no format that is known, or a record that lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    if path.suffix == ".parquet":
        return _conformed(dataset, read_parquet(path), path)
    problem = None
    try:
        return _conformed(dataset, read_json_lines(path), path)
    except DataError as error:
        problem = error
    if dataset.original is None:
        raise problem
    try:
        made = list(dataset.original(path))
    except DataError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{problem}; nor is it the original format ({type(error).__name__}: {error})") from None
    return _conformed(dataset, made, path)


def _conformed(dataset: Dataset, made: list[Row], path: Path) -> list[dict[str, Any]]:
    if not made:
        raise DataError(f"{path} holds no record")
    return [conform(dataset, row, f"{path}, record {number}") for number, row in enumerate(made, start=1)]
