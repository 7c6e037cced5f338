"""Accuracy against context length, and where in the context it is lost.

Functions of the records alone: the same records give the same file. Every line has a colour, a marker and a dash
pattern of its own, and every colour scale rises in lightness, so that a figure printed in grey says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from evalsuite.reports import escape
from evalsuite.reports.cells import CELL, attention_windows, length_label, separated
from evalsuite.reports.drawing import check_files, legend, length_axis, look, name_axes, panels, save, style
from evalsuite.reports.frame import Records
from evalsuite.reports.tables import Column, Row, Table, build, variant_label
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

CROWD = 8  # models of one panel, before families have panels of their own
BANDS = 4  # models whose bands can be told apart
FEW = 10  # samples: a heat map's cell with fewer is hatched


def accuracy(records: Records, files: Sequence[Path], task: str | None = None) -> None:
    """Write accuracy against context length to `files`: one panel a task, one line a model, with 95 % intervals.

    The intervals are bands, or bars side by side where more than `BANDS` models would cover each other. A hollow marker
    is a cell with fewer samples than asked; a dotted line is a model's training length, where its run says so. A grey
    line is what a model would score that sees no more than the window of a hybrid shown here. With more than `CROWD`
    models each family has panels of its own. `task` leaves the others out.

    Raises DataError without records of any length.
    """
    check_files(files)
    if task is not None:
        frame, errors = (rows[rows["task"] == task] for rows in (records.frame, records.errors))
        records = Records(frame, errors, records.runs, records.warnings)
    table = build(records, "none")
    with_lengths = {i for i, column in enumerate(table.columns) if column.length}
    scored = {i for row in table.rows for i in with_lengths if (cell := row.cells[i]) and cell.n}
    groups = [group for group in table.groups() if scored & set(table.places(*group, "measured"))]
    if not groups:
        raise DataError("these records hold no task with lengths to plot")
    families = list(dict.fromkeys(row.family for row in table.rows))
    apart = len(table.rows) > CROWD and len(families) > 1
    shown = list(product(groups, families)) if apart else [(group, "") for group in groups]
    with style():
        figure, axes = panels(len(shown))
        for ax, (group, family) in zip(axes, shown, strict=True):
            _curves(ax, table, [i for i in table.places(*group, "measured") if i in scored], family)
            title = variant_label(table.columns[table.places(*group, "measured")[0]])
            ax.set_title(escape.figure(f"{title}, {family}" if family else title))
            if family in ("", "hybrid"):
                _windows(ax, records, group[0])
        name_axes(figure, axes, "accuracy (%)")
        _training_lengths(records, axes)
        legend(figure, axes)
        save(figure, files)


def _curves(ax: Axes, table: Table, places: list[int], family: str = "") -> None:
    """Draw the models of `family`, "" for all; a model looks the same in every panel."""
    lengths = [table.columns[i].length for i in places]
    inside = [number for number, row in enumerate(table.rows) if family in ("", row.family)]
    crowded = len(inside) > BANDS
    for place, number in enumerate(inside):
        row = table.rows[number]
        points = [(table.columns[i].length, cell) for i in places if (cell := row.cells[i]) and cell.n]
        if not points:
            continue
        aside = 2 ** (0.05 * (place - (len(inside) - 1) / 2)) if crowded else 1.0
        x, y = [length * aside for length, _ in points], [cell.value or 0.0 for _, cell in points]
        low, high = [cell.low for _, cell in points], [cell.high for _, cell in points]
        looks = look(number)
        colour, marker = looks["color"], looks.pop("marker")
        if crowded or len(points) == 1:
            ax.vlines(x, low, high, color=colour, linewidth=0.7, alpha=0.8)
        else:
            ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            for edge in (low, high):
                ax.plot(x, edge, linewidth=0.4, alpha=0.6, **looks)
        ax.plot(x, y, label=_label(row), marker=marker, mec="white", mew=0.25, clip_on=False, zorder=3, **looks)
        for at, height, (_, cell) in zip(x, y, points, strict=True):
            if cell.partial:
                ax.plot(at, height, marker=marker, mfc="white", mec=colour, clip_on=False, zorder=4)
    length_axis(ax, lengths)
    ax.set_ylim(-2, 102)
    ax.set_yticks(range(0, 101, 25))


def _windows(ax: Axes, records: Records, task: str) -> None:
    for number, (window, points) in enumerate(window_baseline(records, task).items()):
        lengths = sorted(points)
        ax.plot(
            lengths, [100 * points[n] for n in lengths], color=str(0.45 + 0.2 * (number % 2)), linewidth=0.9,
            linestyle=(0, (1, 1, 3, 1)), zorder=2, label=f"last {window} tokens only",
        )  # fmt: skip


def window_baseline(records: Records, task: str) -> dict[int, dict[int, float]]:
    """For each window of a hybrid's attention, what a model that sees no more tokens than that would score by length.

    That is the share of prompts whose needle lies within the window's reach of the end. Empty for tasks whose answer
    is several needles, since records hold the place of one.
    """
    if not task.startswith(("niah_single", "niah_multikey")):
        return {}
    windows = attention_windows(records)
    found: dict[int, dict[int, float]] = {}
    frame = records.frame
    asked = frame[(frame["task"] == task) & frame["depth"].notna() & (frame["length"] > 0)]
    for checkpoint, window in windows.items():
        rows = asked[asked["checkpoint"] == checkpoint]
        if len(rows):
            seen = (1 - rows["depth"]) * rows["prompt_tokens"] <= window
            means = seen.groupby(rows["length"]).mean()
            found.setdefault(window, {int(length): float(share) for length, share in means.items()})
    return found


def _label(row: Row) -> str:
    return escape.figure(f"{row.name} ({row.family})")


def _training_lengths(records: Records, axes: Sequence[Axes]) -> None:
    found = {run["model"].get("details", {}).get("train_length") for run in records.runs.values()}
    for ax in axes:
        left, right = ax.get_xlim()
        inside = [value for value in found if isinstance(value, int) and left < value < right and value > 0]
        for length in inside:
            ax.axvline(length, color="0.35", linestyle=":", linewidth=0.9, zorder=1)
        if inside:
            ax.annotate("trained", (max(inside), 1), (1.5, 0), textcoords="offset points", fontsize=5, color="0.35")


def depth_heatmap(
    records: Records, files: Sequence[Path], bins: int | None = None, task: str | None = None
) -> None:
    """Write accuracy by needle depth (down) and context length (across) to `files`: a panel a model and task.

    Cells of fewer than `FEW` samples are hatched, cells without any are empty. `bins` of the depth: None is ten, or
    five where ten would leave fewer than `FEW` samples in most. `task` leaves the others out. Raises DataError without
    depths.
    """
    check_files(files)
    deep = records.frame[records.frame["depth"].notna() & (records.frame["length"] > 0)]
    if task is not None:
        deep = deep[deep["task"] == task]
    given = Records(deep, records.errors.iloc[:0], {})
    frame, _ = separated(given)
    if not len(frame):
        raise DataError("these records hold no needle depths to plot")
    table = build(given, "none")
    wanted = [
        (row, group)
        for row, group in product(table.rows, table.groups())
        if any(row.cells[i] for i in table.places(*group, "measured"))
    ]
    if bins is None:
        bins = 10 if frame.groupby(CELL, observed=True).size().median() >= 10 * FEW else 5
    frame = frame.assign(bin=(frame["depth"] * bins).clip(upper=bins - 1e-9).astype(int))
    with style():
        figure, axes = panels(len(wanted))
        for ax, (row, group) in zip(axes, wanted, strict=True):
            places = table.places(*group, "measured")
            image = _heat(ax, frame, row, [table.columns[i] for i in places], bins)
            ax.set_title(f"{escape.figure(row.name, 24)}\n{escape.figure(variant_label(table.columns[places[0]]))}")
        hatched = any(patch.get_hatch() for ax in axes for patch in ax.patches)
        note = f"\nhatched: fewer than {FEW} samples" if hatched else ""
        name_axes(figure, axes, "needle depth (%)", f"context length (tokens){note}")
        figure.colorbar(image, ax=axes, label="accuracy (%)", aspect=30)
        save(figure, files)


def _heat(ax: Axes, frame: pd.DataFrame, row: Row, columns: list[Column], bins: int) -> AxesImage:
    """Draw one panel and return its image."""
    import numpy as np
    from matplotlib.patches import Rectangle

    means, counts = np.full((bins, len(columns)), np.nan), np.zeros((bins, len(columns)), dtype=int)
    for x, column in enumerate(columns):
        for y, scores in _asked(frame, row, column).groupby("bin")["score"]:
            means[y, x], counts[y, x] = 100 * scores.mean(), len(scores)
    image = ax.imshow(means, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for y, x in zip(*np.nonzero(counts), strict=True):
        ink = "white" if means[y, x] < 50 else "black"
        if counts[y, x] < FEW:
            few = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=ink, linewidth=0, alpha=0.45)
            ax.add_patch(few)
        ax.text(x, y, f"{means[y, x]:.0f}", ha="center", va="center", fontsize=4.5, color=ink)
    size = 7 if len(columns) <= 4 else 5
    ax.set_xticks(range(len(columns)), [length_label(column.length) for column in columns], fontsize=size)
    ax.set_yticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["0", "50", "100"])
    ax.grid(False)
    return image


def _asked(frame: pd.DataFrame, row: Row, column: Column) -> pd.DataFrame:
    """The records behind one cell of the table."""
    wanted: list[tuple[str, object]] = [("model", row.model), ("checkpoint", row.checkpoint), ("family", row.family)]
    wanted += [
        ("mixer", row.mixer),
        ("params", row.params),
        ("run", row.run),
        ("task", column.task),
        ("length", column.length),
    ]
    chosen = frame["score"].notna()
    for name, value in wanted:
        chosen &= frame[name] == value
    for name, text in column.variant:
        chosen &= frame[name].astype("str") == text
    return frame[chosen]
