"""The tasks: each module or subpackage here that has a `TASKS` table adds its tasks, and `SUITES` names groups of them.

A new task is one new file in this directory.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import cast

from evalsuite.types import Chosen, Task
from gdn2.errors import UserError
from tasks import suitefile

FOREIGN = "lm_eval:"


def collect(modules: Iterable[ModuleType]) -> tuple[dict[str, Task], dict[str, tuple[str, ...]]]:
    """Tasks and suites of `modules` by name.

    A task's own `suite` is a suite of all its members even where no table lists it. Raises ValueError for a name
    used twice, and for a suite that lists a task that is not there.
    """
    tasks: dict[str, Task] = {}
    suites: dict[str, tuple[str, ...]] = {}
    families: dict[str, list[str]] = {}
    for module in modules:
        table = vars(module)
        for task in table.get("TASKS", ()):
            if task.name in tasks:
                raise ValueError(f"task {task.name!r} is defined twice, the second time in {module.__name__}")
            tasks[task.name] = task
            families.setdefault(task.suite, []).append(task.name)
        for name, members in table.get("SUITES", {}).items():
            if name in suites:
                raise ValueError(f"suite {name!r} is defined twice, the second time in {module.__name__}")
            suites[name] = tuple(members)
    for name, members in families.items():
        suites.setdefault(name, tuple(members))
    for name, members in suites.items():
        if unknown := [member for member in members if member not in tasks]:
            raise ValueError(f"suite {name!r} lists {unknown[0]!r}, which is no task")
    return tasks, suites


@lru_cache(maxsize=1)
def _registry() -> tuple[Mapping[str, Task], Mapping[str, tuple[str, ...]]]:
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return collect(importlib.import_module(f"{__name__}.{name}") for name in names)


def names() -> list[str]:
    """Names of all tasks."""
    return list(_registry()[0])


def suites() -> dict[str, tuple[str, ...]]:
    """Names of all suites, and the tasks of each."""
    files = {name: tuple(dict.fromkeys(task.name for task in _packaged(name))) for name in suitefile.packaged()}
    return dict(_registry()[1]) | files


def _packaged(name: str) -> list[Task]:
    return suitefile.load(suitefile.PACKAGED / f"{name}{suitefile.SUFFIX}", _named)


def get(name: str) -> Task:
    """The task called `name`; lm_eval:NAME is lm-eval's own. Raises UserError with close matches where it is none."""
    if name.startswith(FOREIGN):
        task, *more = _foreign(name)
        if more:
            raise UserError(f"{name} is {len(more) + 1} tasks: name one of them, such as {task.name}")
        return task
    return _registry()[0][_known(name, names())]


def suite(name: str) -> list[Task]:
    """The tasks of suite `name`, in its order. Raises UserError with close matches where there is none."""
    return [get(member) for member in suites()[_known(name, list(suites()))]]


def resolve(text: str) -> list[Task]:
    """What a comma-separated list of tasks, suites, TASK@PROFILE and suite files names: each once, in the order given.

    Raises UserError for a name that is none, DataError for a file that cannot be read.
    """
    found: dict[object, Task] = {}
    for name in (part.strip() for part in text.split(",")):
        for member in _named(name) if not name.endswith(suitefile.SUFFIX) else suitefile.load(Path(name), _named):
            key = (member.name, member.protocol, member.lengths) if isinstance(member, Chosen) else member.name
            known = found.setdefault(key, member)
            if isinstance(known, Chosen) and isinstance(member, Chosen):  # of two groups, perhaps
                found[key] = cast(Task, replace(known, groups=tuple(dict.fromkeys(known.groups + member.groups))))
    return list(found.values())


def _named(name: str) -> list[Task]:
    """Tasks of one name: a suite's, or the task."""
    if name in suitefile.packaged():
        return _packaged(name)
    if name in _registry()[1]:
        return [get(member) for member in _registry()[1][name]]
    plain, at, profile = name.partition("@")
    if plain.startswith(FOREIGN):
        found = _foreign(plain)
        chosen = (task if isinstance(task, Chosen) else Chosen(task) for task in found)
        return [cast(Task, replace(one, protocol=profile)) for one in chosen] if at else found
    if at:
        return [cast(Task, Chosen(get(plain), profile))]
    known = [*names(), *_registry()[1], *suitefile.packaged()]
    return [get(_known(name, known))]


def _foreign(name: str) -> list[Task]:
    """lm-eval's tasks of one name, of lm-eval's groups and tags all."""
    from tasks.from_lm_eval import open_tasks

    return open_tasks(name)


def _known(name: str, known: list[str]) -> str:
    if name in known:
        return name
    close = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(dict.fromkeys(known))}"
    raise UserError(f"no task or suite {name[:60]!r}; {hint}")
