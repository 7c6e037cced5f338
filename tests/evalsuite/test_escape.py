"""What a model wrote is inert in every report."""

import csv as csvlib
import dataclasses
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from evalsuite.reports import escape, files, formats, frame, plots, tables

PAYLOADS = [
    "\x1b]0;pwn\x07title",
    "\x1b[2J\x1b[31mred",
    "\x9b31mc1",
    "abc\u202etxt.exe",
    "a\x00b\rc\nd\te",
    "[/INST] [red]x[/red] [link=file:///etc/passwd]y[/link]",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "![x](http://evil.example/a.png)",
    "[x](javascript:alert(1))",
    "https://evil.example www.evil.example a@evil.example",
    "`code` ``more`` ```",
    "` | <b>x</b> | `",
    "a|b\\|c",
    "\\",
    "**bold** _it_ # head",
    "\\input{/etc/passwd}",
    '\\write18{id} $x^2$ 100% a_b & c # ~ ^ { } < > " ` --- ?`',
    "^^5cinput{x}",
    '=cmd|"/c calc"!A0',
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "  =1+1",
    "\uff1d1+1",
    "'=1+1",
    "\t=1+1",
    "\u4e2d\u6587 \U0001f600",
    "\ud800",
    "_hidden",
    "$\\frac{",
    "x" * 500,
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_target_lets_control_characters_through(payload):
    for escaper in (escape.terminal, escape.markdown, escape.latex, escape.csv, escape.html, escape.figure):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", escaper(payload))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_one_line_targets_stay_on_one_line(payload):
    for escaper in (escape.terminal, escape.markdown, escape.latex, escape.csv, escape.figure):
        assert "\n" not in escaper(payload)


@pytest.mark.parametrize("payload", [p for p in PAYLOADS if escape.terminal(p)])
def test_markdown_is_one_code_span_without_a_bar(payload):
    shown = escape.markdown(payload)
    fence = re.match("`+", shown).group()
    body = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence)
    assert fence not in re.findall("`+", body)
    assert "|" not in shown
    assert not body.startswith("`")
    assert not body.endswith("`")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_latex_is_ascii_without_a_bare_special(payload):
    shown = escape.latex(payload)
    assert shown.isascii()
    names = "backslash|asciitilde|asciicircum|less|greater|bar|asciigrave"
    rest = re.sub(rf"\\text({names})\{{\}}|\\[{{}}&%$#_]|\{{[][*]?\}}", "", shown)
    assert not set("\\{}&%$#_~^<>|`[]*") & set(rest)
    assert "--" not in shown


@pytest.mark.parametrize("payload", PAYLOADS)
def test_csv_cells_never_begin_like_a_formula(payload):
    out = io.StringIO()
    csvlib.writer(out).writerow([escape.csv(payload), "next"])
    [row] = csvlib.reader(io.StringIO(out.getvalue()))
    assert len(row) == 2
    assert row[0].lstrip()[:1] not in {"=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20"}


class Collector(HTMLParser):
    """Collects every tag and attribute it meets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, attrs))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_html_adds_no_element_and_no_attribute(payload):
    parser = Collector()
    parser.feed(f"<p title=\"{escape.html(payload)}\" class='{escape.html(payload)}'>{escape.html(payload)}</p>")
    [(tag, attributes)] = parser.seen
    assert tag == "p"
    assert [name for name, _ in attributes] == ["title", "class"]


def test_plain_names_stay_legible():
    assert escape.latex("gdn2-tiny_1.3B") == r"gdn2-tiny\_1.3B"
    assert escape.markdown("gdn2-tiny") == "`gdn2-tiny`"
    assert escape.csv("gdn2-tiny") == escape.terminal("gdn2-tiny") == escape.figure("gdn2-tiny") == "gdn2-tiny"
    assert escape.markdown("") == ""


@pytest.fixture(scope="module")
def records(synthetic):
    """Records in which every name from outside is a payload."""
    rows = []
    for i, payload in enumerate(PAYLOADS):
        record = next(synthetic.records(synthetic.MODELS[i % 3]))
        names = dict.fromkeys(("model", "checkpoint", "mixer", "task", "protocol", "metric", "data", "run_id"), payload)
        rows.append(dataclasses.asdict(dataclasses.replace(record, key=str(i), **names)))
    return frame.from_rows(rows)


@pytest.fixture(scope="module")
def hostile(records):
    return tables.build(records, "all")


def test_hostile_names_render_inert_everywhere(hostile):
    for text in (formats.terminal(hostile), *(formats.render(hostile, f) for f in files.SUFFIXES.values())):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    assert not re.search(r"\\(input|write)", formats.latex(hostile))
    for row in csvlib.reader(io.StringIO(formats.to_csv(hostile))):
        assert len(row) == len(formats.CSV_COLUMNS)
        assert not [cell for cell in row if cell[:1] in ("=", "+", "@") or re.match(r"-(?!\d)", cell)]
    for line in formats.markdown(hostile).splitlines():
        if line.startswith("|"):
            assert not re.search(r"<\w|!\[|\]\(|://", re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line))


def test_markdown_tables_keep_their_width(hostile):
    widths = [line.count("|") for line in formats.markdown(hostile).splitlines() if line.startswith("| ---")]
    blocks = [b.splitlines() for b in formats.markdown(hostile).split("\n\n") if b.startswith("| model")]
    assert len(blocks) == len(widths)
    for block, width in zip(blocks, widths, strict=True):
        assert {line.count("|") for line in block} == {width}


def test_hostile_names_are_text_in_a_plot(records, tmp_path):
    few = dataclasses.replace(records, frame=records.frame.iloc[[5, 6, 18, 30, 31]])
    for draw, name in ((plots.accuracy, "accuracy"), (plots.depth_heatmap, "depth")):
        draw(few, [tmp_path / f"{name}.png", tmp_path / f"{name}.svg"])
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / f"{name}.svg").iter()}
        assert not tags & {"script", "a", "img", "foreignObject"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs and graphicx")
def test_hostile_names_compile_in_latex(hostile, tmp_path):
    head = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(head + formats.latex(hostile) + "\\end{document}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("text", "typeset"),
    [
        ("\\", r"\textbackslash{}"), ("{", r"\{"), ("}", r"\}"), ("&", r"\&"), ("%", r"\%"), ("$", r"\$"), ("#", r"\#"),
        ("_", r"\_"), ("~", r"\textasciitilde{}"), ("^", r"\textasciicircum{}"), ("<", r"\textless{}"),
        (">", r"\textgreater{}"), ("|", r"\textbar{}"), ('"', "''"), ("`", r"\textasciigrave{}"), ("[", "{[}"),
        ("]", "{]}"), ("*", "{*}"), ("a-b", "a-b"), ("--", "-{}-"), ("---", "-{}-{}-"), ("é", "(U+00E9)"),
        ("北", "(U+5317)"), ("🙂", "(U+1F642)"), ("a\n b", "a b"), ("", ""), ("Plain text 1.5", "Plain text 1.5"),
    ],
)  # fmt: skip
def test_every_letter_that_latex_would_read_is_typeset_as_itself(text, typeset):
    assert escape.latex(text) == typeset


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "`plain`"), ("", ""), (" \n ", ""), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a|b", "`a\u00a6b`"),
        ("*x* <b>", "`*x* <b>`"), ("a\tb", "`a b`"),
    ],
)  # fmt: skip
def test_a_code_span_is_longer_than_what_it_holds(text, shown):
    assert escape.markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("=1", "'=1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("'x", "''x"), ("\uff1d1", "'\uff1d1"),
        ("\uff0b", "'\uff0b"), ("\uff0d", "'\uff0d"), ("\uff20", "'\uff20"), ("a=1", "a=1"), ("1-2", "1-2"), ("", ""),
        ("  =1", "'=1"), ("\t+1", "'+1"), ("x\n=1", "x =1"),
    ],
)  # fmt: skip
def test_a_cell_that_begins_like_a_formula_is_a_text(text, kept):
    assert escape.csv(text) == kept


@pytest.mark.parametrize(
    ("text", "limit", "label"),
    [
        ("short", 40, "short"), ("x" * 40, 40, "x" * 40), ("x" * 41, 40, "x" * 39 + "…"), ("abcdef", 4, "abc…"),
        ("é ɏ", 40, "é ɏ"), ("\u0250", 40, "?"), ("北京", 40, "??"), ("_hidden", 40, " _hidden"), ("a_b", 40, "a_b"),
        ("_" + "x" * 39, 40, " _" + "x" * 37 + "…"), ("", 40, ""), ("a\nb", 40, "a b"),
    ],
)  # fmt: skip
def test_a_label_fits_and_has_letters_of_the_font_alone(text, limit, label):
    assert escape.figure(text, limit) == label and len(label) <= limit
    assert escape.figure("x" * 41) == "x" * 39 + "…"


def test_html_is_escaped_for_text_and_quoted_attributes():
    assert escape.html("""<a href="x" title='y'>&amp;""") == "&lt;a href=&quot;x&quot; title=&#x27;y&#x27;&gt;&amp;amp;"
    assert escape.html("line\n\x1b[2Jnext\u202e") == "line\nnext"
    assert escape.terminal("a\x1b[31m\n [b]c[/b]") == "a [b]c[/b]"
