"""gdn2-eval: run evaluations, rebuild the paper's tables, draw the plots.

One function a command; what is heavy is imported inside them. Every text goes out through `echo`, which takes out what
a terminal would obey.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evalsuite import checkpoints, data_commands
from evalsuite import options as opt
from evalsuite.bench import commands as bench
from evalsuite.interrupt import Interrupted, Signals
from evalsuite.names import aligned, one_line, plain, quoted, refuse_unusable, task_options
from evalsuite.probe import commands as probing
from evalsuite.reports import capacity
from evalsuite.reports import commands as reports
from evalsuite.reports.page import commands as page
from gdn2 import env
from gdn2.errors import StorageError, UserError

if TYPE_CHECKING:
    from evalsuite.schema import Record
    from evalsuite.types import Task

app = typer.Typer(
    name="gdn2-eval",
    help="Evaluation harness for recurrent and hybrid language models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# typer keeps its own copy of click: the base of all its usage errors is reached through one of them.
_USAGE: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Listed(StrEnum):
    """What `list` can list."""

    models = "models"
    tasks = "tasks"
    profiles = "profiles"
    runs = "runs"
    columns = "columns"
    formats = "formats"


def echo(text: str = "", *, error: bool = False) -> None:
    """Print `text`, made harmless. A reader who went away is no failure; a full disk is."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(plain(text), file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise StorageError(f"cannot write standard output: {problem.strerror}") from None


def echo_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; those of numbers to the right."""
    for line in aligned(header, rows):
        echo(line)


def warn(text: str) -> None:
    """Say `text` on one line of standard error."""
    echo(f"warning: {one_line(text)}", error=True)


def find_tasks(names: str) -> Sequence[Task]:
    """Tasks and suites by name."""
    import tasks as registry

    return registry.resolve(names)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="Models (see `list models`) or checkpoints, comma-separated; or: zoo.")],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma-separated (see `list tasks`); or lm_eval:NAME.")],
    lengths: Annotated[
        str, typer.Option(help="Context lengths, for tasks that have them: 1k,2k,4096,1m.")
    ] = "1k,2k,4k",
    samples: Annotated[
        int | None, typer.Option(min=1, max=10**7, help="First N samples of each task and length.", show_default="all")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="How tasks are asked; see `list profiles`.")] = None,
    haystack: opt.Haystack = None,
    seed: opt.Seed = 42,
    out: opt.Out = Path("results"),
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=64, max=2**24, help="Prompt tokens read at once; never changes an answer.", show_default="the device's"
        ),
    ] = None,
    haystack_offset: opt.Offset = None,
    budget: opt.Budget = None,
    allow_pickle_weights: opt.Pickles = None, allow_bad_values: opt.BadValues = None, given: opt.Values = None,
    tokenizer: opt.TokenizerSource = None, bos: opt.Bos = None, offline: opt.Offline = None,
    data: opt.Data = None,
    no_prefix_sharing: Annotated[
        bool | None, typer.Option("--no-prefix-sharing", help="Read what prompts have in common every time.")
    ] = None,
    fast: opt.Fast = None, lm_eval_rounding: opt.LmEvalRounding = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked, and ask nothing.")] = False,
) -> None:  # fmt: skip
    """Evaluate a model on tasks. Safe to kill: the same command goes on where it stopped.

    gdn2-eval run --model gdn2-tiny --tasks ruler --lengths 1k,2k,4k
    """
    passed = {name: str(value) for name, value in locals().items() if value is not None and name != "dry_run"}
    refuse_unusable(passed)
    if data is not None:
        env.use_data(data)

    import tasks as registry
    from evalsuite.evaluate import Asked, Voice, evaluate

    asked = Asked(
        model, registry.resolve(tasks), lengths, samples, profile, seed, out, device, dtype, batch_tokens,
        not no_prefix_sharing, passed,
    )  # fmt: skip
    voice = Voice(echo, echo_table, lambda text: echo(text, error=True), warn)
    raise typer.Exit(evaluate(asked, voice, dry_run, echo_scores))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file; the zoo's own are in gdn2/zoo.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", parser=opt.directory, metavar="DIRECTORY", help="Gets log and model.")],
    preset: Annotated[str | None, typer.Option(help="Train this one instead of the preset of CONFIG.")] = None,
    device: opt.Device = "auto",
) -> None:
    """Train a model. Safe to kill: the same command goes on where it stopped.

    gdn2-eval train gdn2/zoo/gdn2-tiny.toml --out results/gdn2-tiny
    """
    import torch

    from gdn2.train.config import load_config
    from gdn2.train.loop import train as go
    from tasks.ruler.episodes import open_episodes

    settings = load_config(config, preset)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device} is not here; choose cpu")
    outcome = go(settings, out, {"episodes": open_episodes}, device, say=echo)
    if outcome.signal is not None:
        raise Interrupted(outcome.signal)
    echo(f"the model is in {outcome.model}")


@app.command("list")
def list_(
    what: Annotated[Listed, typer.Argument(metavar="WHAT", help="models, tasks, profiles, runs, columns or formats.")],
    out: opt.Out = Path("results"),
    long: Annotated[bool, typer.Option("--long", help="Of models: presets too, and what each costs.")] = False,
) -> None:
    """List models, tasks, profiles, runs, the columns of a record, or the formats of checkpoints."""
    if what is Listed.models:
        from evalsuite import backends

        if long:
            from evalsuite.backends import looking

            echo_table(looking.COSTS, looking.cost_rows())
        else:
            echo_table(("model", "what it is"), list(backends.names().items()))
    elif what is Listed.runs:
        from evalsuite import show as reader

        echo_table(reader.Run._fields, reader.runs(out))
    elif what is Listed.formats:
        from evalsuite.backends import looking

        echo_table(("format", "model type", "what it is"), looking.format_rows())
    elif what is Listed.columns:
        from evalsuite import schema

        echo_table(("column", "type", "meaning"), schema.table())
    else:
        import tasks as registry

        known = [registry.get(name) for name in registry.names()]
        if what is Listed.tasks:
            echo_table(
                ("task", "suite", "version", "lengths", "profiles"),
                [(t.name, t.suite, t.version, "yes" if t.has_lengths else "no", ", ".join(t.protocols)) for t in known],
            )
            echo()
            echo_table(("suite", "tasks"), [(name, ", ".join(part)) for name, part in registry.suites().items()])
        else:
            from evalsuite import show as reader

            names = sorted({(t.suite, p, "yes" if p == t.protocols[0] else "") for t in known for p in t.protocols})
            echo_table(("suite", "profile", "default"), names)
            echo()
            echo_table(*reader.field_table(known))


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Id of a run, or its beginning (see `list runs`); or: checkpoint PATH.")],
    path: Annotated[str | None, typer.Argument(help="A checkpoint, to look at without loading it.")] = None,
    sample: Annotated[str | None, typer.Option(help="Show the records and the prompt of this sample.")] = None,
    where: reports.Where = None,
    out: opt.Out = Path("results"),
    allow_pickle_weights: opt.Pickles = None,
    given: opt.Values = None,
) -> None:
    """Show what a run is and scored, or one of its samples; or what a checkpoint is and whether it would be refused."""
    from evalsuite import show as reader

    if path is not None:
        if run != "checkpoint":
            raise UserError(f"show takes one run, or: checkpoint PATH; got {run} {path}")
        from evalsuite.backends import looking

        lines = list(looking.checkpoint_lines(path, {"allow_pickle_weights": allow_pickle_weights, "given": given}))
        for name, value in lines:
            echo(f"{one_line(name):14} {one_line(value)}")
        raise typer.Exit(4 if lines[-1][0] == "refused" else 0)
    directory = reader.locate(out, run)
    if where:
        from evalsuite.reports import actions

        for line in actions.trace(directory, where, warn):
            echo(line)
        return
    if sample is None:
        for name, value in reader.settings(directory):
            echo(f"{one_line(name):28} {one_line(value)}")
        echo()
        echo_scores(directory)
        return
    records = reader.sample(directory, sample, warn)
    for record in records:
        for name, value in asdict(record).items():
            echo(f"{name:18} {value if name == 'output' else one_line(str(value))}")
        echo()
    echo_prompts(records, reader.passed(directory))


bench.add(app, echo, echo_table)
checkpoints.add(app, echo)
reports.add(app, echo, echo_table, warn)
capacity.add(app, echo_table, warn)
data_commands.add(app, echo, echo_table, lambda name: importlib.import_module(f"tasks.{name}.commands"))
page.add(app, echo, warn, find_tasks)
probing.add(app, echo, echo_table, warn, find_tasks)


def echo_prompts(records: list[Record], passed: dict[str, str]) -> None:
    """Print the prompt of each sample among `records`, where the same one can be made again."""
    from evalsuite import backends
    from evalsuite import show as reader

    if "data" in passed:
        env.use_data(Path(passed["data"]))
    backend = backends.load(passed["model"], device=passed["device"], dtype=passed.get("dtype"), given=passed)
    for record in {record.key: record for record in records}.values():
        title = f"{record.task} at {record.length}, sample {record.sample_id}"
        made = reader.prompts(record, backend, find_tasks, task_options(passed))
        if made is None:
            echo(f"{title}: the prompt cannot be made again (task, model or haystack have changed)")
        for text in made or ():
            echo(f"{title}: the prompt, {len(text)} characters")
            echo(reader.abridged(text))


def echo_scores(directory: Path) -> None:
    """Print the mean of every metric of a run."""
    from evalsuite import runfile
    from evalsuite import show as reader
    from evalsuite.store import read_records

    scores = reader.cells(read_records(directory, warn))
    scores += reader.averaged(runfile.read(directory), scores)
    echo_table(*reader.score_table(scores, reader.complete(directory)))
    for text in dict.fromkeys(score.problem for score in scores if score.problem):
        warn(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see DESIGN.md)."""
    env.let_idle_threads_sleep()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    try:
        with Signals():
            try:
                code = command.main(arguments, prog_name="gdn2-eval", standalone_mode=False)
                return code if isinstance(code, int) else 0
            except UserError as problem:
                return _refuse(str(problem), problem.exit_code)
            except _USAGE as problem:
                message = problem.format_message().replace("Value error, ", "").rstrip(".")
                return _refuse(f"{message}; see gdn2-eval --help", 2)
            except typer.Abort:
                return _refuse("aborted", 2)
            except OSError as problem:
                if problem.errno != errno.ENAMETOOLONG:
                    raise
                return _refuse(f"{quoted(problem.filename)} is too long for a path", 2)
    except Interrupted as problem:
        return _refuse(str(problem), 128 + problem.number)
    except Exception as problem:
        return _report(problem)


def _refuse(message: str, code: int) -> int:
    with suppress(UserError):
        echo(f"error: {one_line(message)}", error=True)
    return code


def _report(problem: Exception) -> int:
    """Save the traceback of a bug of ours and say where it is."""
    descriptor, path = tempfile.mkstemp(prefix="gdn2-eval-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(problem)))
    return _refuse(f"a bug of ours: {type(problem).__name__}: {problem}; the traceback is in {path}", 1)


if __name__ == "__main__":
    sys.exit(main())
