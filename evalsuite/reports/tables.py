"""The layout of the paper's Table 3 from records: models by family down, tasks and lengths across.

A measured cell holds the mean in percent, its 95 % interval and the samples behind it. Published figures stand in
columns of their own. A table is a function of the records alone: the same records give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from evalsuite.reports import paper
from evalsuite.reports.captions import described
from evalsuite.reports.cells import (
    FAMILIES,
    MIXERS,
    TASKS,
    length_label,
    member_key,
    model_key,
    rank,
    summary,
    task_label,
)
from evalsuite.reports.cells import members as cell_members
from evalsuite.reports.cells import names as called
from evalsuite.reports.compare import Group, below_best, worse_note
from evalsuite.reports.frame import Records
from evalsuite.reports.grid import Note
from gdn2.errors import DataError

Published = Literal["matched", "all", "none"]
Source = Literal["measured", "published"]
# What the name of a question set adds to the task's where one table holds several sets of one task.
_VARIANTS = ("metric", "protocol", "task_version", "data")


@dataclass(frozen=True, slots=True)
class Column:
    """One question set at one length, measured here or published."""

    task: str
    length: int  # tokens, 0 without lengths
    source: Source
    variant: tuple[tuple[str, str], ...] = ()  # (column of the records, value) that tell sets of one task apart


@dataclass(frozen=True, slots=True)
class Cell:
    """A score in percent. A published one has no more than its value; `value` is None where every sample failed."""

    value: float | None
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0
    asked: int = 0
    errors: int = 0
    prompt_min: float = float("nan")  # tokens
    prompt_mean: float = float("nan")
    mark: str = ""  # "*" where significantly worse than the best of its family and column

    @property
    def partial(self) -> bool:
        return self.n < self.asked


@dataclass(frozen=True, slots=True)
class Row:
    """A model. Its names came from outside: escape them. A row of published figures alone has no checkpoint."""

    family: str
    model: str  # as the records have it
    run: str  # the only run the row's records come from, "" where it may be several
    name: str  # the run's, or the model's with the checkpoint where its name is not enough
    mixer: str
    params: int
    checkpoint: str
    cells: tuple[Cell | None, ...]  # one for each column


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    n: int | None  # samples of every measured cell that is not partial, None where they differ

    def groups(self) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        """(task, variant) of the measured columns, in their order."""
        return list(dict.fromkeys((c.task, c.variant) for c in self.columns if c.source == "measured"))

    def places(self, task: str, variant: tuple[tuple[str, str], ...], source: Source) -> list[int]:
        """Indices of a group's columns; the published figures of a task belong to each of its variants."""
        return [
            i
            for i, c in enumerate(self.columns)
            if c.task == task and c.source == source and (source == "published" or c.variant == variant)
        ]


def build(records: Records, published: Published = "matched", title: str = "Accuracy by context length") -> Table:
    """The table of all scores within 0..1.

    `published` "matched" adds the paper's figures to the rows of the same mixer and family, "all" also adds rows for
    the paper's other models, "none" leaves them out. Raises DataError where there are no such scores.
    """
    cells = summary(records)
    others: list[str] = []
    if len(cells):
        others = sorted(set(cells.loc[~cells["shares"], "metric"]))
        cells = cells[cells["shares"]]
    entries: list[dict[str, Any]] = cells.to_dict("records")
    if not entries:
        held = f", only {', '.join(others)}: --rows task,metric --columns model shows them" if others else ""
        raise DataError(f"these records hold no scores within 0 to 1{held}")
    variants = _variants(entries)
    columns = _columns(entries, variants)
    _mark(records, entries, variants)
    rows = _rows(entries, variants, columns)
    if published != "none":
        columns, rows = _with_published(columns, rows, keep_all=published == "all")
    sizes = {entry["n"] for entry in entries if entry["n"] == entry["asked"]}
    notes = _notes(records, entries, others, any(c.source == "published" for c in columns))
    return Table(title, tuple(columns), tuple(rows), tuple(notes), sizes.pop() if len(sizes) == 1 else None)


def _variants(entries: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """For each task, the columns of the records in which its question sets of one length differ."""
    found: dict[str, tuple[str, ...]] = {}
    for task in {entry["task"] for entry in entries}:
        seen: dict[tuple[str, int], set[object]] = {}
        for entry in entries:
            if entry["task"] == task:
                for name in _VARIANTS:
                    seen.setdefault((name, entry["length"]), set()).add(entry[name])
        found[task] = tuple(n for n in _VARIANTS if any(len(v) > 1 for (name, _), v in seen.items() if name == n))
    return found


def _column(entry: dict[str, Any], variants: dict[str, tuple[str, ...]]) -> Column:
    variant = tuple((name, str(entry[name])) for name in variants[entry["task"]])
    return Column(entry["task"], entry["length"], "measured", variant)


def _columns(entries: list[dict[str, Any]], variants: dict[str, tuple[str, ...]]) -> list[Column]:
    found = {_column(entry, variants) for entry in entries}
    return sorted(found, key=lambda c: (rank(c.task, tuple(TASKS)), c.variant, c.length))


def _rows(entries: list[dict[str, Any]], variants: dict[str, tuple[str, ...]], columns: list[Column]) -> list[Row]:
    models: dict[tuple[Any, ...], dict[Column, Cell]] = {}
    for entry in entries:
        shown = models.setdefault(model_key(entry), {})
        missing = entry["n"] == 0
        shown[_column(entry, variants)] = Cell(
            None if missing else 100 * entry["mean"],
            100 * entry["low"],
            100 * entry["high"],
            *(entry[name] for name in ("n", "asked", "errors", "prompt_min", "prompt_mean", "mark")),
        )
    names = called(entries)
    rows = []
    for key, shown in models.items():
        family, model, checkpoint, mixer, params, run = key
        name = names[key]
        rows.append(Row(family, model, run, name, mixer, params, checkpoint, tuple(shown.get(c) for c in columns)))
    return sorted(rows, key=_row_order)


def _mark(records: Records, entries: list[dict[str, Any]], variants: dict[str, tuple[str, ...]]) -> None:
    """Mark entries significantly worse than the best of their family and column, where targets tell the pairs."""
    for entry in entries:
        entry["mark"] = ""
    if "target" not in records.frame:
        return
    members = cell_members(records)
    groups: dict[tuple[str, Column], Group] = {}
    for i, entry in enumerate(entries):
        if entry["n"]:
            found = groups.setdefault((entry["family"], _column(entry, variants)), {})
            found[str(i)] = (-entry["mean"] if entry["lower"] else entry["mean"], members[member_key(entry)])
    for _, name in below_best(list(groups.values())):
        entries[int(name)]["mark"] = "*"


def _row_order(row: Row) -> tuple[Any, ...]:
    # The published row of a model the paper trained comes before ours of the same mixer.
    return rank(row.family, FAMILIES), rank(row.mixer, MIXERS), bool(row.checkpoint), row.params, row.name


def _with_published(columns: list[Column], rows: list[Row], keep_all: bool) -> tuple[list[Column], list[Row]]:
    """Add the paper's figures for the tasks of `columns`, and with `keep_all` the paper's models that `rows` lack."""
    scores = paper.ruler_scores()
    measured = {(row.family, row.mixer) for row in rows}
    tasks = {column.task for column in columns}
    wanted = {key: value for key, value in scores.items() if key[2] in tasks and (keep_all or key[:2] in measured)}
    extra = sorted({(task, length) for _, _, task, length in wanted}, key=lambda k: (rank(k[0], tuple(TASKS)), k[1]))
    added = [Column(task, length, "published") for task, length in extra]

    def figures(family: str, mixer: str) -> tuple[Cell | None, ...]:
        found = (wanted.get((family, mixer, c.task, c.length)) for c in added)
        return tuple(None if value is None else Cell(value) for value in found)

    full = [replace(row, cells=row.cells + figures(row.family, row.mixer)) for row in rows]
    for family, mixer in dict.fromkeys(key[:2] for key in wanted):
        if (family, mixer) not in measured:
            full.append(Row(family, mixer, "", mixer, mixer, 0, "", (None,) * len(columns) + figures(family, mixer)))
    return columns + added, sorted(full, key=_row_order)


def _notes(records: Records, entries: list[dict[str, Any]], others: list[str], published: bool) -> list[Note]:
    notes = [Note("Mean score in percent, 95 % interval (Wilson; for fractional scores bootstrap over samples).")]
    if any(entry["n"] < entry["asked"] for entry in entries):
        notes.append(Note("† partial: fewer samples answered than asked."))
    if any(entry["mark"] for entry in entries):
        notes.append(worse_note("family"))
    notes.append(Note("Tokens: shortest and mean prompt of a column, counted by each model's own tokenizer."))
    notes += described(records, entries)
    if published:
        source = paper.load("table3")
        notes.append(Note(f"Paper (published): {source.source} ({source.models}); not measured here."))
    if any(entry["run"] for entry in entries):
        notes.append(Note("Runs of one model under different settings have rows of their own, named after the run."))
    if others:
        notes.append(Note("Left out, not a share of 0 to 1", tuple(others)))
    return notes


def variant_label(column: Column) -> str:
    """Name of the column's group: the task's, and what tells its question sets apart. Values came from outside."""
    shown = {"data": "data ", "task_version": "v"}
    parts = [shown.get(name, "") + (value[:8] if name == "data" else value) for name, value in column.variant]
    return task_label(column.task) + (f" ({', '.join(parts)})" if parts else "")


def column_label(column: Column) -> str:
    """Length of the column, "score" for a task without lengths."""
    return length_label(column.length) or "score"
