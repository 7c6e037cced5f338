"""What a model retrieved instead of the target, against context length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalsuite.reports import escape
from evalsuite.reports.cells import FAMILIES, MIXERS, TASKS, length_label, rank, task_label
from evalsuite.reports.drawing import check_files, legend, name_axes, panels, save, style
from evalsuite.reports.frame import Records
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Darker is better, and every neighbour differs in hatching, too.
LOOKS: dict[str, dict[str, Any]] = {
    "target": {"facecolor": "#0b3c5d"},
    "partial": {"facecolor": "#3d7ea6"},
    "last distractor": {"facecolor": "#d55e00", "hatch": "////"},
    "second to last": {"facecolor": "#e69f00", "hatch": "...."},
    "earlier distractor": {"facecolor": "#f5cf7a", "hatch": "\\\\\\\\"},
    "other": {"facecolor": "#bdbdbd"},
    "nothing": {"facecolor": "#f7f7f7"},
}
_OUTCOME = re.compile(r"distractor(?::(\d+))?")


def category(outcome: str) -> str:
    """The place among `LOOKS` of an outcome as tasks word it: target, partial, distractor:R, other or nothing.

    "" for anything else, such as the outcome of a likelihood, which retrieves nothing.
    """
    if found := _OUTCOME.fullmatch(outcome):
        # R counts from the end of the prompt; a task that does not say it leaves the place open.
        return {"1": "last distractor", "2": "second to last"}.get(found[1] or "", "earlier distractor")
    return outcome if outcome in LOOKS else ""


def shares(records: Records) -> pd.DataFrame:
    """Shares of each category: one row a model, task and length, one column a category of `LOOKS`.

    Raises DataError where no record with a length says what was retrieved.
    """
    import pandas as pd

    # Of several metrics of a sample the first is that of the answer.
    frame = records.frame[records.frame["length"] > 0].drop_duplicates("key")
    kinds = frame["outcome"].astype("str").map(category)
    told, kinds = frame[kinds != ""], kinds[kinds != ""]
    if not len(told):
        raise DataError("these records do not say what was retrieved")
    keys = [told[name] for name in ("family", "mixer", "model", "checkpoint", "task", "length")]
    counts = pd.crosstab(keys, kinds, normalize="index").reindex(columns=list(LOOKS), fill_value=0.0)
    return counts


def plot(records: Records, files: Sequence[Path], task: str | None = None) -> None:
    """Write a panel for each model and task to `files`: what was retrieved, stacked to 100 %, by context length.

    `task` leaves the others out. Raises DataError as `shares` does.
    """
    check_files(files)
    table = shares(records)
    if task is not None:
        table = table[table.index.get_level_values("task") == task]
    names = ["family", "mixer", "model", "checkpoint", "task"]
    groups: list[tuple[Any, pd.DataFrame]] = list(table.groupby(level=names, observed=True))
    groups.sort(key=lambda g: (rank(g[0][0], FAMILIES), rank(g[0][1], MIXERS), g[0][2:4], rank(g[0][4], tuple(TASKS))))
    with style():
        figure, axes = panels(len(groups))
        for ax, ((_, _, model, _, name), rows) in zip(axes, groups, strict=True):
            _bars(ax, rows.droplevel(names))
            ax.set_title(f"{escape.figure(model, 24)}\n{escape.figure(task_label(name))}")
        name_axes(figure, axes, "share (%)")
        legend(figure, axes, most=3)
        save(figure, files)


def _bars(ax: Axes, rows: pd.DataFrame) -> None:
    lengths = sorted(rows.index)
    bottom = [0.0] * len(lengths)
    for name, look in LOOKS.items():
        heights = [100 * float(rows.loc[length, name]) for length in lengths]
        if not any(heights):
            continue
        ax.bar(range(len(lengths)), heights, bottom=bottom, width=0.85, label=name, edgecolor="0.25", lw=0.3, **look)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    every = -(-len(lengths) // 6)
    ax.set_xticks(range(0, len(lengths), every), [length_label(n) for n in lengths[::every]])
    ax.set_ylim(0, 100)
    ax.set_yticks([0, 50, 100])
    ax.grid(False)
