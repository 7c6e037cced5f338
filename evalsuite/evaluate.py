"""The command `run`: what `cli.py` hands over, from names to answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evalsuite import backends, ranks, runfile, runner, show
from evalsuite.names import one_line, task_options
from evalsuite.plan import Ask, Plan, check_data, check_profile, make_plan, parse_lengths
from evalsuite.progress import Bar, Lines, Progress, Silent
from evalsuite.store import check_writable, read_index
from evalsuite.types import Numbers, Task
from gdn2.errors import DeviceLostError, StorageError, UserError

PARTIAL = 5  # exit code: some of what was asked for was not answered
SIGNALLED = 128  # exit codes from here on name the signal that ended the run


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `run`, and `passed`: all that were given, as text."""

    model: str
    tasks: Sequence[Task]
    lengths: str
    samples: int | None
    profile: str | None
    seed: int
    out: Path
    device: str
    dtype: str | None
    batch_tokens: int | None
    share_prefixes: bool
    passed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Voice:
    """How the command speaks: result lines, tables of results, status lines and warnings."""

    say: Callable[[str], None]
    table: Callable[[Sequence[str], Sequence[Sequence[object]]], None]
    status: Callable[[str], None]
    warn: Callable[[str], None]


def evaluate(asked: Asked, voice: Voice, dry_run: bool, scores: Callable[[Path], None]) -> int:
    """Run, or price, what is asked; the exit code. `scores` shows those of a run's directory.

    Raises UserError for what cannot be asked.
    """
    with ranks.join() as group:
        ask = Ask(parse_lengths(asked.lengths), asked.samples, asked.profile, asked.seed, task_options(asked.passed))
        check_profile(asked.tasks, asked.profile)
        check_writable(asked.out / "runs")
        check_data(asked.tasks, ask)
        for remark in (remark for task in asked.tasks for remark in getattr(task, "remarks", ())):
            voice.warn(remark)
        models = backends.expand(asked.model)

        def one(model: str) -> int:
            mine = replace(asked, model=model, passed={**asked.passed, "model": model})
            return _one(mine, ask, group, voice, None if dry_run else scores)

        return one(models[0]) if len(models) == 1 else _several(models, one, group, voice)


def _one(asked: Asked, ask: Ask, group: ranks.Ranks, voice: Voice, scores: Callable[[Path], None] | None) -> int:
    """Evaluate, or without `scores` price, one model."""
    numbers = Numbers("fast" in asked.passed, "lm_eval_rounding" in asked.passed)
    backend = backends.load(
        asked.model, device=asked.device, dtype=asked.dtype, batch_tokens=asked.batch_tokens, given=asked.passed,
        share_prefixes=asked.share_prefixes, numbers=numbers,
    )  # fmt: skip
    plan = make_plan(backend, asked.tasks, ask)
    directory = asked.out / "runs" / plan.run_id
    if group.rank == 0 and (text := show.too_long(plan)):
        voice.warn(text)
    if scores is None:
        if group.rank == 0:
            _price(plan, directory, voice)
        return 0
    if group.rank == 0:
        voice.status(f"records go to {directory}")
    outcome = runner.run(plan, backend, directory, asked.passed, voice.warn, _progress(group, voice), group)
    if group.rank == 0:
        scores(directory)
        voice.status(show.outcome_line(outcome))
        return outcome.exit_code
    # What failed here is in rank 0's exit code; torchrun would end the others for one of ours.
    return outcome.exit_code if outcome.signal is not None else 0


def _several(models: Sequence[str], one: Callable[[str], int], group: ranks.Ranks, voice: Voice) -> int:
    """Each model in turn. One that fails costs the others nothing; a signal, a full disk or a lost device ends it all.

    Raises the first bug of ours, when everything else is done.
    """
    codes: dict[str, int] = {}
    bug: Exception | None = None
    for number, model in enumerate(models, 1):
        if group.rank == 0:
            voice.status(f"model {number} of {len(models)}: {one_line(model)}")
        try:
            with group.turn(number):
                codes[model] = one(model)
        except (StorageError, DeviceLostError):
            raise
        except Exception as problem:
            codes[model] = problem.exit_code if isinstance(problem, UserError) else 1
            bug = bug if isinstance(problem, UserError) else bug or problem
            if group.rank == 0:
                voice.warn(f"{model} failed: {problem}")
        if codes[model] >= SIGNALLED:
            return codes[model]
    if bug is not None:
        raise bug
    if group.rank:
        return 0
    failed = [model for model, code in codes.items() if code]
    voice.status(f"{len(models)} models{f', {len(failed)} failed or partial: ' if failed else ''}{', '.join(failed)}")
    return codes[models[0]] if len(set(codes.values())) == 1 else PARTIAL


def _progress(group: ranks.Ranks, voice: Voice) -> Progress:
    if group.rank:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines(voice.status)


def _price(plan: Plan, directory: Path, voice: Voice) -> None:
    rows = plan.summary(read_index(directory, voice.warn).done)
    voice.table(*show.plan_table(rows))
    voice.say(show.estimate(rows, runfile.rate(directory)))
    voice.say(f"records would go to {directory}")
