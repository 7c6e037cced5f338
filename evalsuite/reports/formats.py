"""A table as terminal text, Markdown, LaTeX or CSV. Nothing here prints; every name goes through `escape`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evalsuite.reports import escape, files
from evalsuite.reports.cells import size_label
from evalsuite.reports.files import Format, format_of
from evalsuite.reports.grid import Note
from evalsuite.reports.tables import Cell, Column, Row, Table, column_label, variant_label

if TYPE_CHECKING:
    from rich.table import Table as Grid

MARK = "†"


def render(table: Table, form: Format) -> str:
    """The table as text of the given format, ending in a newline."""
    return {"markdown": markdown, "latex": latex, "csv": to_csv}[form](table)


def write(table: Table, path: Path) -> None:
    """Write the table to `path` in the format of its suffix, replacing what is there."""
    files.write(render(table, format_of(path)), path)


def check(table: Table, path: Path) -> None:
    """Raise DataError naming the first line in which the file at `path` differs from what the records give."""
    files.check(render(table, format_of(path)), path)


def _number(value: float) -> str:
    return f"{value:.1f}"


def _mean(cell: Cell) -> str:
    return (_number(cell.value) if cell.value is not None else "–") + (MARK if cell.partial else "") + cell.mark


def _figure(cell: Cell | None) -> str:
    """A published figure."""
    return _number(cell.value) if cell and cell.value is not None else ""


def _bounds(cell: Cell) -> str:
    return "" if math.isnan(cell.low) else f"{_number(cell.low)}–{_number(cell.high)}"


def _count(cell: Cell, n: int | None) -> str:
    """Samples of the cell, where the caption does not say them for all."""
    if cell.partial:
        return f"n={cell.n}/{cell.asked}"
    return "" if n is not None else f"n={cell.n}"


def _prompt(column: int, rows: Sequence[Row]) -> str:
    """Smallest and mean prompt of a measured column over its models, in tokens."""
    cells = [cell for row in rows if (cell := row.cells[column]) and not math.isnan(cell.prompt_mean)]
    if not cells:
        return ""
    mean = sum(c.prompt_mean * c.n for c in cells) / sum(c.n for c in cells)
    return f"{min(c.prompt_min for c in cells):.0f} / {mean:.0f}"


def _families(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.family for row in rows))


def note_text(note: Note, escaped: Callable[[str], str]) -> str:
    return f"{note.text}: {', '.join(map(escaped, note.values))}." if note.values else note.text


def dagger(text: str) -> str:
    """Our own words for LaTeX, the mark of a partial cell included."""
    return r"$^\dagger$".join(map(escape.latex, text.split(MARK)))


def _shown(table: Table, ours: Sequence[int], theirs: Sequence[int]) -> list[Row]:
    """Rows with a figure; models of ours do not show for the sake of a published one alone."""
    return [row for row in table.rows if any(row.cells[i] for i in (ours if row.checkpoint else theirs))]


def _published(rows: Sequence[Row]) -> list[Row]:
    """One row for each model of the paper among `rows`, by the paper's name."""
    models = {(row.family, row.mixer): row for row in rows}
    return [replace(row, name=row.mixer, params=0, checkpoint="") for row in models.values()]


def terminal(table: Table, width: int = 100) -> str:
    """One table a task for a terminal of `width` columns: measured lengths on the left, published ones on the right.

    Where both do not fit side by side the published ones follow in a table of their own. No colours, no control codes.
    """
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(Text(table.title + _samples(table)))
    for task, variant in table.groups():
        ours, theirs = (table.places(task, variant, source) for source in ("measured", "published"))
        rows = _shown(table, ours, theirs)
        whole = _grid(table, rows, ours, theirs)
        if not theirs or console.measure(whole, options=console.options.update(max_width=1000)).maximum <= width:
            console.print(whole)
        else:
            console.print(_grid(table, [row for row in rows if row.checkpoint], ours, []))
            console.print(_grid(table, _published(rows), [], theirs))
    for note in table.notes:
        console.print(Text(note_text(note, escape.terminal)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _samples(table: Table) -> str:
    return f" (n = {table.n} samples a cell)" if table.n is not None else ""


def _grid(table: Table, rows: list[Row], ours: list[int], theirs: list[int]) -> Grid:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    title = escape.terminal(variant_label(table.columns[(ours + theirs)[0]])) + ("" if ours else ", published")
    grid = Grid(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", pad_edge=False)
    grid.add_column("model")
    for i in ours:
        grid.add_column(column_label(table.columns[i]), justify="right", no_wrap=True)
    for i in theirs:
        grid.add_column(f"paper {column_label(table.columns[i])}", justify="right", width=5)
    for family in _families(rows):
        grid.add_row(Text(escape.terminal(family)))
        for row in (r for r in rows if r.family == family):
            name = Text(f"{escape.terminal(row.name)}\n  {size_label(row.params)}".rstrip())
            cells = [Text(_terminal_cell(row.cells[i], table.n)) for i in ours]
            grid.add_row(name, *cells, *(Text(_figure(row.cells[i])) for i in theirs))
    if ours:
        prompts = [Text(_prompt(i, rows).replace(" / ", "\n")) for i in ours]
        grid.add_row(Text("tokens, min\ntokens, mean"), *prompts)
    return grid


def _terminal_cell(cell: Cell | None, n: int | None) -> str:
    return "\n".join(filter(None, [_mean(cell), _bounds(cell), _count(cell, n)])) if cell else ""


def markdown(table: Table) -> str:
    """One table a task, measured lengths on the left, published ones on the right."""
    lines = [f"**{table.title}**{_samples(table)}", ""]
    for task, variant in table.groups():
        ours, theirs = (table.places(task, variant, source) for source in ("measured", "published"))
        rows = _shown(table, ours, theirs)
        name, *rest = variant_label(table.columns[ours[0]]).split(" (", 1)
        lines += [f"**{_task_name(name)}**" + (f" {escape.markdown('(' + rest[0])}" if rest else ""), ""]
        heads = [column_label(table.columns[i]) for i in ours]
        heads += [f"published {column_label(table.columns[i])}" for i in theirs]
        lines += ["| model | family | size | " + " | ".join(heads) + " |"]
        lines += ["| --- | --- | --- |" + " ---: |" * len(heads)]
        for row in rows:
            cells = [_markdown_cell(row.cells[i], table.n) for i in ours]
            cells += [_figure(row.cells[i]) for i in theirs]
            label = escape.markdown(row.name)
            lines.append(f"| {label} | {row.family} | {size_label(row.params)} | " + " | ".join(cells) + " |")
        prompts = [_prompt(i, rows) for i in ours] + [""] * len(theirs)
        lines += ["| prompt tokens, min / mean | | | " + " | ".join(prompts) + " |", ""]
    lines += [f"- {note_text(note, escape.markdown)}" for note in table.notes]
    return "\n".join(lines) + "\n"


def _task_name(name: str) -> str:
    """A plain name as it stands, any other in a code span."""
    return name if name.replace("-", "").isalnum() and name.isascii() else escape.markdown(name)


def _markdown_cell(cell: Cell | None, n: int | None) -> str:
    if cell is None:
        return ""
    bounds = _bounds(cell)
    mean = _mean(cell).replace("*", r"\*")
    return " ".join(filter(None, [mean, f"[{bounds}]" if bounds else "", _count(cell, n)]))


def latex(table: Table) -> str:
    """Table 3's layout as a floating table for booktabs and graphicx; published figures in a second tabular below."""
    ours = [i for i, c in enumerate(table.columns) if c.source == "measured"]
    theirs = [i for i, c in enumerate(table.columns) if c.source == "published"]
    count = f" ($n = {table.n}$ samples a cell)" if table.n is not None else ""
    notes = [note_text(Note(dagger(note.text), note.values), escape.latex) for note in table.notes]
    lines = ["% needs \\usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering"]
    lines += [f"\\caption{{{escape.latex(table.title)}{count}. {notes[0]} Sub- and superscripts: its ends.}}"]
    lines += _tabular(table, _shown(table, ours, []), ours, "Measured")
    if theirs:
        lines += [r"\par\medskip", *_tabular(table, _published(table.rows), theirs, "Published")]
    # Below, not in the caption: TeX measures a caption on one line, which has a limit.
    lines += [r"\par\smallskip\begin{minipage}{\linewidth}\footnotesize\raggedright", *notes[1:], r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _tabular(table: Table, rows: list[Row], places: list[int], title: str) -> list[str]:
    groups: list[tuple[str, int]] = []
    for i in places:
        label = escape.latex(variant_label(table.columns[i]))
        if groups and groups[-1][0] == label:
            groups[-1] = (label, groups[-1][1] + 1)
        else:
            groups.append((label, 1))
    lines = [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [f"\\setlength{{\\tabcolsep}}{{3pt}}\\begin{{tabular}}{{l{'r' * len(places)}}}", r"\toprule"]
    lines += [title + "".join(f" & \\multicolumn{{{width}}}{{c}}{{{label}}}" for label, width in groups) + r" \\"]
    at = 2
    for _, width in groups:
        lines.append(f"\\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    lines += ["Model" + "".join(f" & {column_label(table.columns[i])}" for i in places) + r" \\", r"\midrule"]
    for family in _families(rows):
        lines.append(f"\\multicolumn{{{len(places) + 1}}}{{l}}{{\\textit{{{escape.latex(family)}}}}} \\\\")
        for row in (r for r in rows if r.family == family):
            lines += _latex_row(table, row, places)
    if table.columns[places[0]].source == "measured":
        lines.append(r"\midrule")
        prompts = [_prompt(i, rows).partition(" / ") for i in places]
        for part, label in ((0, "prompt tokens, min"), (2, "prompt tokens, mean")):
            figures = "".join(f" & {{\\scriptsize {prompt[part]}}}" for prompt in prompts)
            lines.append(f"{{\\scriptsize {label}}}{figures} \\\\")
    return [*lines, r"\bottomrule", r"\end{tabular}}"]


def _latex_row(table: Table, row: Row, places: list[int]) -> list[str]:
    measured = table.columns[places[0]].source == "measured"
    cells = [row.cells[i] for i in places]
    lines = [" & ".join([escape.latex(row.name), *map(_latex_cell, cells)]) + r" \\"]
    counts = [_count(cell, table.n) if cell and measured else "" for cell in cells]
    if any(counts):
        lines.append("".join(f" & {{\\scriptsize {count}}}" if count else " &" for count in counts) + r" \\")
    return lines


def _latex_cell(cell: Cell | None) -> str:
    """The mean, with the ends of its interval as superscript and subscript."""
    if cell is None:
        return ""
    mean = "--" if cell.value is None else _number(cell.value)
    bounds = "" if math.isnan(cell.low) else f"$_{{{_number(cell.low)}}}^{{{_number(cell.high)}}}$"
    marks = (r"\dagger" if cell.partial else "") + cell.mark.replace("*", r"\ast")
    return mean + (f"$^{{{marks}}}$" if marks else "") + bounds


CSV_COLUMNS = (
    "family",
    "model",
    "mixer",
    "params",
    "checkpoint",
    "task",
    "length",
    "variant",
    "measured_percent",
    "low",
    "high",
    "n",
    "asked",
    "errors",
    "prompt_tokens_min",
    "prompt_tokens_mean",
    "published_percent",
)


def to_csv(table: Table) -> str:
    """One line for each model, task and length; measured and published figures in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table.rows:
        for task, length, variant in _csv_places(table):
            ours = _at(table, row, Column(task, length, "measured", variant))
            theirs = _at(table, row, Column(task, length, "published"))
            if ours or theirs:
                told = "; ".join(f"{name} {value}" for name, value in variant)
                named = [row.family, row.name, row.mixer, row.params or "", row.checkpoint, task, length or "", told]
                figures = _csv_figures(ours) + [theirs.value if theirs else None]
                writer.writerow([escape.csv(c) if isinstance(c, str) else c for c in named + figures])
    return out.getvalue()


def _csv_places(table: Table) -> list[tuple[str, int, tuple[tuple[str, str], ...]]]:
    """Every place of a figure: published lengths that were not measured stand with the task's first question set."""
    first = dict(reversed(table.groups()))
    found = [(c.task, c.length, c.variant if c.source == "measured" else first[c.task]) for c in table.columns]
    groups = table.groups()
    return sorted(dict.fromkeys(found), key=lambda place: (groups.index((place[0], place[2])), place[1]))


def _at(table: Table, row: Row, column: Column) -> Cell | None:
    return row.cells[table.columns.index(column)] if column in table.columns else None


def _csv_figures(cell: Cell | None) -> list[object]:
    if cell is None:
        return [None] * 8
    value = None if cell.value is None else round(cell.value, 3)
    low, high, shortest, mean = (
        None if math.isnan(x) else round(x, 3) for x in (cell.low, cell.high, cell.prompt_min, cell.prompt_mean)
    )
    return [value, low, high, cell.n, cell.asked, cell.errors, shortest, mean]
