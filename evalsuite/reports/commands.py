"""The commands that read records: `tables`, `compare`, `paper`, `plot`, `watch`, and `plan`; `cli.py` adds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from evalsuite import options as opt
from gdn2.errors import UserError

Echo = Callable[[str], None]
EchoTable = Callable[[Sequence[str], Sequence[Sequence[object]]], None]

Out = Annotated[Path | None, typer.Option(parser=opt.directory, metavar="FILE", help="Write here: .md, .tex or .csv.")]
Form = Annotated[str, typer.Option("--format", help="text, markdown, latex or csv, where there is no --out.")]
Published = Annotated[str, typer.Option(help="The paper's figures: matched, all or none.")]
Check = Annotated[bool, typer.Option("--check", help="Compare --out with the records, write nothing.")]
Kinds = Annotated[str, typer.Option("--format", help="png, svg, pdf, separated by commas.")]
Where = Annotated[
    list[str] | None, typer.Option(help="Only records with NAME=VALUE (see `list columns`); repeatable.")
]
Down = Annotated[str, typer.Option("--rows", help="Columns of the records that make rows, separated by commas.")]
Across = Annotated[str, typer.Option("--columns", help="Columns of the records that make columns.")]
Effective = Annotated[bool, typer.Option("--effective", help="Effective context lengths instead of scores.")]


def add(app: typer.Typer, echo: Echo, echo_table: EchoTable, warn: Echo) -> None:
    """Register the commands with `app`."""
    _add_tables(app, echo, warn)
    _add_paper(app, echo, warn)
    _add_plan(app, echo, echo_table)
    _add_watch(app, echo)
    _add_plot(app, echo, warn)


def _add_plot(app: typer.Typer, echo: Echo, warn: Echo) -> None:
    @app.command()
    def plot(
        runs: opt.Runs = None,
        log: Annotated[list[Path] | None, typer.Option(help="log.jsonl of a training run; repeatable.")] = None,
        where: Where = None,
        only: Annotated[str, typer.Option(help="Names of figures, separated by commas.", show_default="all")] = "",
        out: opt.Out = Path("results/figures"),
        form: Kinds = "png,svg",
    ) -> None:
        """Draw accuracy by length and needle depth, what was retrieved instead, speed and memory, training curves.

        gdn2-eval plot --runs results --out results/figures --format pdf
        """
        from evalsuite.reports import actions

        echo(actions.plot(runs or [], log or [], where or [], actions.Figures(out, form, only), warn))


def _add_tables(app: typer.Typer, echo: Echo, warn: Echo) -> None:
    @app.command()
    def tables(
        runs: opt.Runs = None, out: Out = None, form: Form = "text", published: Published = "matched",
        check: Check = False, rows: Down = "", columns: Across = "", where: Where = None, effective: Effective = False,
    ) -> None:  # fmt: skip
        """Show scores with intervals by task and length, the paper's beside them; or by any columns of the records.

        gdn2-eval tables --runs results --rows model --columns task,length --where protocol=exact
        """
        from evalsuite.reports import actions

        shape = actions.Shape(rows, columns, effective, published)
        echo(actions.tables(runs or [], shape, where or [], actions.Output(out, form, check), warn))

    @app.command()
    def compare(
        runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, files or ids.")],
        results: Annotated[Path, typer.Option("--results", parser=opt.directory, help="Where ids are found.")] = Path(
            "results"
        ),
        where: Where = None, out: Out = None, form: Form = "text", check: Check = False,
    ) -> None:  # fmt: skip
        """Compare the first run with each other one on the same samples: paired tests, corrected for their number.

        gdn2-eval compare results/runs/A results/runs/B
        """
        from evalsuite.reports import actions

        echo(actions.compare(runs, results, where or [], actions.Output(out, form, check), warn))


def _add_paper(app: typer.Typer, echo: Echo, warn: Echo) -> None:
    @app.command()
    def paper(
        runs: opt.Runs = None,
        out: Annotated[
            Path | None, typer.Option(parser=opt.directory, metavar="DIRECTORY", help="Gets every table.")
        ] = None,
        published: Published = "all",
        where: Where = None,
        check: Check = False,
    ) -> None:
        """Write the paper's Tables 2 to 5 and Figure 2: measured here, published, and the difference.

        gdn2-eval paper --runs results --out results/tables
        """
        from evalsuite.reports import actions

        echo(actions.paper(runs or [], out, published, where or [], check, warn))


def _add_plan(app: typer.Typer, echo: Echo, echo_table: EchoTable) -> None:
    @app.command()
    def plan(
        detect: Annotated[float | None, typer.Option(help="Difference to show, in percentage points.")] = None,
        samples: Annotated[int | None, typer.Option(min=1, max=10**9, help="Samples there are, instead.")] = None,
        power: Annotated[float, typer.Option(help="Chance to find a difference that is there.")] = 0.8,
        tests: Annotated[int, typer.Option(min=1, max=10**6, help="Tests in the family, for its correction.")] = 1,
    ) -> None:
        """Say how many samples a difference between two models needs, or what a number of samples can show.

        gdn2-eval plan --detect 3
        """
        from evalsuite.stats import planning

        if (detect is None) == (samples is None):
            raise UserError("plan takes one of --detect POINTS and --samples N")
        if detect is not None:
            echo(f"samples a cell to show {detect:g} points with {100 * power:g} % power at 5 % over {tests} tests:")
            echo_table(*planning.detect(detect, power, tests))
        else:
            assert samples is not None
            echo(f"points that {samples} samples show with {100 * power:g} % power at 5 % over {tests} tests:")
            echo_table(*planning.given(samples, power, tests))
        echo("paired: the same samples for both models (compare), r the correlation of their scores")


def _add_watch(app: typer.Typer, echo: Echo) -> None:
    @app.command()
    def watch(
        run: Annotated[str, typer.Argument(help="Directory or id of a run, or its beginning.")],
        out: opt.Out = Path("results"),
        every: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between looks.")] = 2.0,
    ) -> None:
        """Watch a run: progress, scores with intervals, rate and time left. Ctrl-C ends it; the run goes on.

        gdn2-eval watch gdn2-tiny
        """
        from evalsuite import show
        from evalsuite import watch as watching

        watching.follow(show.locate(out, run), echo, every, sys.stdout.isatty())
