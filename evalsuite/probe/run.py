"""Probes samples: the model answers each, reads it again while it is watched, and one line is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evalsuite import provenance
from evalsuite.backends import observing
from evalsuite.backends.native import NativeBackend
from evalsuite.backends.observing import Head
from evalsuite.interrupt import Signals
from evalsuite.names import quoted, slug
from evalsuite.plan import Ask, Cell, Entry, check_profile, make_plan, option_digest
from evalsuite.probe import needle as needles
from evalsuite.probe import records
from evalsuite.probe.lines import measured
from evalsuite.probe.measures import Follower
from evalsuite.progress import Progress
from evalsuite.runner import score
from evalsuite.store import Warn, locked
from evalsuite.types import Backend, Generate, Sample, Task
from gdn2.errors import UserError

TOGETHER = 16  # samples answered at once
BLOCKS = 64  # of a prompt that fills its window
BEFORE, BEHIND = 32, 96  # tokens around the needle that are kept one by one


@dataclass(frozen=True, slots=True)
class Asked:
    """What to probe: `ask` has one length; `block` None is a 64th of it, in multiples of 64 tokens."""

    task: Task
    ask: Ask
    block: int | None
    out: Path
    passed: Mapping[str, str]  # the options as given


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one invocation did, in samples."""

    directory: Path
    before: int
    probed: int
    failed: int


def probe(backend: Backend, asked: Asked, warn: Warn, status: Callable[[str], None], progress: Progress) -> Outcome:
    """Probe what is not yet in the probe's directory. Safe to kill.

    Raises UserError for a model without a recurrent state, or a task whose prompts hide no needle.
    """
    watched = observing.watchable(backend)
    block = asked.block or -(-asked.ask.lengths[0] // (64 * BLOCKS)) * 64
    observing.check_block(block)
    check_profile([asked.task], asked.ask.profile)
    cell, *others = make_plan(watched, [asked.task], asked.ask).cells
    if others:
        raise UserError(f"profile {quoted(asked.ask.profile)} is {1 + len(others)} protocols: a probe looks at one")
    needles.check(cell.samples()[0], asked.task.name)
    groups = observing.heads(watched)
    settings = _settings(watched, asked, cell, block, groups)
    directory = asked.out / _name(settings)
    with locked(directory, warn):
        records.repair(directory, warn)
        records.begin(directory, settings)
        stored = {sample["key"] for sample in records.lines(directory, warn)}
        both = zip(cell.entries, cell.samples(), strict=True)
        todo = [(entry, sample) for entry, sample in both if entry.key not in stored]
        status(f"samples go to {directory}")
        progress.start(len(todo), sum(entry.tokens for entry, _ in todo))
        failed = 0
        try:
            with Signals() as signals:
                for entry, sample, found in _probed(watched, cell, todo, block, groups):
                    if isinstance(found, str):
                        warn(f"sample {sample.id} failed: {found}")
                        failed += 1
                    else:
                        with signals.held():
                            records.append(directory, found)
                    progress.advance(entry.tokens, isinstance(found, str))
        finally:
            progress.close()
    return Outcome(directory, len(cell.entries) - len(todo), len(todo) - failed, failed)


def _settings(
    backend: NativeBackend, asked: Asked, cell: Cell, block: int, groups: Sequence[Sequence[Head]]
) -> dict[str, Any]:
    setting = cell.setting
    identity = {
        "checkpoint": backend.info.checkpoint,
        "tokenizer": backend.info.tokenizer,
        "compute": backend.info.details.get("identity", {}),
        "task": asked.task.name,
        "task_version": asked.task.version,
        "protocol": setting.protocol,
        "length": setting.length,
        "seed": setting.seed,
        "options": {name: option_digest(value) for name, value in sorted(setting.options.items())},
        "data": cell.data,
        "block": block,
    }
    return {
        "identity": identity,
        "task": asked.task.name,
        "length": setting.length,
        "model": asdict(backend.info),
        "heads": [head for group in groups for head in group],
        "passed": dict(asked.passed),
        "provenance": provenance.collect(),
    }


def _name(settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings["identity"], sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug(settings['model']['name'])}-{slug(settings['task'])}-{settings['length']}-{digest}"


def _probed(
    backend: NativeBackend, cell: Cell, todo: Sequence[tuple[Entry, Sample]], block: int,
    groups: Sequence[Sequence[Head]],
) -> Iterator[tuple[Entry, Sample, dict[str, Any] | str]]:  # fmt: skip
    """Each sample with its line, or with why there is none."""
    for begin in range(0, len(todo), TOGETHER):
        part = todo[begin : begin + TOGETHER]
        answers = dict(backend.answer([request for _, sample in part for request in sample.requests]))
        responses = iter([answers[number] for number in range(len(answers))])
        for entry, sample in part:
            (given, *_) = score(cell, sample, [next(responses) for _ in sample.requests])
            if given.error is not None:
                yield entry, sample, given.error
                continue
            needle = needles.locate(sample, backend.tokenizer)
            followed = list(zip(groups, follow(backend, sample, needle, block), strict=True))
            answer = {"key": entry.key, "sample_id": sample.id, "score": given.value, "outcome": given.outcome}
            answer |= {"target": given.target, "output": given.output, "depth": sample.depth}
            yield entry, sample, answer | measured(sample, needle, block, followed, backend.tokenizer)


def follow(backend: NativeBackend, sample: Sample, needle: needles.Needle, block: int) -> list[Follower]:
    """Read the sample's prompt under observation: what each group of heads did with the needle."""
    request = sample.requests[0]
    assert isinstance(request, Generate)
    ids, at = request.prompt.ids, needle.positions
    window = range(max(at.start - BEFORE, 0), min(at.stop + BEHIND, len(ids)))
    followers: list[Follower] = []
    for start, pieces in observing.pieces(backend, ids, block):
        followers = followers or [Follower(at, needle.value, window) for _ in pieces]
        for follower, tokens in zip(followers, pieces, strict=True):
            follower.read(start, tokens)
            end = start + len(tokens.k)
            if end % block == 0 or end == len(ids):
                follower.close()
    return followers
