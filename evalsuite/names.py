"""Names and texts from outside, made safe and legible: for paths, for a terminal, for a reader who mistyped one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from gdn2.errors import UserError

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NUMBER = re.compile(r"-?[\d,.]+|-")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)

# What a terminal would obey rather than show: OSC, DCS, PM, APC and SOS strings, CSI and two-character sequences.
_SEQUENCE = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]{0,4096}(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b.?",
    re.DOTALL,
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def slug(name: str, limit: int = 48) -> str:
    """`name` as a file name of at most `limit` + 13 letters; changed names carry 12 hex digits of their sha256."""
    safe = _UNSAFE.sub("-", name).strip("-._")[:limit].rstrip("-._")
    if name and safe == name and not _RESERVED.fullmatch(safe):
        return safe
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{safe}-{digest}" if safe and not _RESERVED.fullmatch(safe) else f"x-{digest}"


def plain(text: str) -> str:
    """`text` without what a terminal would obey: escape sequences, control and bidirectional characters, surrogates.

    Tabs and newlines stay.
    """
    return _CONTROL.sub("", _SEQUENCE.sub("", text.replace("\r\n", "\n")))


def one_line(text: str) -> str:
    """`plain` text on a single line."""
    return " ".join(plain(text).split())


def quoted(value: object, limit: int = 60) -> str:
    """A user's value as an error message shows it."""
    shown = repr(str(value))
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"


def suggest(name: str, known: Iterable[str], limit: int = 12) -> str:
    """The end of an error message about an unknown `name`: the closest known ones, else the first `limit`."""
    choices = sorted(known)
    if close := get_close_matches(name, choices, n=3):
        return f"did you mean {' or '.join(close)}?"
    if not choices:
        return "there are none"
    more = f", ... ({len(choices)} in all)" if len(choices) > limit else ""
    return f"known: {', '.join(choices[:limit])}{more}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table with aligned columns; those of numbers to the right."""
    cells = [[one_line(str(value)) for value in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    lines = []
    for line in (header, *cells):
        parts = zip(line, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in parts))
    return [line.rstrip() for line in lines]


def refuse_unusable(given: Mapping[str, object]) -> None:
    """Raise UserError for an option whose text is blank, holds a NUL, or cannot be a name on this system."""
    for name, value in given.items():
        try:
            good = value is None or (bool(str(value).strip()) and b"\x00" not in os.fsencode(str(value)))
        except UnicodeEncodeError:
            good = False
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {quoted(value)} is not a value")


def task_options(given: Mapping[str, object]) -> dict[str, str]:
    """The settings among `given` that tasks read, as they read them."""
    names = ("haystack", "haystack_offset", "budget")
    return {name: str(given[name]) for name in names if given.get(name) is not None}
