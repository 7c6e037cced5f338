"""Text files of reports: written at once or not at all, and compared with what the records give."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from evalsuite.names import quoted
from evalsuite.store import storage, write_file
from gdn2.errors import DataError, UserError

Format = Literal["markdown", "latex", "csv"]
SUFFIXES: dict[str, Format] = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


def format_of(path: Path) -> Format:
    """The format a file name asks for. Raises UserError for another suffix."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"table file {quoted(path)} must end in {', '.join(SUFFIXES)}")
    return SUFFIXES[path.suffix.lower()]


def write(text: str, path: Path) -> None:
    """Write `text` to `path`, replacing what is there."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode("utf-8"))


def check(text: str, path: Path) -> None:
    """Raise DataError naming the first line in which the file at `path` differs from `text`."""
    try:
        found = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    wanted = text.splitlines()
    if found == wanted:
        return
    pairs = zip(found, wanted, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    raise DataError(f"{path} is not what the records give: line {first + 1} differs; write it again without --check")
