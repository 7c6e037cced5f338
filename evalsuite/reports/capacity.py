"""The command `capacity`: how many pairs each model's state holds, from the records of task `capacity`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from evalsuite import options as opt
from gdn2.errors import DataError

TASK, METRIC = "capacity", "recall"
HEADER = ("model", "mixer", "parameters", "protocol", "contexts", "pairs at half", "95 % interval", "measured")
_PAIRS = re.compile(r":pairs=(\d+)")
_CENSORED = {"": "", "above": ">= ", "below": "< "}


def add(app: typer.Typer, echo_table: Callable[..., None], warn: Callable[[str], None]) -> None:
    """Register the command with `app`."""

    @app.command("capacity")
    def capacity_(runs: opt.Runs = None) -> None:
        """Show how many pairs each model holds until it recalls less than half: run the task `capacity` first.

        gdn2-eval run --model gdn2-tiny --tasks capacity --samples 20
        """
        echo_table(HEADER, rows(runs or [Path("results")], warn))


def rows(runs: Sequence[Path], warn: Callable[[str], None]) -> list[tuple[object, ...]]:
    """One line for each model and each protocol but for its number of pairs. Raises DataError without records."""
    from evalsuite.reports.actions import load
    from evalsuite.reports.cells import MODEL
    from evalsuite.stats import capacity

    table = load(runs, warn).frame
    table = table[(table["task"] == TASK) & (table["metric"] == METRIC)]
    if not len(table):
        raise DataError(f"{', '.join(map(str, runs))} holds no records of task {TASK}: run it first")
    protocols = table["protocol"].astype(str)
    pairs_of = protocols.str.extract(_PAIRS)[0].astype(int)
    table = table.assign(pairs=pairs_of, shape=protocols.str.replace(_PAIRS, "", regex=True))
    keys = [*MODEL, "run_id", "task_version", "data", "shape"]
    out: list[tuple[object, ...]] = []
    for key, group in table.groupby(keys, observed=True, sort=True):
        named = dict(zip(keys, key, strict=True))
        scores = {int(pairs): part["score"].to_numpy() for pairs, part in group.groupby("pairs")}
        found = capacity(scores)
        curve = ", ".join(f"{pairs}: {values.mean():.2f}" for pairs, values in sorted(scores.items()))
        half = f"{_CENSORED[found.censored]}{found.pairs:.3g}"
        least = min(len(values) for values in scores.values())
        interval = f"{found.low:.3g} to {found.high:.3g}"
        who = (named["model"], named["mixer"], f"{named['params']:,}", named["shape"])
        out.append((*who, least, half, interval, curve))
    return out
