"""The command `report`; `cli.py` registers it and lends it its printing and the registry of tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evalsuite.names import quoted
from evalsuite.options import Runs, directory
from evalsuite.reports.commands import Where
from gdn2.errors import UserError

if TYPE_CHECKING:
    from evalsuite.types import Task

Echo = Callable[[str], None]


def add(app: typer.Typer, echo: Echo, warn: Echo, resolve: Callable[[str], Sequence[Task]]) -> None:
    """Register the command with `app`."""

    @app.command()
    def report(
        runs: Runs = None,
        out: Annotated[
            Path, typer.Option("--out", parser=directory, metavar="FILE", help="The page: a file that ends in .html.")
        ] = Path("report.html"),
        prompts: Annotated[
            int, typer.Option(min=0, max=1000, help="Samples of each task and length whose prompt is in the page.")
        ] = 20,
        where: Where = None,
    ) -> None:
        """Write one HTML page of scores, curves, depth maps and samples, to open in any browser without a network.

        gdn2-eval report --runs results --out report.html
        """
        if out.suffix.lower() != ".html":
            raise UserError(f"page {quoted(out)} must end in .html")
        from evalsuite.progress import Bar, Silent
        from evalsuite.reports.page.build import Wanted, write

        progress = Bar() if sys.stderr.isatty() else Silent()
        wanted = Wanted(runs or [Path("results")], where or [], prompts)
        echo(write(wanted, out, resolve, progress, warn))
