"""A table before it has a format: lines of measured and published figures and texts, under grouped heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

PLACED = "bold, second underlined (in plain text raised 1 and 2); partial figures have no place"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number. `value` is None where samples were asked and none was answered."""

    value: float | None
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0  # samples behind it, 0 for a published one
    asked: int = 0
    place: int = 0  # 1 best, 2 second among those it is compared with, else 0
    mark: str = ""  # of significance, explained in the notes
    sign: str = ""  # "≥" or "<" where the true value lies beyond what was measured

    @property
    def partial(self) -> bool:
        return self.n < self.asked


Cell = Figure | str | None  # texts came from outside: escape them


@dataclass(frozen=True, slots=True)
class Head:
    """A column. Neighbours of one group stand under a common head; `key` names the column for machines."""

    group: str
    name: str
    key: str
    decimals: int = 1
    signed: bool = False
    lower: bool = False  # whether less is better


@dataclass(frozen=True, slots=True)
class Line:
    """A row. `labels` came from outside, one for each of the grid's corners; lines of one section stand together."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    section: str = ""
    runs: tuple[str, ...] = ()  # ids of the runs behind its figures: `gdn2-eval show` opens them


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence of the caption: our words, or what they name and its values from outside, to be escaped."""

    text: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    title: str
    corners: tuple[str, ...]
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    notes: tuple[Note, ...] = ()

    def groups(self) -> list[list[int]]:
        """Indices of the columns under each common head."""
        found: list[list[int]] = []
        for i, head in enumerate(self.heads):
            if found and self.heads[found[-1][0]].group == head.group:
                found[-1].append(i)
            else:
                found.append([i])
        return found

    def sections(self) -> list[tuple[str, list[Line]]]:
        """The lines of each section, sections in order of appearance."""
        names = dict.fromkeys(line.section for line in self.lines)
        return [(name, [line for line in self.lines if line.section == name]) for name in names]


def pages(grid: Grid, most: int) -> list[list[int]]:
    """Columns in parts of at most `most`, whole groups together where they fit."""
    found: list[list[int]] = [[]]
    for group in grid.groups():
        if found[-1] and len(found[-1]) + len(group) > most:
            found.append([])
        for i in group:
            if len(found[-1]) == most:
                found.append([])
            found[-1].append(i)
    return [page for page in found if page]


def placed(figures: Sequence[Figure | None], decimals: int, lower: bool) -> list[Figure | None]:
    """The figures with the best and the second marked: as printed, so that what looks equal is equal.

    Partial figures have no place, and nothing is best of one.
    """
    values = [round(f.value, decimals) if f and f.value is not None and not f.partial else None for f in figures]
    order = sorted({v for v in values if v is not None}, reverse=not lower)
    if sum(v is not None for v in values) < 2:
        return list(figures)
    places = {value: place for place, value in enumerate(order[:2], start=1)}
    # Several best leave no second.
    if values.count(order[0]) > 1:
        places = {order[0]: 1}
    return [
        f and replace(f, place=places.get(v, 0) if v is not None else 0) for f, v in zip(figures, values, strict=True)
    ]


def number(value: float, head: Head) -> str:
    """The value as people read it; a difference that rounds to nothing has no sign."""
    sign = "+" if head.signed else ""
    # A perplexity may have any size.
    shown = f"{value:{sign}.{head.decimals}f}" if abs(value) < 1e6 else f"{value:{sign}.2e}"
    return shown[1:] if float(shown) == 0 and shown[0] in "+-" else shown


def bounds(figure: Figure, head: Head) -> str:
    """Its interval, "" where there is none."""
    if math.isnan(figure.low):
        return ""
    joint = " to " if head.signed else "–"
    return f"{number(figure.low, head)}{joint}{number(figure.high, head)}"


def text(cell: Cell, head: Head) -> str:
    """A cell on one line, without its samples and marks."""
    if not isinstance(cell, Figure):
        return cell or ""
    between = bounds(cell, head)
    value = "–" if cell.value is None else cell.sign + number(cell.value, head)
    return f"{value} [{between}]" if between else value


def counts(grid: Grid) -> list[int | None]:
    """Samples behind the complete measured figures of each column: 0 where there are none, None where they differ."""
    found: list[int | None] = []
    for i in range(len(grid.heads)):
        cells = (line.cells[i] for line in grid.lines)
        sizes = {cell.n for cell in cells if isinstance(cell, Figure) and cell.n and not cell.partial}
        found.append(sizes.pop() if len(sizes) == 1 else None if sizes else 0)
    return found


def samples(grid: Grid) -> tuple[str, list[Note]]:
    """How the title and a note tell the samples of a cell, where the cells need not."""
    found = counts(grid)
    sizes = set(found) - {0}
    if len(sizes) == 1 and None not in sizes:
        return f" (n = {sizes.pop()} samples a cell)", []
    told = [f"{' '.join(filter(None, [h.group, h.name]))} {n}" for h, n in zip(grid.heads, found, strict=True) if n]
    return "", [Note(f"Samples a cell: {', '.join(told)}.")] if told else []
