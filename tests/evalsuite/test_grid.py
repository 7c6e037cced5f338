"""Grids in every format: parts that fit, marks, heads, and hostile texts that stay inert."""

import csv as csvlib
import io
import math
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.reports import gridformats
from evalsuite.reports.grid import Figure, Grid, Head, Line, Note, bounds, counts, number, pages, placed, samples, text

HEADS = (Head("A", "x", "a_x"), Head("A", "y", "a_y"), Head("B", "d", "b_d", signed=True), Head("", "text", "text"))


def grid(*lines, heads=HEADS, notes=()):
    return Grid("Title", ("model",), heads, lines, notes)


def some(value, **rest):
    return Figure(value, value - 1, value + 1, 10, 10, **rest)


LINE = Line(("m",), (some(50.0, place=1), some(40.0, place=2, mark="*"), some(-3.0), "t"), "recurrent", ("r1",))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 12))
def test_pages_keep_every_column_once_in_order_and_groups_together(sizes, most):
    heads = tuple(Head(str(g), str(i), f"{g}/{i}") for g, size in enumerate(sizes) for i in range(size))
    found = pages(grid(heads=heads), most)
    assert [i for page in found for i in page] == list(range(len(heads)))
    assert all(len(page) <= most for page in found)
    for group in grid(heads=heads).groups():
        if len(group) <= most:
            assert sum(bool(set(group) & set(page)) for page in found) == 1


def test_places_go_by_what_is_printed():
    def places(values, **rest):
        rest = {"decimals": 1, "lower": False} | rest
        return [f.place if f else None for f in placed([None if v is None else Figure(v) for v in values], **rest)]

    assert places([1, 3, 2]) == [0, 1, 2]
    assert places([1, 3, 2], lower=True) == [1, 0, 2]
    assert places([2.96, 3.0, 2.0]) == [2, 1, 0] or places([2.96, 3.0, 2.0]) == [1, 1, 0]
    assert places([3.01, 3.02, 1]) == [1, 1, 0]
    assert places([5, None, None]) == [0, None, None]
    assert places([3, 2, 2, 1]) == [1, 2, 2, 0]
    partial = [Figure(9.0, n=3, asked=5), Figure(1.0), Figure(0.5)]
    assert [f.place for f in placed(partial, 1, False)] == [0, 1, 2]


def test_numbers():
    head, signed = HEADS[0], HEADS[2]
    assert (number(3.14159, head), number(-0.04, signed), number(2, signed)) == ("3.1", "0.0", "+2.0")
    assert (number(2.5e13, head), number(-3e9, signed), number(float("inf"), head)) == ("2.50e+13", "-3.00e+09", "inf")
    assert bounds(Figure(0, -1, 2), signed) == "-1.0 to +2.0"
    assert bounds(Figure(0), head) == ""


def test_samples_are_told_once_where_they_can_be():
    other = Line(("o",), (Figure(1.0, 0, 2, 7, 7), None, None, None))
    assert counts(grid(LINE, other)) == [None, 10, 10, 0]
    text = gridformats.terminal(grid(LINE, other))
    assert "n=7" in text
    assert "Samples a cell: A y 10, B d 10." in text
    assert "(n = 10 samples a cell)" in gridformats.markdown(grid(LINE))


def test_terminal_fits_and_repeats_the_names():
    heads = tuple(Head(f"Group {i // 3}", "xyz"[i % 3], f"k{i}") for i in range(30))
    wide = grid(Line(("model",), tuple(some(10.0 + i) for i in range(30))), heads=heads)
    for width in (40, 80, 120):
        text = gridformats.terminal(wide, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("Group 7") == 1
    assert len([x for x in gridformats.terminal(wide, 40).splitlines() if x.startswith("model  ")]) > 5


def test_marks_in_every_format():
    shown = grid(LINE)
    text = gridformats.terminal(shown)
    assert "50.0¹" in text
    assert "40.0*²" in text
    assert "**50.0** [49.0–51.0]" in gridformats.markdown(shown)
    assert r"<ins>40.0</ins>\*" in gridformats.markdown(shown)
    tex = gridformats.latex(shown)
    assert r"\textbf{50.0}" in tex
    assert r"\underline{40.0}$^{\ast}$" in tex
    assert r"\multicolumn{2}{c}{A} & \multicolumn{1}{c}{B}" in tex
    [row] = csvlib.DictReader(io.StringIO(gridformats.to_csv(shown)))
    assert (row["a_x"], row["a_x_low"], row["a_x_n"], row["text"], row["runs"]) == ("50.0", "49.0", "10", "t", "r1")


def test_a_grid_without_lines_has_its_heads_alone():
    for render in gridformats.RENDER.values():
        assert render(grid()).count("text") == 1


PAYLOADS = [
    "\x1b]0;pwn\x07title", "\x9b31mc1", "abc\u202etxt.exe", "a\x00b\rc\nd\te", "<script>alert(1)</script>",
    "![x](http://evil.example/a.png)", "` | <b>x</b> | `", "a|b\\|c", "**bold** _it_ # head", "\\input{/etc/passwd}",
    '\\write18{id} $x^2$ 100% a_b & c # ~ ^ { } < > " ` --- ?`', '=cmd|"/c calc"!A0', "-2+3", "\ud800",
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile():
    lines = [Line((p,), (some(1.0), p, None, p), p, (p,)) for p in PAYLOADS]
    return Grid("Title", ("model",), HEADS, tuple(lines), (Note("Named", tuple(PAYLOADS)),))


def test_hostile_texts_render_inert_everywhere(hostile):
    for render in gridformats.RENDER.values():
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", render(hostile))
    assert not re.search(r"\\(input|write)", gridformats.latex(hostile))
    for line in gridformats.markdown(hostile).splitlines():
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert not re.search(r"<(?!/?ins>)\w|!\[|\]\(|://", outside)
    for row in csvlib.reader(io.StringIO(gridformats.to_csv(hostile))):
        assert not [c for c in row if c[:1] in ("=", "+", "@") or re.match(r"-(?!\d)", c)]
        assert not [c for c in row if re.match(r"-\d+\D", c)]
    rows = [x for x in gridformats.markdown(hostile).splitlines() if x.startswith("|")]
    assert len({x.count("|") for x in rows}) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs and graphicx")
def test_hostile_texts_compile_in_latex(hostile, tmp_path):
    head = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(head + gridformats.latex(hostile) + "\\end{document}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


PLAIN, SIGNED = Head("", "score", "s"), Head("", "diff.", "d", 2, signed=True)
NO_END = float("nan")


@pytest.mark.parametrize(
    ("cell", "head", "want"),
    [
        (None, PLAIN, ""), ("", PLAIN, ""), ("text", PLAIN, "text"), (Figure(None), PLAIN, "–"),
        (Figure(3.14159), PLAIN, "3.1"), (Figure(50.0, 40.0, 60.0, 9, 9), PLAIN, "50.0 [40.0–60.0]"),
        (Figure(4096.0, sign="≥"), PLAIN, "≥4096.0"),
        (Figure(1024.0, 900.0, 1100.0, sign="<"), PLAIN, "<1024.0 [900.0–1100.0]"),
        (Figure(-1.5, -2.0, 0.5), SIGNED, "-1.50 [-2.00 to +0.50]"), (Figure(None, 1.0, 2.0), PLAIN, "– [1.0–2.0]"),
    ],
)  # fmt: skip
def test_a_cell_on_one_line(cell, head, want):
    assert text(cell, head) == want


@pytest.mark.parametrize(
    ("value", "head", "want"),
    [
        (0.0, SIGNED, "0.00"), (-0.004, SIGNED, "0.00"), (0.004, SIGNED, "0.00"), (-0.0049, PLAIN, "0.0"),
        (0.005, SIGNED, "+0.01"), (-0.05, PLAIN, "-0.1"), (0.06, PLAIN, "0.1"), (999_999.0, PLAIN, "999999.0"),
        (1e6, PLAIN, "1.00e+06"), (-1e6, SIGNED, "-1.00e+06"), (1234567890.0, SIGNED, "+1.23e+09"),
        (math.inf, PLAIN, "inf"), (-math.inf, SIGNED, "-inf"), (12.345, Head("", "n", "n", 0), "12"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(value, head, want):
    assert number(value, head) == want


def test_samples_are_told_once_where_they_agree():
    def of(*sizes):
        lines = [Line((str(i),), tuple(Figure(1.0, 0.0, 2.0, n, n) for n in row)) for i, row in enumerate(sizes)]
        return samples(grid(*lines, heads=(Head("A", "x", "x"), Head("A", "y", "y"))))

    assert of((10, 10), (10, 10)) == (" (n = 10 samples a cell)", [])
    assert of((10, 0), (10, 0)) == (" (n = 10 samples a cell)", [])  # a published column has none
    title, (note,) = of((10, 20), (10, 20))
    assert (title, note.text) == ("", "Samples a cell: A x 10, A y 20.")
    title, (note,) = of((10, 20), (11, 20))
    assert (title, note.text) == ("", "Samples a cell: A y 20.")
    assert of((10, 20), (11, 21)) == ("", []) and of((0, 0)) == ("", []) and samples(grid()) == ("", [])


def test_a_partial_figure_takes_no_part_in_counts_and_places():
    partial, whole = Figure(9.0, NO_END, NO_END, 3, 10), Figure(5.0, NO_END, NO_END, 10, 10)
    heads = (Head("", "x", "x"),)
    assert counts(grid(Line(("a",), (partial,)), Line(("b",), (whole,)), heads=heads)) == [10]
    assert counts(grid(Line(("a",), (partial,)), heads=heads)) == [0]
    assert [f.place for f in placed([partial, whole, Figure(4.0, n=10, asked=10)], 1, False)] == [0, 1, 2]
    assert [f.place for f in placed([partial, whole], 1, False)] == [0, 0]  # nothing is best of one
    assert partial.partial and not whole.partial and not Figure(1.0).partial


def test_sections_and_groups_keep_their_order():
    lines = [Line((name,), (None,) * 4, section) for name, section in (("a", "x"), ("b", "y"), ("c", "x"), ("d", ""))]
    made = grid(*lines)
    assert [(name, [line.labels[0] for line in inside]) for name, inside in made.sections()] == [
        ("x", ["a", "c"]), ("y", ["b"]), ("", ["d"]),
    ]  # fmt: skip
    assert made.groups() == [[0, 1], [2], [3]]
    apart = tuple(Head(group, "n", str(i)) for i, group in enumerate("ABA"))
    assert grid(heads=apart).groups() == [[0], [1], [2]]  # neighbours alone share a head
