"""Suites written in TOML: which tasks are asked, and how.

    samples = 100                      # of every task below that says nothing else
    lengths = ["1k", "4k"]             # likewise, for tasks that have lengths

    [[tasks]]
    task = "niah_single_2"             # a task or a suite; see `gdn2-eval list tasks`
    lengths = ["1k", "2k", 8192]
    samples = 500
    profile = "exact"                  # see `gdn2-eval list profiles`
    fields = { forced = "yes" }        # of the profile; a list asks for each of its values

What a file leaves open is up to the command. Suites that ship with the package lie in `tasks/suites`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, cast

from evalsuite.types import Adjustable, Chosen, Task
from gdn2.errors import DataError, UserError

Lookup = Callable[[str], Sequence[Task]]

SUFFIX = ".toml"
PACKAGED = Path(__file__).with_name("suites")
TOP = ("samples", "lengths", "tasks")
ENTRY = ("task", "lengths", "samples", "profile", "fields")
_LENGTH = re.compile(r"([1-9][0-9]{0,8})([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_RANGE = (128, 1 << 24)  # tokens
_MOST = 10**7  # samples


def packaged() -> list[str]:
    """Names of the suites that ship as files."""
    return sorted(path.stem for path in PACKAGED.glob(f"*{SUFFIX}"))


def load(path: Path, lookup: Lookup) -> list[Task]:
    """The tasks of a suite file, in its order.

    Args:
        lookup: the tasks of a name. Raises UserError where there is none.

    Raises:
        DataError: no such file, or not TOML.
        UserError: a key, value or name that is wrong; names the line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise DataError(f"cannot read suite {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"suite {path} is not UTF-8: byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"suite {path} is not TOML: {error}") from None
    return _File(path, text, content, lookup).tasks()


class _File:
    """A suite file under check."""

    def __init__(self, path: Path, text: str, content: dict[str, Any], lookup: Lookup) -> None:
        self.path, self.content, self.lookup = path, content, lookup
        self.lines = text.split("\n")
        # The line of each [[tasks]]; a file that writes its list in another way has none.
        self.starts = [i for i, line in enumerate(self.lines) if re.match(r"\s*\[\[\s*tasks\s*\]\]", line)]

    def tasks(self) -> list[Task]:
        self._known(self.content, TOP, None)
        entries = self.content.get("tasks")
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            self._refuse(None, "tasks", "a suite lists its tasks, each under [[tasks]]")
        lengths, samples = self._lengths(self.content, None), self._samples(self.content, None)
        return [task for i, entry in enumerate(entries) for task in self._entry(i, entry, lengths, samples)]

    def _entry(self, i: int, entry: dict[str, Any], lengths: tuple[int, ...] | None, samples: int | None) -> list[Task]:
        self._known(entry, ENTRY, i)
        name = entry.get("task")
        if not isinstance(name, str):
            self._refuse(i, "task", f"task is {name!r:.60}, not the name of a task or suite")
        try:
            members = self.lookup(name)
        except UserError as error:
            self._refuse(i, "task", str(error))
        own_lengths, own_samples = self._lengths(entry, i), self._samples(entry, i)
        out = []
        for member in members:
            # A member of a nested suite may be chosen already: what this file says goes before it.
            inner = member if isinstance(member, Chosen) else Chosen(member)
            protocol = self._protocol(i, entry, inner)
            asked = (own_lengths or inner.lengths or lengths, own_samples or inner.samples or samples)
            out.append(cast(Task, Chosen(inner.task, protocol, *asked, inner.groups)))
        return out

    def _protocol(self, i: int, entry: dict[str, Any], inner: Chosen) -> str | None:
        profile, fields = entry.get("profile"), entry.get("fields", {})
        if profile is None and fields == {}:
            return inner.protocol
        task = inner.task
        if not isinstance(profile, str | None):
            self._refuse(i, "profile", f"profile is {profile!r:.60}, not a name such as {task.protocols[0]}")
        if not isinstance(fields, dict) or not all(isinstance(v, str | int | list) for v in fields.values()):
            self._refuse(i, "fields", f"fields is {fields!r:.60}, not a table of texts and whole numbers")
        several = {key: value if isinstance(value, list) else [value] for key, value in fields.items()}
        pairs = [f"{key}={'/'.join(map(str, values))}" for key, values in several.items()]
        text = ":".join([task.protocols[0] if profile is None else profile, *pairs])
        try:
            if isinstance(task, Adjustable):
                task.expand(text)
            elif text not in task.protocols:
                raise UserError(f"task {task.name} has no profile {text[:60]!r}; it has {', '.join(task.protocols)}")
        except UserError as error:
            self._refuse(i, "fields" if fields else "profile", str(error))
        return text

    def _samples(self, table: dict[str, Any], i: int | None) -> int | None:
        value = table.get("samples")
        if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
            wanted = f"a whole number of at least 1 and at most {_MOST}"
            self._refuse(i, "samples", f"samples is {value!r:.60}, not {wanted}")
        return value

    def _lengths(self, table: dict[str, Any], i: int | None) -> tuple[int, ...] | None:
        values = table.get("lengths")
        if values is None:
            return None
        if not isinstance(values, list) or not values:
            self._refuse(i, "lengths", f'lengths is {values!r:.60}, not a list such as ["1k", 4096]')
        out: list[int] = []
        for value in values:
            found = _LENGTH.fullmatch(str(value).strip()) if type(value) in (int, str) else None
            length = int(found[1]) * _UNITS[found[2].lower()] if found else 0
            if not _RANGE[0] <= length <= _RANGE[1]:
                low, high = _RANGE
                self._refuse(i, "lengths", f"length {value!r:.60} is not {low} to {high} tokens, as 4096 or 4k")
            out += [] if length in out else [length]
        return tuple(out)

    def _known(self, table: dict[str, Any], keys: tuple[str, ...], i: int | None) -> None:
        for key in table:
            if key not in keys:
                close = get_close_matches(key, keys, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(keys)}"
                self._refuse(i, key, f"unknown key {key[:60]!r}; {hint}")

    def _refuse(self, i: int | None, key: str, message: str) -> NoReturn:
        raise UserError(f"{self.path}, line {self._line(i, key)}: {message}")

    def _line(self, i: int | None, key: str) -> int:
        """The line, from 1, that sets `key` in entry `i`, or at the top; that of the entry where none does."""
        bounds = [*self.starts, len(self.lines)]
        first, last = 0, bounds[0]
        if i is not None:
            first, last = (bounds[i], bounds[i + 1]) if i < len(self.starts) else (0, len(self.lines))
        sets = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]|\s*\[\[?\s*(tasks\.)?{re.escape(key)}\s*\]""")
        return next((n + 1 for n in range(first, last) if sets.match(self.lines[n])), first + 1)
