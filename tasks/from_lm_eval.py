"""lm-eval's own tasks, by the name `lm_eval:NAME`, on data that `gdn2-eval data fetch lm_eval:NAME` brought."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from evalsuite.lm_eval_bridge import index
from evalsuite.lm_eval_bridge.index import PREFIX
from evalsuite.lm_eval_bridge.loading import question, quiet
from evalsuite.lm_eval_bridge.task import LmEvalTask, identity
from evalsuite.types import Chosen, Task
from gdn2.errors import DataError, UserError
from tasks.data import shelf
from tasks.data.formats import read_json_lines, read_parquet

__all__ = ["PREFIX", "fetch", "import_copy", "members", "open_tasks"]


class Kept(Mapping[str, Any]):
    """Splits that lie in the data directory, read when asked for. `digests` are those of the files read so far.

    `brought` is what brings them, where the task is one of a group the group.
    """

    def __init__(self, task: str, brought: str, asked: str, home: Path, digests: dict[str, str]) -> None:
        self._task, self._brought, self._home, self._digests = task, brought, home, digests
        place = _place(asked)
        self._files = {
            Path(name).stem: name for name in shelf.manifest(home) if Path(name).parent == Path(place)
        }  # fmt: skip
        if not self._files:
            raise DataError(f"the data of {task} are not in {home}: {self._again()}")

    def __getitem__(self, split: str) -> Any:
        name = self._files.get(split)
        if name is None:
            raise DataError(f"split {split} of {self._task} is not in {self._home}: {self._again()}")
        data = (self._home / name).read_bytes() if (self._home / name).is_file() else b""
        if (found := sha256(data).hexdigest()) != shelf.manifest(self._home)[name].sha256:
            raise DataError(f"{self._home / name} is missing or changed: {self._again()}")
        self._digests[name] = found
        return _opened(data)

    def _again(self) -> str:
        return shelf.how(self._brought, self._home, own=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Fetched(Mapping[str, Any]):
    """Splits of the hub; `used` are those that were looked at."""

    def __init__(self, splits: Mapping[str, Any]) -> None:
        self._splits = splits
        self.used: dict[str, Any] = {}

    def __getitem__(self, split: str) -> Any:
        self.used[split] = self._splits[split]
        return self.used[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def open_tasks(name: str) -> list[Task]:
    """The tasks that `lm_eval:NAME` stands for: one, those of a group or tag of lm-eval, or GROUP/TASK, one of these.

    `lm_eval:5-shot/NAME` are the same with five examples in each prompt. Raises UserError where lm-eval has no such
    name, or a task that cannot run here.
    """
    several = index.named(name.removeprefix(PREFIX))
    opened = [_opened_task(member, shelf.folder(), name) for member in several.members]
    return [cast(Task, Chosen(task, groups=several.groups)) for task in opened] if several.groups else [*opened]


# A member's changes have no hash; its name stands for them.
_OPENED: dict[tuple[str, Path], LmEvalTask] = {}


def _opened_task(member: index.Member, home: Path, brought: str) -> LmEvalTask:
    if (member.name, home) not in _OPENED:
        _OPENED[member.name, home] = _made(member, home, brought)
    return _OPENED[member.name, home]


def _made(member: index.Member, home: Path, brought: str) -> LmEvalTask:
    digests: dict[str, str] = {}

    def source(path: str, config: str | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return Kept(member.name, brought, question(path, config, options), home, digests)

    def digest() -> str:
        lines = [identity(task), *(f"{file} {found}" for file, found in sorted(digests.items()))]
        return sha256("\n".join(lines).encode()).hexdigest()

    task = LmEvalTask(member, source, digest)
    return task


def members(name: str) -> list[str]:
    """The names of the tasks that `lm_eval:NAME` stands for. Raises as `open_tasks` does."""
    return [task.name for task in open_tasks(name)]


def fetch(name: str, home: Path) -> str:
    """Bring what one task reads; the line to print. Raises DataError where it cannot be had."""
    import datasets

    real = datasets.load_dataset
    seen: dict[str, Fetched] = {}

    def source(path: str, config: str | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
        seen[question(path, config, options)] = found = Fetched(real(path, config, **options))
        return found

    (kept,) = open_tasks(name)
    assert isinstance(kept, LmEvalTask)
    with suppress(DataError), quiet():
        return f"{name}: {len(kept.task.eval_docs)} examples, there already"
    task = LmEvalTask(kept.member, source, str, online=True)
    with quiet():
        examples = len(task.task.eval_docs)
    count = _keep(seen, home, "hf:", "see its page on the hub")
    return f"{name}: {examples} examples, {count} files"


def import_copy(name: str, file: Path, home: Path) -> str:
    """Take a user's own copy of what one task is asked on; the line to print.

    Args:
        file: JSON lines or Parquet, in the hub's columns.

    Raises:
        UserError: a group, whose tasks have a file each.
        DataError: the file does not fit the task, or the task reads more than one split; nothing was kept.
    """
    import datasets

    given, *more = open_tasks(name)
    if more:
        raise UserError(f"{name} is {len(more) + 1} tasks, each with a file of its own: import {given.name}, and so on")
    assert isinstance(given, LmEvalTask)
    rows = read_parquet(file) if file.suffix == ".parquet" else read_json_lines(file)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} holds no record")
    seen: dict[str, Fetched] = {}

    def source(path: str, config: str | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
        split = datasets.Dataset.from_list(rows)
        splits = given.splits or ("test", "validation")
        found = seen[question(path, config, options)] = Fetched(_Own(name, dict.fromkeys(splits, split)))
        return found

    count = LmEvalTask(given.member, source, str).check()
    _keep(seen, home, f"import:{file.name} sha256 {sha256(file.read_bytes()).hexdigest()} for ", "the user's")
    _OPENED.pop((name, home), None)
    return f"{name}: {count} examples"


class _Own(dict[str, Any]):
    """The split that a user's file is."""

    def __init__(self, task: str, splits: Mapping[str, Any]) -> None:
        super().__init__(splits)
        self._task = task

    def __missing__(self, split: str) -> Any:
        raise DataError(f"{self._task} also reads split {split}, which one file does not hold: fetch it instead")


def _keep(seen: Mapping[str, Fetched], home: Path, source: str, licence: str) -> int:
    """Keep the splits that were looked at; how many. `source` goes before what was asked for."""
    count = 0
    for asked, fetched in seen.items():
        for split, rows in fetched.used.items():
            buffer = io.BytesIO()
            with quiet():
                rows.to_parquet(buffer)
            file = f"{_place(asked)}/{split}.parquet"
            entry = shelf.entry_of(buffer.getvalue(), f"{source}{asked} {split}", licence, len(rows))
            shelf.keep(home, {file: buffer.getvalue()}, {file: entry})
            count += 1
    return count


def _place(asked: str) -> str:
    return "lm_eval/" + re.sub(r"[^\w.-]", "-", asked.replace("/", "--")).lstrip(".")


def _opened(data: bytes) -> Any:
    import datasets
    import pyarrow
    import pyarrow.parquet

    return datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
