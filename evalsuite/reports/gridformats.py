"""A grid as terminal text, Markdown, LaTeX or CSV. Nothing here prints; every name goes through `escape`."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence

from evalsuite.reports import escape
from evalsuite.reports.formats import MARK, dagger, note_text
from evalsuite.reports.grid import Cell, Figure, Grid, Head, Line, Note, bounds, counts, number, pages, samples

PLACES = {0: "", 1: "¹", 2: "²"}  # of a terminal, which has neither bold nor underlined
WIDEST = 12  # columns of one printed part, in Markdown and LaTeX


def _count(figure: Figure, n: int | None) -> str:
    """Samples of the figure, where those of its column, `n`, do not say them."""
    if figure.partial:
        return f"n={figure.n}/{figure.asked}"
    return f"n={figure.n}" if figure.n and n is None else ""


def _value(figure: Figure, head: Head) -> str:
    return "–" if figure.value is None else figure.sign + number(figure.value, head)


def terminal(grid: Grid, width: int = 100) -> str:
    """Aligned text of at most `width` columns, in several parts where all columns do not fit. No control codes."""
    told, more = samples(grid)
    lines = textwrap.wrap(grid.title + told, width)
    for part in _parts(grid, width):
        lines += ["", *_block(grid, part)]
    lines.append("")
    for note in (*more, *grid.notes):
        lines += textwrap.wrap(note_text(note, escape.terminal), width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _parts(grid: Grid, width: int) -> list[list[int]]:
    """Columns in as few parts as fit `width`: groups stay together, unless one alone is too wide."""

    def fits(part: list[int]) -> bool:
        return all(len(line) <= width for line in _block(grid, part))

    parts: list[list[int]] = [[]]
    for group in grid.groups():
        for added in [group] if fits(group) else [[i] for i in group]:
            if parts[-1] and not fits(parts[-1] + added):
                parts.append([])
            parts[-1] = parts[-1] + added
    return parts


def _block(grid: Grid, part: Sequence[int]) -> list[str]:
    """The lines of one part: two of heads, a rule, and as many of each row as its cells have."""
    ns = counts(grid)
    corners = len(grid.corners)
    rows: list[tuple[str, list[list[str]]]] = []  # a section's name, or the texts of a row's cells
    for section, lines in grid.sections():
        rows += [(escape.terminal(section), [])] * bool(section)
        for line in lines:
            texts = [[escape.terminal(label)] for label in line.labels]
            rows.append(("", texts + [_terminal_cell(line.cells[i], grid.heads[i], ns[i]) for i in part]))
    names = [*grid.corners, *(grid.heads[i].name for i in part)]
    widths = [max([len(name), *(len(t) for _, row in rows if row for t in row[j])]) for j, name in enumerate(names)]
    spans = _spans(grid, part)
    for first, last, label in spans:
        lacking = len(label) - (sum(widths[corners + first : corners + last]) + 2 * (last - first - 1))
        widths[corners + last - 1] += max(0, lacking)
    right = [False] * corners + [_numeric(grid, i) for i in part]

    def put(texts: Sequence[str]) -> str:
        pairs = zip(texts, widths, right, strict=True)
        return "  ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in pairs)

    out = []
    if any(label for *_, label in spans):
        tops = [
            label.center(sum(widths[corners + a : corners + b]) + 2 * (b - a - 1), "·" if label and b - a > 1 else " ")
            for a, b, label in spans
        ]
        out.append("  ".join([*(" " * w for w in widths[:corners]), *tops]))
    out += [put(names), "─" * len(put(names))]
    for section, row in rows:
        if section:
            out.append(section)
        deep = max((len(texts) for texts in row), default=0)
        out += [put([texts[i] if i < len(texts) else "" for texts in row]) for i in range(deep)]
    return out


def _spans(grid: Grid, part: Sequence[int]) -> list[tuple[int, int, str]]:
    """First column, end and label of each group, counted within `part`."""
    found: list[tuple[int, int, str]] = []
    for group in grid.groups():
        inside = [part.index(i) for i in group if i in part]
        if inside:
            label = grid.heads[group[0]].group
            found.append((inside[0], inside[-1] + 1, f" {label} " if label and len(inside) > 1 else label))
    return found


def _numeric(grid: Grid, column: int) -> bool:
    return not any(isinstance(line.cells[column], str) for line in grid.lines)


def _terminal_cell(cell: Cell, head: Head, n: int | None) -> list[str]:
    if not isinstance(cell, Figure):
        return [escape.terminal(cell or "")]
    marks = (MARK if cell.partial else "") + cell.mark + PLACES[cell.place]
    return [_value(cell, head) + marks, *filter(None, [bounds(cell, head), _count(cell, n)])]


def markdown(grid: Grid) -> str:
    """Tables of at most `WIDEST` columns each."""
    ns, (told, more) = counts(grid), samples(grid)
    sections = any(line.section for line in grid.lines)
    lines = [f"**{grid.title}**{told}", ""]
    for part in pages(grid, WIDEST):
        heads = [" ".join(filter(None, [grid.heads[i].group, grid.heads[i].name])) for i in part]
        corners = [*grid.corners, *(["family"] if sections else [])]
        lines.append("| " + " | ".join([*corners, *heads]) + " |")
        rules = ["---"] * len(corners) + ["---:" if _numeric(grid, i) else "---" for i in part]
        lines.append("| " + " | ".join(rules) + " |")
        for line in grid.lines:
            labels = [escape.markdown(text) for text in (*line.labels, *([line.section] if sections else []))]
            cells = [_markdown_cell(line.cells[i], grid.heads[i], ns[i]) for i in part]
            lines.append("| " + " | ".join(labels + cells) + " |")
        lines.append("")
    lines += [f"- {note_text(note, escape.markdown)}" for note in (*more, *grid.notes)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell, head: Head, n: int | None) -> str:
    if not isinstance(cell, Figure):
        return escape.markdown(cell or "")
    frame = {0: "{}", 1: "**{}**", 2: "<ins>{}</ins>"}[cell.place]
    marks = (MARK if cell.partial else "") + cell.mark.replace("*", r"\*")
    value = frame.format(_value(cell, head).replace("<", "&lt;")) + marks
    between = bounds(cell, head)
    return " ".join(filter(None, [value, f"[{between}]" if between else "", _count(cell, n)]))


def latex(grid: Grid) -> str:
    """A floating table for booktabs and graphicx, in tabulars of at most `WIDEST` columns below one another."""
    ns, (told, more) = counts(grid), samples(grid)
    lines = ["% needs \\usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering"]
    lines.append(f"\\caption{{{escape.latex(grid.title + told)}.}}")
    for i, part in enumerate(pages(grid, WIDEST)):
        lines += [r"\par\medskip"] * bool(i) + _tabular(grid, part, ns)
    # Below, not in the caption: TeX measures a caption on one line, which has a limit.
    notes = [note_text(Note(dagger(note.text), note.values), escape.latex) for note in (*more, *grid.notes)]
    lines += [r"\par\smallskip\begin{minipage}{\linewidth}\footnotesize\raggedright", *notes, r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _tabular(grid: Grid, part: Sequence[int], ns: Sequence[int | None]) -> list[str]:
    corners = len(grid.corners)
    align = "l" * corners + "".join("r" if _numeric(grid, i) else "l" for i in part)
    lines = [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [f"\\setlength{{\\tabcolsep}}{{3pt}}\\begin{{tabular}}{{{align}}}", r"\toprule"]
    spans = _spans(grid, part)
    if any(label for *_, label in spans):
        tops = [f"\\multicolumn{{{b - a}}}{{c}}{{{escape.latex(label)}}}" for a, b, label in spans]
        lines.append("& " * corners + " & ".join(tops) + r" \\")
        lines += [f"\\cmidrule(lr){{{corners + a + 1}-{corners + b}}}" for a, b, _ in spans]
    names = [escape.latex(grid.heads[i].name) for i in part]
    lines += [" & ".join([*map(escape.latex, grid.corners), *names]) + r" \\", r"\midrule"]
    for section, rows in grid.sections():
        if section:
            lines.append(f"\\multicolumn{{{corners + len(part)}}}{{l}}{{\\textit{{{escape.latex(section)}}}}} \\\\")
        lines += [text for row in rows for text in _latex_row(grid, row, part, ns)]
    return [*lines, r"\bottomrule", r"\end{tabular}}"]


def _latex_row(grid: Grid, line: Line, part: Sequence[int], ns: Sequence[int | None]) -> list[str]:
    cells = [line.cells[i] for i in part]
    shown = [_latex_cell(cell, grid.heads[i]) for cell, i in zip(cells, part, strict=True)]
    rows = [" & ".join([*map(escape.latex, line.labels), *shown]) + r" \\"]
    sizes = [_count(cell, ns[i]) if isinstance(cell, Figure) else "" for cell, i in zip(cells, part, strict=True)]
    if any(sizes):
        below = [f"{{\\scriptsize {size}}}" if size else "" for size in sizes]
        rows.append(" & ".join([""] * len(line.labels) + below).strip() + r" \\")
    return rows


def _latex_cell(cell: Cell, head: Head) -> str:
    """The value, with the ends of its interval as superscript and subscript."""
    if not isinstance(cell, Figure):
        return escape.latex(cell or "")
    sign = {"≥": r"$\geq$", "<": "$<$", "": ""}[cell.sign]
    value = "--" if cell.value is None else sign + number(cell.value, head)
    value = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}[cell.place].format(value)
    marks = (r"\dagger" if cell.partial else "") + cell.mark.replace("*", r"\ast")
    ends = f"$_{{{number(cell.low, head)}}}^{{{number(cell.high, head)}}}$" if not math.isnan(cell.low) else ""
    return value + (f"$^{{{marks}}}$" if marks else "") + ends


def to_csv(grid: Grid) -> str:
    """One line for each line of the grid; of a measured column the figure, its interval and its samples."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ([line.cells[i] for line in grid.lines] for i in range(len(grid.heads)))
    measured = [any(isinstance(c, Figure) and (c.asked or not math.isnan(c.low)) for c in column) for column in columns]
    columns = ([line.cells[i] for line in grid.lines] for i in range(len(grid.heads)))
    signed = [any(isinstance(c, Figure) and c.sign for c in column) for column in columns]
    names = ["section", *grid.corners, "runs"]
    for head, whole, sign in zip(grid.heads, measured, signed, strict=True):
        parts = [*(("low", "high", "n", "asked") if whole else ()), *(("sign",) if sign else ())]
        names += [head.key, *(f"{head.key}_{part}" for part in parts)]
    writer.writerow(map(escape.csv, names))
    for line in grid.lines:
        row: list[object] = [line.section, *line.labels, " ".join(line.runs)]
        for cell, head, whole, sign in zip(line.cells, grid.heads, measured, signed, strict=True):
            row += _csv_cell(cell, head, whole)
            row += [cell.sign if isinstance(cell, Figure) else None] * sign
        writer.writerow([escape.csv(value) if isinstance(value, str) else value for value in row])
    return out.getvalue()


def _csv_cell(cell: Cell, head: Head, whole: bool) -> list[object]:
    if not isinstance(cell, Figure):
        return [cell, *([None] * 4 if whole else [])]
    digits = max(3, head.decimals)
    value, low, high = (
        None if x is None or math.isnan(x) else round(x, digits) for x in (cell.value, cell.low, cell.high)
    )
    return [value, low, high, cell.n, cell.asked] if whole else [value]


RENDER: dict[str, Callable[[Grid], str]] = {
    "text": terminal, "markdown": markdown, "latex": latex, "csv": to_csv,
}  # fmt: skip
