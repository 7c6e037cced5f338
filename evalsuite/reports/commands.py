"""The commands `tables` and `plot`; `cli.py` registers them and lends them its printing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from evalsuite import options as opt

Echo = Callable[[str], None]

Out = Annotated[Path | None, typer.Option(parser=opt.directory, metavar="FILE", help="Write here: .md, .tex or .csv.")]
Form = Annotated[str, typer.Option("--format", help="text, markdown, latex or csv, where there is no --out.")]
Published = Annotated[str, typer.Option(help="The paper's figures: matched, all or none.")]
Check = Annotated[bool, typer.Option("--check", help="Compare --out with the records, write nothing.")]
Kinds = Annotated[str, typer.Option("--format", help="png, svg, pdf, separated by commas.")]


def add(app: typer.Typer, echo: Echo, warn: Echo) -> None:
    """Register the commands with `app`."""

    @app.command()
    def tables(
        runs: opt.Runs = None, out: Out = None, form: Form = "text", published: Published = "matched",
        check: Check = False,
    ) -> None:  # fmt: skip
        """Show scores by task and context length with intervals, the paper's beside them.

        gdn2-eval tables --runs results --out results/tables/ruler.md
        """
        from evalsuite.reports import actions

        echo(actions.tables(runs or [], out, form, published, check, warn))

    @app.command()
    def plot(runs: opt.Runs = None, out: opt.Out = Path("results/figures"), form: Kinds = "png,svg") -> None:
        """Draw accuracy against context length, and by the depth of the needle."""
        from evalsuite.reports import actions

        echo(actions.plot(runs or [], out, form, warn))
