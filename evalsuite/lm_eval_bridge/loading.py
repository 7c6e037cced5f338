"""One task of lm-eval by its name: found without the scan of all tasks, built on data that were brought before."""

from __future__ import annotations

import importlib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evalsuite.lm_eval_bridge.index import find, root
from evalsuite.lm_eval_bridge.standins import stand_ins
from gdn2.errors import DataError, UserError

# Answers in the place of `datasets.load_dataset`: path, configuration and options to the splits by name.
Source = Callable[[str, str | None, Mapping[str, Any]], Mapping[str, Any]]


def configuration(name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Mapping[str, Any]:
    """How lm-eval configures its task `name`, with the `changes` that a group makes.

    Raises:
        UserError: lm-eval has no such task, or it cannot run here; says why.
    """
    found: Mapping[str, Any] = {**(manager(find(name).parent).task_index[name].cfg or {}), **changes}
    if reason := refusal(found):
        raise UserError(f"lm_eval:{name} {reason}")
    return found


def refusal(config: Mapping[str, Any]) -> str:
    """Why a task of this configuration cannot run here, "" where it can."""
    if "/ruler/" in str(config.get("custom_dataset")):
        return "makes its data when it is loaded; RULER's tasks are here under their own names, such as niah_single_1"
    if config.get("unsafe_code"):
        return "runs the code that a model writes, which is not done here: lm-eval does, with --confirm_run_unsafe_code"
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        return "asks about images or sounds, which no model here takes"
    return ""


def _without_examples(config: Mapping[str, Any]) -> dict[str, None]:
    """Where prompts have no examples, changes after which the splits they would come from need not be there."""
    if config.get("num_fewshot"):
        return {}
    unused = ["training_split", "fewshot_split"] + ["validation_split"] * (config.get("test_split") is not None)
    return dict.fromkeys(unused)


@lru_cache(maxsize=256)
def manager(folder: Path) -> Any:
    """lm-eval's own, of the tasks in and below one folder."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=str(folder), include_defaults=False)


def load(
    name: str, source: Source, changes: Mapping[str, Any] = MappingProxyType({}), online: bool = False
) -> Any:
    """The task `name` of lm-eval, an `lm_eval.api.task.Task`.

    Args:
        source: where its data come from.
        changes: to its configuration.
        online: whether `source` may use a network; nobody else does.

    Raises:
        UserError: lm-eval has no such task, or it cannot run here; says why.
        DataError: what `source` raises, or the data do not fit the task.
    """
    unused = _without_examples(configuration(name, changes))
    with quiet(), data_from(source), stand_ins(), nullcontext() if online else without_network():
        try:
            asked = {"task": name, **_resolved(changes), **unused}
            found = manager(find(name).parent).load({"group": "gdn2", "task": [asked]})
        except UserError:
            raise
        except (ImportError, SystemExit) as error:
            raise UserError(f"lm_eval:{name} needs what is not installed here: {_reason(error)}") from error
        except Exception as error:  # whatever lm-eval, a task's functions or its templates say of odd data
            raise DataError(f"lm-eval cannot load its task {name}: {type(error).__name__}: {_reason(error)}") from error
        return found["tasks"][name]


def imported(place: str) -> Any:
    """The function at "DIRECTORY/module.name", as lm-eval's index writes the `!function module.name` of its files."""
    folder, _, dotted = place.rpartition("/")
    module, _, name = dotted.rpartition(".")
    file = Path(folder) / f"{module.replace('.', '/')}.py"
    if file.is_file() and root() in file.parents:
        module = ".".join(["lm_eval", "tasks", *file.relative_to(root()).with_suffix("").parts])
    if not module.startswith("lm_eval."):
        raise LookupError(f"{dotted} is not lm-eval's own")
    return getattr(importlib.import_module(module), name)


def _resolved(value: Any) -> Any:
    """A value of a configuration with the functions that it names."""
    if isinstance(value, Mapping):
        return {key: _resolved(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each) for each in value]
    return imported(value) if isinstance(value, str) and value.startswith(f"{root()}/") else value


@contextmanager
def without_network() -> Iterator[None]:
    """While it lasts, no host is found: some tasks download what they think they need when they are imported."""

    def refuse(host: object, *args: object, **options: object) -> Any:
        raise OSError(f"no network is used here, {host!r:.60} was asked for")

    original = socket.getaddrinfo
    socket.getaddrinfo = refuse
    try:
        yield
    finally:
        socket.getaddrinfo = original


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


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
    within = "from_string" in vars(utils.env)
    utils.env.from_string = _template
    try:
        yield
    finally:
        if not within:
            del utils.env.from_string
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
