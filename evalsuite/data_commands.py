"""The commands of the group `data`; `cli.py` registers them and lends them its printing and the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from evalsuite import options as opt
from evalsuite.names import quoted, refuse_unusable, task_options
from gdn2 import env
from gdn2.errors import UserError

Echo = Callable[[str], None]
EchoTable = Callable[[Sequence[str], Sequence[Sequence[object]]], None]

HEADER = ("file", "records", "of", "licence", "state")
Names = Annotated[str, typer.Argument(metavar="SUITE", help="Suites, tasks or data sets, separated by commas.")]
To = Annotated[
    Path | None,
    typer.Option(parser=opt.directory, metavar="DIRECTORY", help="Data directory.", show_default="as `run` would"),
]
Home = Annotated[Path, typer.Argument(parser=opt.directory, metavar="DIRECTORY", help="Data directory.")]
OneName = Annotated[str, typer.Argument(metavar="TASK", help="Task or data set that the file is for.")]
Copy = Annotated[
    Path,
    typer.Argument(
        parser=opt.directory, metavar="FILE", help="JSON lines, Parquet, or the main file of the original distribution."
    ),
]
Length = Annotated[str, typer.Option(help="Context length, generation budget included: 4096 or 4k.")]
File = Annotated[Path, typer.Option("--out", parser=opt.directory, metavar="FILE", help="File to write, JSON lines.")]
Profile = Annotated[str, typer.Option(help="How the task is asked; see `list profiles`.")]


def add(app: typer.Typer, echo: Echo, echo_table: EchoTable, module: Callable[[str], ModuleType]) -> None:
    """Register the group `data` with `app`.

    Args:
        module: imports `tasks.NAME.commands`, which this package may not import itself.
    """
    group = typer.Typer(help="Bring, check and write data.", rich_markup_mode=None)
    app.add_typer(group, name="data")

    @group.command()
    def fetch(
        names: Names, to: To = None,
        tokenizer: Annotated[str | None, typer.Option(help="Hub name of a tokenizer to bring too.")] = None,
    ) -> None:  # fmt: skip
        """Fetch what suites read, for `run --data`. Safe to kill: the same command goes on where it stopped."""
        refuse_unusable({"tokenizer": tokenizer})
        module("data").fetch(names, _home(to), tokenizer, echo)

    @group.command()
    def check(directory: Home) -> int:
        """Compare the files of a data directory with its manifest."""
        rows, bad = module("data").check(directory)
        echo_table(HEADER, rows)
        echo(f"{bad} of {len(rows)} files are missing or changed: fetch or import them again" if bad else "all there")
        return 3 if bad else 0

    @group.command("import")
    def import_(task: OneName, file: Copy, to: To = None) -> None:
        """Take your own copy of a benchmark, for `run --data`, after checking its columns."""
        echo(module("data").import_copy(task, file, _home(to)))

    _add_ruler(group, echo, module)


def _home(to: Path | None) -> Path:
    """The data directory to write, and from here on the one in use."""
    if to is not None:
        env.use_data(to)
    return env.data_dir()


def _add_ruler(group: typer.Typer, echo: Echo, module: Callable[[str], Any]) -> None:
    @group.command()
    def ruler(
        task: Annotated[str, typer.Option(help="A RULER task, such as niah_single_2.")],
        length: Length,
        tokenizer: Annotated[str, typer.Option(help="tokenizer.json, SentencePiece model, directory or hub name.")],
        out: File,
        samples: Annotated[int, typer.Option(min=1, max=10**7, help="Samples to write.")] = 500,
        profile: Profile = "exact", seed: opt.Seed = 42, haystack: opt.Haystack = None,
        haystack_offset: opt.Offset = None, budget: opt.Budget = None,
    ) -> None:  # fmt: skip
        """Write RULER samples for use elsewhere."""
        given = dict(locals())
        refuse_unusable(given)
        from evalsuite import backends
        from evalsuite.plan import parse_lengths

        (tokens, *more) = parse_lengths(length)
        if more:
            raise UserError(f"length {quoted(length)} is more than one; a file holds one")
        commands = module("ruler")
        commands.find_task(task)
        export = commands.Export(task, tokens, out, samples, profile, seed, task_options(given))
        echo(commands.data_ruler(export, backends.open_tokenizer(tokenizer)))

    @group.command()
    def punkt() -> None:
        """Fetch NLTK's Punkt model of English, which the compatible profiles need."""
        echo(module("ruler").data_punkt())

    @group.command()
    def essays() -> None:
        """Fetch Paul Graham's essays, RULER's own haystack."""
        echo(module("ruler").data_essays())
