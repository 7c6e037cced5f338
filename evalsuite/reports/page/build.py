"""From runs to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalsuite import runfile, show
from evalsuite.progress import Progress, Silent
from evalsuite.reports import frame
from evalsuite.reports.page import content, prompts, samples, template
from evalsuite.store import Warn, storage, write_file

WARNINGS = 20  # damaged records named in a page


def write(
    paths: Sequence[Path], out: Path, count: int, resolve: prompts.Resolve, progress: Progress, warn: Warn
) -> str:
    """Write the page of the runs below `paths` to `out`; what to say about it.

    Args:
        count: samples of each cell whose prompts are shown.
        resolve: tasks by name.

    Raises DataError where there are no records.
    """
    made = page(paths, count, resolve, progress)
    for text in made["warnings"]:
        warn(text)
    written = template.render(made).encode()
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, written)
    shown, total = made["samples"]["shown"], made["samples"]["total"]
    of = "" if shown == total else f" of {total:,}"
    return f"wrote {out}: {shown:,}{of} samples, {len(written) / 1e6:.1f} MB"


def page(
    paths: Sequence[Path], count: int, resolve: prompts.Resolve, progress: Progress | None = None
) -> dict[str, Any]:
    """What the page says: a function of the records, their run.json and, for prompts, of the tasks."""
    records = frame.load(paths)
    cells = content.Cells(records)
    rows, cap = samples.choose(cells.rows)
    parts, reasons = prompts.excerpts(paths, rows, count, resolve, progress or Silent()) if count else ({}, [])
    warnings = list(records.warnings[:WARNINGS])
    if (more := len(records.warnings) - WARNINGS) > 0:
        warnings.append(f"{more} more damaged records are left out")
    return {
        "runs": cells.runs(_statuses(paths)),
        "models": cells.models,
        "sets": cells.sets,
        "cells": cells.cells,
        "depth": cells.depth(),
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
