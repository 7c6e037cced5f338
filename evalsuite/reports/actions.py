"""What the commands of `commands.py` do: read runs, and return the text to print."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalsuite import show
from evalsuite.names import aligned, one_line, quoted, slug, suggest
from evalsuite.reports import compare as comparing
from evalsuite.reports import (
    drawing,
    files,
    formats,
    frame,
    gridformats,
    papertables,
    pivot,
    plots,
    retrieved,
    throughput,
    training,
)
from evalsuite.reports import tables as layout
from evalsuite.reports.cells import TASKS, length_label, rank, shown, summary
from evalsuite.reports.grid import Grid
from evalsuite.reports.select import select
from evalsuite.store import Warn
from gdn2.errors import DataError, UserError

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED: dict[str, layout.Published] = {"matched": "matched", "all": "all", "none": "none"}
FORMATS: dict[str, files.Format | None] = {"text": None} | {form: form for form in files.SUFFIXES.values()}
DEFAULT = Path("results")
NAMED = 5  # damaged records, before the rest are only counted
PANELS = 12  # of one figure
PAPER_SUFFIXES = {".txt": "text", **files.SUFFIXES}


@dataclass(frozen=True, slots=True)
class Output:
    """Where a table goes: to `out`, or in format `form` to the terminal; `check` compares `out` with the records."""

    out: Path | None = None
    form: str = "text"
    check: bool = False

    def refuse_wrong(self) -> None:
        """Raise UserError for options that cannot be."""
        if self.form not in FORMATS:
            raise UserError(f"format {quoted(self.form)} is unknown; {suggest(self.form, FORMATS)}")
        if self.check and self.out is None:
            raise UserError("--check compares a file with the records: name it with --out")
        if self.out is not None:
            files.format_of(self.out)

    def put(self, render: Callable[[str], str]) -> str:
        """Render in the format wanted and return what to print. Raises DataError where `out` is another table."""
        if self.out is None:
            return render(self.form).rstrip("\n")
        text = render(files.format_of(self.out))
        if self.check:
            files.check(text, self.out)
            return f"{self.out} is what the records give"
        files.write(text, self.out)
        return f"wrote {self.out}"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a table shows: the layout of the paper's Table 3, or columns of the records down and across."""

    down: str = ""
    across: str = ""
    effective: bool = False
    published: str = "matched"


def tables(runs: Sequence[Path], shape: Shape, where: Sequence[str], output: Output, warn: Warn) -> str:
    """The table of `runs`.

    Raises UserError for a wrong option, DataError where there are no records or `out` is not what they give.
    """
    if shape.published not in PUBLISHED:
        raise UserError(f"published {quoted(shape.published)} is unknown; {suggest(shape.published, PUBLISHED)}")
    if shape.effective and (shape.down or shape.across):
        raise UserError("--effective has rows and columns of its own: leave --rows and --columns out")
    output.refuse_wrong()
    records = select(load(runs, warn, targets=True), where)
    if shape.effective:
        return output.put(_renderer(pivot.effective(records)))
    if shape.down or shape.across:
        names = [[n.strip() for n in text.split(",") if n.strip()] for text in (shape.down, shape.across)]
        down = names[0] or ["model"]
        across = names[1] or [name for name in ("task", "length") if name not in down]
        if twice := [name for name, count in Counter(down + across).items() if count > 1]:
            raise UserError(f"column {quoted(twice[0])} stands twice in --rows and --columns; once is enough")
        return output.put(_renderer(pivot.build(records, down, across)))
    table = layout.build(records, PUBLISHED[shape.published])

    def render(form: str) -> str:
        chosen = FORMATS[form]
        return formats.render(table, chosen) if chosen else formats.terminal(table, _width())

    return output.put(render)


def _renderer(grid: Grid) -> Callable[[str], str]:
    return lambda form: gridformats.terminal(grid, _width()) if form == "text" else gridformats.RENDER[form](grid)


def compare(runs: Sequence[str], results: Path, where: Sequence[str], output: Output, warn: Warn) -> str:
    """Paired tests of the first of `runs` (directories, files or ids below `results`) against the others."""
    output.refuse_wrong()
    paths = [Path(run) if Path(run).is_file() else show.locate(results, run) for run in runs]
    loaded = [select(load([path], warn, targets=True), where) for path in paths]
    return output.put(_renderer(comparing.build(loaded)))


def paper(
    runs: Sequence[Path], out: Path | None, published: str, where: Sequence[str], check: bool, warn: Warn
) -> str:
    """The paper's tables and Figure 2: the text, or with `out` what was written there, or with `check` compared."""
    if published not in PUBLISHED:
        raise UserError(f"published {quoted(published)} is unknown; {suggest(published, PUBLISHED)}")
    if check and out is None:
        raise UserError("--check compares a directory with the records: name it with --out")
    records = select(load(throughput.beside_records(runs), warn, targets=True), where)
    grids = {item: papertables.build(item, records, PUBLISHED[published]) for item in papertables.TABLES}
    speeds = throughput.load(list(runs) or [DEFAULT])
    grids["figure2"] = throughput.grid(speeds, PUBLISHED[published])
    if out is None:
        return "\n\n".join(gridformats.terminal(grid, _width()).rstrip("\n") for grid in grids.values())
    for name, grid in grids.items():
        for suffix, form in PAPER_SUFFIXES.items():
            (files.check if check else files.write)(gridformats.RENDER[form](grid), out / f"{name}{suffix}")
    if check:
        return f"{out} is what the records give"
    throughput.plot(speeds, [out / f"figure2{suffix}" for suffix in drawing.SUFFIXES])
    return f"wrote tables 2 to 5 and figure 2 to {out}"


def trace(directory: Path, where: Sequence[str], warn: Warn) -> list[str]:
    """The records of a run that fit `where`, one a line, and below them the number a table makes of each cell."""
    records = select(load([directory], warn, targets=True, outputs=True), where)
    header = ("task", "length", "metric", "sample", "seed", "score", "outcome", "depth", "target", "output")
    rows = records.frame.sort_values(["task", "length", "metric", "seed", "sample_id"], key=_natural)
    lines = aligned(
        header,
        [
            (r.task, length_label(r.length) or "-", r.metric, r.sample_id, r.seed)
            + ("-" if r.item else f"{r.score:.4g}", r.outcome or "-")
            + ("-" if r.depth != r.depth else f"{100 * r.depth:.0f} %", _short(r.target), _short(r.output))
            for r in rows.itertuples()
        ],
    )
    lines += [f"error: {r.task} {r.sample_id}: {_short(r.error)}" for r in records.errors.itertuples()]
    for cell in summary(records).to_dict("records"):
        value, low, high = shown(cell) if cell["n"] else (float("nan"),) * 3
        name = f"{cell['task']} {length_label(cell['length'])} {cell['metric']}".replace("  ", " ")
        lines.append(f"{name}: {value:.2f} [{low:.2f} to {high:.2f}] from {cell['n']} of {cell['asked']} samples")
    return lines


def _natural(column: pd.Series[Any]) -> pd.Series[Any]:
    """Sort numbers in texts by value, where all texts are numbers."""
    texts = column.astype("str")
    return texts.astype("int64") if texts.str.fullmatch("[0-9]{1,18}").all() else texts


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= 40 else line[:39] + "…"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure that can be drawn: the end of its files' names, and what writes them."""

    name: str
    draw: Callable[[list[Path]], None]


@dataclass(frozen=True, slots=True)
class Figures:
    """Where figures go: one file for each of `kinds` (png,svg,pdf) in `out`; `only` names the figures, "" all."""

    out: Path
    kinds: str = "png,svg"
    only: str = ""


def plot(runs: Sequence[Path], logs: Sequence[Path], where: Sequence[str], figures: Figures, warn: Warn) -> str:
    """Draw what `runs` and training `logs` hold.

    With logs and no runs only the logs are drawn. Raises UserError for an unknown kind or name, DataError where there
    is nothing to draw.
    """
    out = figures.out
    known = [suffix[1:] for suffix in drawing.SUFFIXES]
    chosen = list(dict.fromkeys(kind.strip().lower() for kind in figures.kinds.split(",")))
    for kind in chosen:
        if kind not in known:
            raise UserError(f"plot format {quoted(kind)} is unknown; {suggest(kind, known)}")
    drawings = [Drawing("training", partial(training.plot, [training.read(log) for log in logs]))] if logs else []
    if runs or not logs:
        drawings += _of_records(select(load(throughput.beside_records(runs), warn), where))
        if speeds := throughput.load(list(runs) or [DEFAULT]):
            drawings.append(Drawing("speed", partial(throughput.against_length, speeds)))
            if any(speed.kind == "training" for speed in speeds):
                drawings.append(Drawing("figure2", partial(throughput.plot, speeds)))
    if figures.only:
        names = [drawn.name for drawn in drawings]
        wanted = [name.strip() for name in figures.only.split(",")]
        for name in wanted:
            if name not in names:
                raise UserError(f"figure {quoted(name)} cannot be drawn from this; {suggest(name, names)}")
        drawings = [drawn for drawn in drawings if drawn.name in wanted]
    for drawn in drawings:
        drawn.draw([out / f"{drawn.name}.{kind}" for kind in chosen])
    return "\n".join(f"wrote {out / f'{drawn.name}.{kind}'}" for drawn in drawings for kind in chosen)


def _of_records(records: frame.Records) -> list[Drawing]:
    """Accuracy, depth and what was retrieved, of each task, and of all in one figure where that is not too large."""
    rows = records.frame[records.frame["length"] > 0]
    tasks = sorted(rows["task"].unique(), key=lambda name: rank(name, tuple(TASKS)))
    if not tasks:
        raise DataError("these records hold no task with lengths to plot")
    drawings = [Drawing("accuracy", partial(plots.accuracy, records))]
    if len(tasks) > 1:
        drawings += [Drawing(f"accuracy-{slug(t)}", partial(plots.accuracy, records, task=t)) for t in tasks]
    several: list[tuple[str, Callable[..., None], object]] = [
        ("depth", plots.depth_heatmap, rows["depth"].notna()),
        ("retrieved", retrieved.plot, rows["outcome"].astype("str").map(retrieved.category) != ""),
    ]
    for name, draw, kept in several:
        places = rows.loc[kept, ["model", "checkpoint", "task"]].drop_duplicates()
        held = set(places["task"])
        if 0 < len(places) <= PANELS:
            drawings.append(Drawing(name, partial(draw, records)))
        if len(held) > 1:
            drawings += [Drawing(f"{name}-{slug(t)}", partial(draw, records, task=t)) for t in tasks if t in held]
    return drawings


def load(runs: Sequence[Path], warn: Warn, targets: bool = False, outputs: bool = False) -> frame.Records:
    """The records of `runs`, or of the results directory here; `warn` is told of damaged ones."""
    texts = [name for name, kept in (("target", targets), ("output", outputs)) if kept]
    records = frame.load(list(runs) or [DEFAULT], texts=texts)
    for text in records.warnings[:NAMED]:
        warn(text)
    if len(records.warnings) > NAMED:
        warn(f"{len(records.warnings) - NAMED} more damaged records are left out")
    return records


def _width() -> int:
    """Columns of the terminal, 100 where there is none."""
    return max(60, shutil.get_terminal_size((100, 24)).columns)
