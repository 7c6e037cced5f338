"""lm-eval's own tasks, by the name `lm_eval:NAME`, on data that `gdn2-eval data fetch lm_eval:NAME` brought."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from evalsuite.lm_eval_bridge.loading import question
from evalsuite.lm_eval_bridge.task import PREFIX, LmEvalTask, identity
from gdn2.errors import DataError
from tasks.data import shelf

__all__ = ["PREFIX", "fetch", "open_task"]


class Kept(Mapping[str, Any]):
    """Splits that lie in the data directory, read when asked for. `digests` are those of the files read so far."""

    def __init__(self, task: str, asked: str, home: Path, digests: dict[str, str]) -> None:
        self._task, self._home, self._digests = task, home, digests
        place = _place(asked)
        self._files = {
            Path(name).stem: name for name in shelf.manifest(home) if Path(name).parent == Path(place)
        }  # fmt: skip
        if not self._files:
            raise DataError(f"the data of {task} are not in {home}: {shelf.how(task, home, own=False)}")

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
        return shelf.how(self._task, self._home, own=False)

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


def open_task(name: str) -> LmEvalTask:
    """The task `lm_eval:NAME`, on the data directory in use. Raises UserError where lm-eval has no such task."""
    return _opened_task(name, shelf.folder())


@lru_cache(maxsize=16)
def _opened_task(name: str, home: Path) -> LmEvalTask:
    digests: dict[str, str] = {}

    def source(path: str, config: str | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return Kept(name, question(path, config, options), home, digests)

    def digest() -> str:
        lines = [identity(task), *(f"{file} {found}" for file, found in sorted(digests.items()))]
        return sha256("\n".join(lines).encode()).hexdigest()

    task = LmEvalTask(name.removeprefix(PREFIX), source, digest)
    return task


def fetch(name: str, home: Path) -> str:
    """Bring what `lm_eval:NAME` reads; the line to print. Raises DataError where it cannot be had."""
    import datasets

    real = datasets.load_dataset
    seen: dict[str, Fetched] = {}

    def source(path: str, config: str | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
        seen[question(path, config, options)] = found = Fetched(real(path, config, **options))
        return found

    task = LmEvalTask(name.removeprefix(PREFIX), source, str)
    examples = len(task.task.eval_docs)
    count = 0
    for asked, fetched in seen.items():
        for split, rows in fetched.used.items():
            buffer = io.BytesIO()
            rows.to_parquet(buffer)
            file = f"{_place(asked)}/{split}.parquet"
            entry = shelf.entry_of(buffer.getvalue(), f"hf:{asked} {split}", "see its page on the hub", len(rows))
            shelf.keep(home, {file: buffer.getvalue()}, {file: entry})
            count += 1
    return f"{name}: {examples} examples, {count} files"


def _place(asked: str) -> str:
    return "lm_eval/" + re.sub(r"[^\w.-]", "-", asked.replace("/", "--")).lstrip(".")


def _opened(data: bytes) -> Any:
    import datasets
    import pyarrow
    import pyarrow.parquet

    return datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
