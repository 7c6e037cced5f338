"""One task of lm-eval by its name: found without the scan of all tasks, built on data that were brought before."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gdn2.errors import DataError, UserError

# Answers in the place of `datasets.load_dataset`: path, configuration and options to the splits by name.
Source = Callable[[str, str | None, Mapping[str, Any]], Mapping[str, Any]]


def configuration(name: str) -> Mapping[str, Any]:
    """How lm-eval configures its task `name`.

    Raises:
        UserError: lm-eval has no such task, or its task makes its own data.
    """
    found: Mapping[str, Any] = _manager(name).task_index[name].cfg or {}
    if found.get("custom_dataset"):
        raise UserError(f"lm_eval:{name} makes its own data when it is loaded, which is not supported")
    return found


def _without_examples(config: Mapping[str, Any]) -> dict[str, None]:
    """Where prompts have no examples, changes after which the splits they would come from need not be there."""
    if config.get("num_fewshot"):
        return {}
    unused = ["training_split", "fewshot_split"] + ["validation_split"] * (config.get("test_split") is not None)
    return dict.fromkeys(unused)


@lru_cache(maxsize=16)
def _manager(name: str) -> Any:
    path = find(name)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(path.parent), include_defaults=False)


def load(name: str, source: Source) -> Any:
    """The task `name` of lm-eval, an `lm_eval.api.task.Task`.

    Args:
        source: where its data come from.

    Raises:
        UserError: lm-eval has no such task, or its task makes its own data.
        DataError: what `source` raises, or the data do not fit the task.
    """
    changes = _without_examples(configuration(name))
    with quiet(), data_from(source):
        try:
            found = _manager(name).load({"group": "gdn2", "task": [{"task": name, **changes}]})
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"lm-eval cannot load its task {name}: {type(error).__name__}: {reason}") from error
        return found["tasks"][name]


@lru_cache(maxsize=64)
def find(name: str) -> Path:
    """The file that configures lm-eval's task `name`. Raises UserError where there is none."""
    if not re.fullmatch(r"[\w.:+-]{1,120}", name):
        raise UserError(f"lm_eval:{name[:60]!r} is not the name of a task")
    # Of 14,000 files those are read first whose path has most of the name's words.
    words = [word for word in re.split(r"\W|_", name) if len(word) > 2]
    likely = sorted(_files(), key=lambda path: (-sum(word in path for word in words), path))
    value = rf"[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*(?:#.*)?$"
    says = re.compile(rf"^[\"']?task[\"']?:{value}", re.MULTILINE)
    several = re.compile(rf"^(?:group:|tag:|[ \t]*-){value}", re.MULTILINE)
    group = None
    for path in likely:
        text = Path(path).read_text("utf-8", "replace")
        if says.search(text):
            return Path(path)
        group = group or several.search(text)
    if group:
        raise UserError(f"{name} is a group of tasks in lm-eval: name one of them, lm_eval:TASK")
    raise UserError(f"lm-eval has no task {name[:60]!r}; `lm-eval ls tasks` shows them")


@lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return tuple(str(path) for path in (Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml"))


def question(path: str, name: str | None, options: Mapping[str, Any]) -> str:
    """What `datasets.load_dataset` was asked, as text: the same for the same data."""
    kept = {key: value for key, value in options.items() if value is not None and key != "trust_remote_code"}
    tail = "-" + sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:8] if kept else ""
    return f"{path}/{name or 'default'}{tail}"


@contextmanager
def data_from(source: Source) -> Iterator[None]:
    """While it lasts, `datasets.load_dataset` asks `source`, and no network."""
    import datasets

    def answer(path: str, name: str | None = None, **options: Any) -> Any:
        split = options.pop("split", None)
        found = source(path, name, options)
        return found if split is None else found[str(split)]

    original = datasets.load_dataset
    datasets.load_dataset = answer
    try:
        yield
    finally:
        datasets.load_dataset = original


@lru_cache(maxsize=4096)
def _template(text: str) -> Any:
    from lm_eval import utils

    return type(utils.env).from_string(utils.env, text)


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, lm-eval's templates are compiled once each, and neither it nor `datasets` chats."""
    import datasets
    from lm_eval import utils

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    utils.env.from_string = _template
    try:
        yield
    finally:
        del utils.env.from_string
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
