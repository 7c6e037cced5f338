"""Any table over the cells of records: chosen columns of the records down, others across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evalsuite.names import quoted, suggest
from evalsuite.reports import cells, compare
from evalsuite.reports.captions import described
from evalsuite.reports.frame import Records
from evalsuite.reports.grid import PLACED, Cell, Figure, Grid, Head, Line, Note, placed
from evalsuite.stats import Definition, effective_length_of_average
from gdn2.errors import DataError, UserError

if TYPE_CHECKING:
    import pandas as pd

NAMES = (*cells.CELL, "run")
ORDERS: dict[str, tuple[str, ...]] = {"family": cells.FAMILIES, "mixer": cells.MIXERS, "task": tuple(cells.TASKS)}
THRESHOLDS: dict[Definition, str] = {"absolute": "85.6 %", "relative": "85 % of own"}


def build(records: Records, down: Sequence[str], across: Sequence[str]) -> Grid:
    """Means by the columns `down` and `across`, both names of `NAMES`.

    Raises UserError for an unknown name, or where two question sets or models would fall on one place.
    """
    for name in (*down, *across):
        if name not in NAMES:
            raise UserError(f"column {quoted(name)} is unknown; {suggest(name, NAMES)}")
    entries: list[dict[str, Any]] = cells.summary(records).to_dict("records")
    if not entries:
        raise DataError("these records hold no scores")
    placed_at = _places(entries, down, across)
    members = cells.members(records)
    lefts = sorted({left for left, _ in placed_at}, key=lambda key: _order(down, key))
    tops = sorted({top for _, top in placed_at}, key=lambda key: _order(across, key))
    heads = [_head(across, top, placed_at) for top in tops]
    compared = {"model"} <= set(down) <= {*cells.MODEL, "run"}  # a place among lengths or tasks would mean nothing
    columns: list[list[Figure | None]] = []
    groups: list[compare.Group] = []
    for top, head in zip(tops, heads, strict=True):
        found = [placed_at.get((left, top)) for left in lefts]
        figures = [figure(entry) if entry else None for entry in found]
        columns.append(placed(figures, head.decimals, head.lower) if compared else figures)
        groups.append(
            {
                str(i): ((-1 if head.lower else 1) * entry["mean"], rows)
                for i, entry in enumerate(found)
                if entry and (rows := members.get(cells.member_key(entry))) is not None
            }
        )
    marked = compare.below_best(groups) if compared else set()
    for column, line in marked:
        worse = columns[column][int(line)]
        assert worse is not None
        columns[column][int(line)] = replace(worse, mark="*")
    lines = [_line(left, i, columns, placed_at, down) for i, left in enumerate(lefts)]
    notes = [Note("Shares in percent, 95 % interval (Wilson; for all else bootstrap over samples).")]
    if compared and len(lefts) > 1:
        notes.append(Note(f"Best of a column {PLACED}."))
    if any(entry["n"] < entry["asked"] for entry in entries):
        notes.append(Note("† partial: fewer samples answered than asked."))
    notes += [compare.worse_note("column")] * bool(marked) + described(records, entries)
    return Grid("Scores", tuple(down), tuple(heads), tuple(lines), tuple(notes))


def _places(
    entries: Sequence[dict[str, Any]], down: Sequence[str], across: Sequence[str]
) -> dict[tuple[tuple[Any, ...], tuple[Any, ...]], dict[str, Any]]:
    found: dict[tuple[tuple[Any, ...], tuple[Any, ...]], dict[str, Any]] = {}
    for entry in entries:
        key = (tuple(entry[n] for n in down), tuple(entry[n] for n in across))
        if key in found:
            unlike = next((name for name in NAMES if found[key][name] != entry[name]), "run")
            values = " and ".join(str(e[unlike])[:16] for e in (found[key], entry))
            raise UserError(
                f"two scores fall on one place: they differ in {unlike} ({values}); add it to --rows or --columns, or "
                f"choose with --where {unlike}=..."
            )
        found[key] = entry
    return found


def _order(names: Sequence[str], key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        cells.rank(str(value), ORDERS[name]) if name in ORDERS else (value, "")
        for name, value in zip(names, key, strict=True)
    )


def _text(name: str, value: object) -> str:
    if name == "length":
        return cells.length_label(int(str(value))) or "-"
    if name == "params":
        return cells.size_label(int(str(value)))
    if name in ("checkpoint", "data"):
        return str(value)[:8]
    return cells.task_label(str(value)) if name == "task" else str(value)


def _head(across: Sequence[str], top: tuple[Any, ...], places: Mapping[Any, dict[str, Any]]) -> Head:
    texts = [_text(name, value) for name, value in zip(across, top, strict=True)]
    entries = [entry for (_, at), entry in places.items() if at == top]
    lower = any(entry["lower"] for entry in entries)
    # An aggregate such as a weighted F1 lies between 0 and 1, but which do is not known.
    small = any(not entry["shares"] and abs(entry["mean"]) <= 1 for entry in entries)
    group, name = (" ".join(texts[:-1]), texts[-1]) if texts else ("", "score")
    key = "/".join(map(str, top)) or "score"
    return Head(group, name, key, 4 if small else 2 if lower else 1, lower=lower)


def figure(entry: Mapping[str, Any]) -> Figure:
    """A cell as people read it: shares in percent, perplexities, anything else as recorded."""
    if entry["n"] == 0:
        return Figure(None, n=0, asked=entry["asked"])
    value, low, high = cells.shown(entry)
    return Figure(value, low, high, entry["n"], entry["asked"])


def _line(
    left: tuple[Any, ...], i: int, columns: Sequence[Sequence[Figure | None]], places: Mapping[Any, dict[str, Any]],
    down: Sequence[str],
) -> Line:  # fmt: skip
    made: tuple[Cell, ...] = tuple(column[i] for column in columns)
    runs = sorted({run for (at, _), entry in places.items() if at == left for run in entry["runs"]})
    return Line(tuple(_text(name, value) for name, value in zip(down, left, strict=True)), made, "", tuple(runs))


def effective(records: Records) -> Grid:
    """Effective context lengths of each model: of each task, and of the average over tasks asked at the same lengths.

    Raises DataError where no model was asked a task at two lengths.
    """
    entries: list[dict[str, Any]] = cells.summary(records).to_dict("records")
    entries = [e for e in entries if e["length"] and e["shares"] and e["n"]]
    members, labels = cells.members(records), cells.names(entries)
    tasks = sorted({e["task"] for e in entries}, key=lambda t: cells.rank(t, ORDERS["task"]))
    curves: dict[tuple[Any, ...], dict[str, dict[int, pd.DataFrame]]] = {}
    for e in entries:
        lengths = curves.setdefault(cells.model_key(e), {}).setdefault(e["task"], {})
        if e["length"] in lengths:
            raise UserError(f"{e['task']} was asked in several ways: choose with --where protocol=...")
        lengths[e["length"]] = members[cells.member_key(e)]
    if not any(len(lengths) > 1 for found in curves.values() for lengths in found.values()):
        raise DataError("an effective length needs a task at two lengths or more")
    average = f"average of {len(tasks)}"
    heads = [
        Head(cells.task_label(group), label, f"{group}_{definition}", 0)
        for group in (*tasks, *([average] if len(tasks) > 1 else []))
        for definition, label in THRESHOLDS.items()
    ]
    lines = []
    for key in sorted(curves, key=lambda k: (cells.rank(k[0], cells.FAMILIES), cells.rank(k[3], cells.MIXERS), k[4])):
        parts = [_parts(curves[key], [task]) for task in tasks]
        if len(tasks) > 1:
            parts.append(_parts(curves[key], tasks))
        made = [_effective_cell(part, definition) for part in parts for definition in THRESHOLDS]
        runs = {run for e in entries if cells.model_key(e) == key for run in e["runs"]}
        lines.append(Line((labels[key], cells.size_label(key[4])), tuple(made), key[0], tuple(sorted(runs))))
    notes = (
        Note("Longest context with a score of 85.6 % (RULER), or of 85 % of the model's own at 1K or less (NoLiMa)."),
        Note("Tokens between measured lengths are read off a monotone curve, 95 % interval by resampling samples."),
        Note("≥ or <: still met at the longest, or not even at the shortest length measured."),
        Note("An average is over tasks asked at the same lengths only."),
        *described(records, entries),
    )
    return Grid("Effective context length (tokens)", ("model", "size"), tuple(heads), tuple(lines), notes)


def _parts(curves: Mapping[str, Mapping[int, pd.DataFrame]], tasks: Sequence[str]) -> dict[int, list[Any]]:
    """Scores and samples of each task by length, of the lengths at which all `tasks` were asked."""
    if any(task not in curves for task in tasks):
        return {}
    lengths = set.intersection(*(set(curves[task]) for task in tasks))
    return {
        length: [
            (rows["score"].to_numpy(), (rows["seed"].astype("str") + "/" + rows["sample_id"].astype("str")).to_numpy())
            for rows in (curves[task][length] for task in tasks)
        ]
        for length in lengths
    }


def _effective_cell(parts: Mapping[int, list[Any]], definition: Definition) -> Figure | None:
    """Tokens, with the sign of a censored length; None with fewer than two lengths."""
    if len(parts) < 2:
        return None
    found = effective_length_of_average(parts, definition)
    sign = {"above": "≥", "below": "<", "": ""}[found.censored]
    # Where every draw ends at one end of the sweep there is no interval to show.
    low, high = (found.low, found.high) if found.low < found.high else (float("nan"), float("nan"))
    return Figure(found.tokens, low, high, sign=sign)
