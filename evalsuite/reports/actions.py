"""What the commands of `commands.py` do: read runs, and return the text to print."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from evalsuite.names import quoted, suggest
from evalsuite.reports import formats, frame, plots
from evalsuite.reports import tables as layout
from evalsuite.store import Warn
from gdn2.errors import UserError

PUBLISHED: dict[str, layout.Published] = {"matched": "matched", "all": "all", "none": "none"}
FORMATS: dict[str, formats.Format | None] = {"text": None} | {form: form for form in formats.SUFFIXES.values()}
DEFAULT = Path("results")
NAMED = 5  # damaged records, before the rest are only counted


def tables(runs: Sequence[Path], out: Path | None, form: str, published: str, check: bool, warn: Warn) -> str:
    """The table of `runs` in format `form`; with `out` it is written there instead, or with `check` compared.

    Raises UserError for a wrong option, DataError where there are no records or `out` is not what they give.
    """
    if published not in PUBLISHED:
        raise UserError(f"published {quoted(published)} is unknown; {suggest(published, PUBLISHED)}")
    if form not in FORMATS:
        raise UserError(f"format {quoted(form)} is unknown; {suggest(form, FORMATS)}")
    if check and out is None:
        raise UserError("--check compares a file with the records: name it with --out")
    if out is not None:
        formats.format_of(out)
    table = layout.build(_load(runs, warn), PUBLISHED[published])
    if out is None:
        shown = FORMATS[form]
        return (formats.render(table, shown) if shown else formats.terminal(table, _width())).rstrip("\n")
    if check:
        formats.check(table, out)
        return f"{out} is what the records give"
    formats.write(table, out)
    return f"wrote {out}"


def plot(runs: Sequence[Path], out: Path, kinds: str, warn: Warn) -> str:
    """Draw accuracy curves and depth maps of `runs` into directory `out`, one file for each of `kinds` (png,svg,pdf).

    Raises UserError for an unknown kind, DataError where there are no records with lengths.
    """
    known = [suffix[1:] for suffix in plots.SUFFIXES]
    chosen = list(dict.fromkeys(kind.strip().lower() for kind in kinds.split(",")))
    for kind in chosen:
        if kind not in known:
            raise UserError(f"plot format {quoted(kind)} is unknown; {suggest(kind, known)}")
    records = _load(runs, warn)
    files = {name: [out / f"{name}.{kind}" for kind in chosen] for name in ("accuracy", "depth")}
    plots.accuracy(records, files["accuracy"])
    if records.frame["depth"].notna().any():
        plots.depth_heatmap(records, files["depth"])
    else:
        del files["depth"]
    return "\n".join(f"wrote {path}" for paths in files.values() for path in paths)


def _load(runs: Sequence[Path], warn: Warn) -> frame.Records:
    records = frame.load(list(runs) or [DEFAULT])
    for text in records.warnings[:NAMED]:
        warn(text)
    if len(records.warnings) > NAMED:
        warn(f"{len(records.warnings) - NAMED} more damaged records are left out")
    return records


def _width() -> int:
    """Columns of the terminal, 100 where there is none."""
    return max(60, shutil.get_terminal_size((100, 24)).columns)
