"""The command `probe`; `cli.py` registers it and lends it its printing and the tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evalsuite import options as opt
from evalsuite.names import quoted, refuse_unusable, suggest, task_options
from gdn2.errors import UserError

if TYPE_CHECKING:
    from evalsuite.types import Task

FindTasks = Callable[[str], "Sequence[Task]"]
Echo = Callable[..., None]  # a text, and whether it is for standard error
EchoTable = Callable[[Sequence[str], Sequence[Sequence[object]]], None]

Model = Annotated[str, typer.Option(help="Name of a model of ours, or its checkpoint.")]
TaskName = Annotated[str, typer.Option(help="A task that hides a needle, such as niah_multikey_1.")]
Length = Annotated[str, typer.Option(help="Context length, generation budget included: 4096 or 4k.")]
Samples = Annotated[int, typer.Option(min=1, max=10**5, help="First N samples of the task.")]
Block = Annotated[
    int | None,
    typer.Option(min=64, max=2**24, help="Tokens between two looks, a multiple of 64.", show_default="length / 64"),
]
Profile = Annotated[str | None, typer.Option(help="How the task is asked; see `list profiles`.")]
Kinds = Annotated[str, typer.Option("--format", help="Of the plots: png, svg, pdf, separated by commas.")]
KINDS = ("png", "svg", "pdf")
LENT = ("echo", "echo_table", "warn", "find")  # what the command's function sees of `add`


def add(app: typer.Typer, echo: Echo, echo_table: EchoTable, warn: Echo, find: FindTasks) -> None:
    """Register the command with `app`; `find` returns the tasks of a list of names."""

    @app.command()
    def probe(
        model: Model, task: TaskName, length: Length, samples: Samples = 20, out: opt.Out = Path("results/probe"),
        block: Block = None, profile: Profile = None, haystack: opt.Haystack = None,
        haystack_offset: opt.Offset = None, budget: opt.Budget = None, seed: opt.Seed = 42,
        device: opt.Device = "auto", dtype: opt.Dtype = None, form: Kinds = "png,svg",
        allow_pickle_weights: opt.Pickles = None, allow_bad_values: opt.BadValues = None, given: opt.Values = None,
        tokenizer: opt.TokenizerSource = None, bos: opt.Bos = None, offline: opt.Offline = None,
    ) -> int:  # fmt: skip
        """Look inside the memory: what a model's states keep of the needle, and what takes the rest. Safe to kill.

        gdn2-eval probe --model gdn2-tiny --task niah_single_1 --length 4k
        """
        passed = {name: str(value) for name, value in locals().items() if value is not None and name not in LENT}
        refuse_unusable(passed)
        kinds, status = _kinds(form), partial(echo, error=True)
        from evalsuite import backends
        from evalsuite.plan import Ask, parse_lengths
        from evalsuite.probe import plots, records, run, summary
        from evalsuite.progress import Bar, Lines
        from evalsuite.store import check_writable

        lengths = parse_lengths(length)
        if len(lengths) > 1:
            raise UserError(f"length {quoted(length)} is more than one: a probe looks at one")
        ask = Ask(lengths, samples, profile, seed, task_options(passed))
        found, *others = find(task)
        if others:
            raise UserError(f"task {quoted(task)} is {1 + len(others)} tasks: a probe looks at one")
        asked = run.Asked(found, ask, block, out, passed)
        check_writable(out)
        backend = backends.load(model, device=device, dtype=dtype, given=passed)
        progress = Bar() if sys.stderr.isatty() else Lines(status)
        outcome = run.probe(backend, asked, warn, status, progress)
        status(f"{outcome.probed} samples probed, {outcome.before} were there before, {outcome.failed} failed")
        read = records.load(outcome.directory, warn)
        if not read.samples:
            return 5
        for header, rows in (summary.table(read), summary.worst(read)):
            echo_table(header, rows)
            echo("")
        for line in summary.notes(read):
            echo(line)
        for path in [*plots.draw(read, kinds), *plots.compare(records.beside(read, warn), kinds)]:
            echo(f"wrote {path}")
        return 5 if outcome.failed else 0


def _kinds(form: str) -> list[str]:
    chosen = list(dict.fromkeys(kind.strip().lower() for kind in form.split(",")))
    for kind in chosen:
        if kind not in KINDS:
            raise UserError(f"plot format {quoted(kind)} is unknown; {suggest(kind, KINDS)}")
    return chosen
