"""What every figure shares: one style, sizes of panels, looks of lines, files that are the same every time."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalsuite.names import quoted
from evalsuite.reports.cells import length_label
from evalsuite.store import storage, write_file
from gdn2.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")
SUFFIXES = (".png", ".svg", ".pdf")
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (6, 1, 1, 1, 1, 1)))
PANEL = (1.72, 1.45)  # inches; two side by side fill a column of a paper

# Dates and program versions would make two runs differ.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(STYLE, use_default_template=False))
        yield


def save(figure: Figure, files: Sequence[Path]) -> None:
    for path in files:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix.lower()[1:], metadata=_METADATA[path.suffix.lower()])
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, drawn.getvalue())


def check_files(files: Sequence[Path]) -> None:
    """Raise UserError for a file whose suffix is no format of ours."""
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"plot file {quoted(path)} must end in {', '.join(SUFFIXES)}")


def columns(count: int) -> int:
    return count if count < 3 else 2 if count <= 4 else 4


def panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    across = columns(count)
    down = math.ceil(count / across)
    size = (PANEL[0] * max(across, 2), PANEL[1] * down + 0.2)
    figure = Figure(figsize=size)
    grid = figure.add_gridspec(down, across)
    return figure, [figure.add_subplot(grid[i // across, i % across]) for i in range(count)]


def name_axes(figure: Figure, axes: Sequence[Axes], y_label: str, x_label: str = "context length (tokens)") -> None:
    """Name the axes once: below all panels, and left of each row."""
    figure.supxlabel(x_label)
    for ax in axes[:: columns(len(axes))]:
        ax.set_ylabel(y_label)


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line `number`, for `Axes.plot`."""
    return {
        "color": f"C{number % 7}",
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis of context lengths with at most six of them named."""
    ticks = sorted(set(lengths))
    every = math.ceil(len(ticks) / 6)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks[::every], [length_label(t) for t in ticks[::every]])
    ax.minorticks_off()
    ax.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)


def legend(figure: Figure, axes: Sequence[Axes], most: int = 2) -> None:
    """One legend above all panels, without repetitions, in at most `most` columns; the figure grows by its height."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if not entries:
        return
    many = len(entries) > 6
    across = 1 if max(map(len, entries)) > (38 if many else 28) else most
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + (0.12 if many else 0.15) * math.ceil(len(entries) / across) + 0.05)
    small: dict[str, Any] = {"fontsize": 5.5, "handlelength": 2.5, "columnspacing": 1.0} if many else {}
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=across, **small)
