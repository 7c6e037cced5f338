"""What a run has to answer: cells (a task at a length), their samples, and a key for each sample.

A sample's key is the sha256 of all that determines its answer: task and version, protocol, length, seed, sample id, the
token ids and generation settings of its requests, and the digests of data, checkpoint, tokenizer and compute path.
Resuming is the set difference of these keys and the store's.

A run's directory is named after what all of its records share (model, seed, options, ...). Tasks, lengths and sample
counts are not part of the name: asking for more of them later adds the difference to the same run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NamedTuple

from evalsuite.groups import Group
from evalsuite.names import quoted, slug
from evalsuite.schema import PLAIN
from evalsuite.types import (
    Adjustable,
    Backend,
    Chosen,
    Generate,
    LogLikelihood,
    ModelInfo,
    Request,
    Sample,
    Setting,
    Task,
    Tokenizer,
)
from gdn2.errors import DataError, UserError

MIN_LENGTH, MAX_LENGTH = 128, 1 << 24

# Samples of this many tokens are kept from planning to running (int32: 256 MB); the rest are made twice.
KEPT_TOKENS = 1 << 26

_LENGTH = re.compile(r"([1-9][0-9]{0,8})([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths in tokens from text such as "1k,2k,4096,1m" (k = 1024, m = 1024 k), in the order given."""
    lengths: list[int] = []
    for part in text.split(","):
        found = _LENGTH.fullmatch(part.strip())
        if not found:
            raise UserError(f"length {quoted(part)} is not a number of tokens such as 4096, 4k or 1m")
        length = int(found[1]) * _UNITS[found[2].lower()]
        if not MIN_LENGTH <= length <= MAX_LENGTH:
            raise UserError(f"length {quoted(part)} is outside {MIN_LENGTH} to {MAX_LENGTH} tokens")
        if length in lengths:
            raise UserError(f"length {quoted(part)} is given twice")
        lengths.append(length)
    return tuple(lengths)


@dataclass(frozen=True, slots=True)
class Ask:
    """What the user asked for, besides model and tasks."""

    lengths: tuple[int, ...]  # for the tasks that have them
    samples: int | None = None  # first n samples of each cell; None is all
    profile: str | None = None  # None is each task's default
    seed: int = 42
    options: Mapping[str, str] = field(default_factory=dict)


class Entry(NamedTuple):
    """One planned sample."""

    sample_id: str
    key: str
    requests: int
    tokens: int  # to be read, over all requests


class CellSummary(NamedTuple):
    """One line of a dry run."""

    task: str
    protocol: str
    length: int | None
    samples: int
    done: int
    requests: int  # still to be answered
    tokens: int  # still to be read


class Cell:
    """One task under one setting, and the samples it asks."""

    def __init__(self, task: Task, setting: Setting, tokenizer: Tokenizer) -> None:
        self.task = task
        self.setting = setting
        self.data = task.data_digest(setting)
        self._tokenizer = tokenizer
        self._kept: Sequence[Sample] | None = None
        self.entries: tuple[Entry, ...] = ()

    def enter(self, key_base: Mapping[str, object], room: int) -> int:
        """Make the samples once to learn their keys; keep them where they fit in `room` tokens. Returns tokens kept."""
        samples = self.task.samples(self.setting, self._tokenizer)
        self.entries = tuple(self.entry(sample, key_base) for sample in samples)
        if len({entry.sample_id for entry in self.entries}) != len(self.entries):
            raise ValueError(f"task {self.task.name} gives one sample id to two samples")
        tokens = sum(entry.tokens for entry in self.entries)
        if tokens > room:
            return 0
        self._kept = samples
        return tokens

    def entry(self, sample: Sample, key_base: Mapping[str, object]) -> Entry:
        """The plan's line for one of the samples; `key_base` is that of the model."""
        base = {
            **key_base,
            "task": self.task.name,
            "task_version": self.task.version,
            "protocol": self.setting.protocol,
            "length": self.setting.length,
            "seed": self.setting.seed,
            "data": self.data,
        }
        return _entry(sample, base)

    def samples(self) -> Sequence[Sample]:
        """The samples, in the order of `entries`."""
        return self._kept if self._kept is not None else self.task.samples(self.setting, self._tokenizer)

    def summary(self, done: Callable[[str], bool]) -> CellSummary:
        todo = [entry for entry in self.entries if not done(entry.key)]
        return CellSummary(
            self.task.name,
            self.setting.protocol,
            self.setting.length,
            len(self.entries),
            len(self.entries) - len(todo),
            sum(entry.requests for entry in todo),
            sum(entry.tokens for entry in todo),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells of one invocation, and the run they belong to."""

    run_id: str
    identity: Mapping[str, object]  # what the run's records share
    info: ModelInfo
    cells: tuple[Cell, ...]
    averaged: tuple[Group, ...] = ()  # whose numbers are made of those of cells

    def summary(self, done: Callable[[str], bool]) -> list[CellSummary]:
        """What each cell still asks, given a test for stored keys."""
        return [cell.summary(done) for cell in self.cells]

    def groups(self) -> Iterator[list[Cell]]:
        """Cells that are asked together: as many as fit in `KEPT_TOKENS`, at least one."""
        group: list[Cell] = []
        total = 0
        for cell in self.cells:
            tokens = sum(entry.tokens for entry in cell.entries)
            if group and total + tokens > KEPT_TOKENS:
                yield group
                group, total = [], 0
            group.append(cell)
            total += tokens
        if group:
            yield group


def make_plan(backend: Backend, tasks: Sequence[Task], ask: Ask) -> Plan:
    """Plan every task at every length for the model behind `backend`.

    Raises UserError for a profile that a task does not have, and whatever a task raises for a setting it cannot meet.
    """
    info, tokenizer = backend.info, backend.tokenizer
    cells, base = [], key_base(info)
    room = KEPT_TOKENS
    for task, setting in settings(tasks, ask):
        cell = Cell(task, setting, tokenizer)
        room -= cell.enter(base, room)
        cells.append(cell)
    identity: dict[str, object] = {
        "schema": PLAIN,
        "model": info.name,
        "checkpoint": info.checkpoint,
        "tokenizer": info.tokenizer,
        "compute": base["compute"],
        "profile": None if all(ask.profile == task.protocols[0] for task in tasks) else ask.profile,
        "seed": ask.seed,
        "options": {name: option_digest(value) for name, value in sorted(ask.options.items())},
    }
    run_id = f"{slug(info.name)}-{_digest(identity)[:12]}"
    named = {group.name: group for given in tasks for group in getattr(given, "groups", ())}
    return Plan(run_id, identity, info, tuple(cells), tuple(named.values()))


def key_base(info: ModelInfo) -> dict[str, object]:
    """What the keys of all samples of a model share."""
    compute = info.details.get("identity", {})
    return {"checkpoint": info.checkpoint, "tokenizer": info.tokenizer, "compute": compute}


def check_profile(tasks: Sequence[Task], profile: str | None) -> None:
    """Raise UserError where a task does not have `profile`, or a suite's task the one it was chosen with."""
    for task in tasks:
        _protocols(task.task if isinstance(task, Chosen) else task, _profile(task, profile))


def check_data(tasks: Sequence[Task], ask: Ask) -> None:
    """Raise DataError where a task lacks what its samples are made from: before a model is loaded in vain."""
    for task, setting in settings(tasks, ask):
        task.data_digest(setting)


def settings(tasks: Sequence[Task], ask: Ask) -> list[tuple[Task, Setting]]:
    """Every task with every setting it is to be asked under, each once: with the most samples anybody asked for."""
    found: dict[tuple[str, str, int | None], tuple[Task, Setting]] = {}
    for given in tasks:
        for task, setting in _settings(given, ask):
            key = (task.name, setting.protocol, setting.length)
            if key not in found or _more(setting.samples, found[key][1].samples):
                found[key] = (task, setting)
    return list(found.values())


def _more(samples: int | None, than: int | None) -> bool:
    return than is not None and (samples is None or samples > than)


def _settings(given: Task, ask: Ask) -> list[tuple[Task, Setting]]:
    chosen = given if isinstance(given, Chosen) else Chosen(given)
    task = chosen.task
    lengths: Sequence[int | None] = (chosen.lengths or ask.lengths) if task.has_lengths else (None,)
    samples = chosen.samples if ask.samples is None else ask.samples
    protocols = _protocols(task, _profile(given, ask.profile))
    asked = [(protocol, length) for protocol in protocols for length in lengths]
    return [(task, Setting(*cell, samples, ask.seed, ask.options)) for cell in asked]


def _profile(task: Task, profile: str | None) -> str | None:
    return (task.protocol if isinstance(task, Chosen) else None) or profile


def _protocols(task: Task, profile: str | None) -> Sequence[str]:
    """What `profile`, or without one the task's default, stands for."""
    if isinstance(task, Adjustable):
        return task.expand(profile or task.protocols[0])
    if profile is not None and profile not in task.protocols:
        raise UserError(f"task {task.name} has no profile {quoted(profile)}; it has {', '.join(task.protocols)}")
    return (profile or task.protocols[0],)


def option_digest(value: str) -> str:
    """`value`, or the sha256 of the file or directory it names: the run follows contents, not places."""
    path = Path(value)
    try:
        if not path.exists():
            return value
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        found = hashlib.sha256()
        for file in files:
            name = "" if file == path else file.name
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            found.update(f"{name!r} {content}\n".encode("utf-8", "surrogatepass"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {quoted(value)}: {error}") from None
    return f"sha256:{found.hexdigest()}"


def _entry(sample: Sample, base: Mapping[str, object]) -> Entry:
    requests = [_request_digest(request) for request in sample.requests]
    key = _digest({**base, "sample": sample.id, "requests": requests})[:32]
    return Entry(sample.id, key, len(requests), sum(map(request_tokens, sample.requests)))


def request_tokens(request: Request) -> int:
    """Tokens a model reads for `request`."""
    match request:
        case Generate(prompt):
            return len(prompt.ids)
        case LogLikelihood(context, continuation):
            return len(context.ids) + len(continuation.ids)
        case _:
            return len(request.document.ids)


def _request_digest(request: Request) -> str:
    match request:
        case Generate(prompt, max_tokens, stop, decision, sampling):
            parts, settings = [prompt], ["generate", max_tokens, stop]
            if decision is not None:
                settings += [decision.references, decision.need]
            if sampling is not None:
                settings += ["sampling", *astuple(sampling)]
        case LogLikelihood(context, continuation, ranked):
            parts, settings = [context, continuation], ["loglikelihood", *(["ranked"] if ranked else [])]
        case _:
            parts, settings = [request.document], ["rolling", request.window]
    found = hashlib.sha256(json.dumps([settings, [len(part.ids) for part in parts]]).encode())
    for part in parts:
        found.update(part.ids.astype("<i4", copy=False).tobytes())
    return found.hexdigest()


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
