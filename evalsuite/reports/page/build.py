"""From runs to a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalsuite import runfile, show
from evalsuite.progress import Progress
from evalsuite.reports import frame
from evalsuite.reports.page import content, prompts, samples, template
from evalsuite.reports.select import select
from evalsuite.store import Warn, storage, write_file

WARNINGS = 20  # damaged records named in a page


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a page is to hold: the runs below `paths`, of their records those that fit `where`, and prompts.

    `where` as for `evalsuite.reports.select`; `prompts` is how many samples of each cell show theirs.
    """

    paths: Sequence[Path]
    where: Sequence[str] = ()
    prompts: int = 20


def write(wanted: Wanted, out: Path, resolve: prompts.Resolve, progress: Progress, warn: Warn) -> str:
    """Write the page to `out`, with the tasks that `resolve` gives by name; what to say about it.

    Raises DataError where there are no records, UserError for a wrong filter.
    """
    made = page(wanted, resolve, progress)
    for text in made["warnings"]:
        warn(text)
    written = template.render(made).encode()
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, written)
    shown, total = made["samples"]["shown"], made["samples"]["total"]
    of = "" if shown == total else f" of {total:,}"
    return f"wrote {out}: {shown:,}{of} records, {len(written) / 1e6:.1f} MB"


def page(wanted: Wanted, resolve: prompts.Resolve, progress: Progress) -> dict[str, Any]:
    """What the page says: a function of the records, their run.json and, for prompts, of the tasks."""
    paths, count = wanted.paths, wanted.prompts
    records = select(frame.load(paths), wanted.where)
    cells = content.Cells(records)
    rows, cap = samples.choose(cells.rows)
    parts, reasons = prompts.excerpts(paths, rows, count, resolve, progress) if count else ({}, [])
    warnings = list(records.warnings[:WARNINGS])
    if (more := len(records.warnings) - WARNINGS) > 0:
        warnings.append(f"{more} more damaged records are left out")
    return {
        "where": list(wanted.where),
        "runs": cells.runs(_statuses(paths), part=bool(wanted.where)),
        "models": cells.models,
        "sets": cells.sets,
        "cells": cells.cells,
        "depth": cells.depth(),
        "effective": cells.effective(),
        "trained": content.train_lengths(records),
        "samples": {
            "total": len(cells.rows),
            "shown": len(rows),
            "cap": cap,
            **samples.columns(rows, samples.texts(paths, rows)),
            **_placed(rows["key"].astype("str").tolist(), parts),
        },
        "prompts": {"count": count, "reasons": reasons},
        "warnings": warnings,
    }


def _placed(keys: Sequence[str], parts: dict[str, list[prompts.Part]]) -> dict[str, Any]:
    """Each different excerpt once, and each row's place among them, -1 where it has none."""
    places: dict[tuple[prompts.Part, ...], int] = {}
    found = [places.setdefault(tuple(parts[key]), len(places)) if key in parts else -1 for key in keys]
    return {"excerpt": found, "excerpts": list(places)}


def _statuses(paths: Sequence[Path]) -> dict[str, str]:
    runs = [run for path in paths for run in frame.expand(path) if (run / runfile.NAME).is_file()]
    return {run.name: show.status(run, runfile.read(run)) for run in runs}
