"""Texts from outside, made inert for each place a report puts them.

Whatever a model wrote, and every name that came with a checkpoint or a records file, passes through one of these. All
of them begin by dropping what a terminal would obey: escape sequences, control and bidirectional characters.
"""

import html as _html
import re

from evalsuite.names import one_line, plain

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"''",
    "`": r"\textasciigrave{}",
    # A row that begins with one of these would give it to the line break before.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}
# Full-width forms of = + - @ count as formulas in some spreadsheets.
_FORMULA = re.compile(r"\s*['=+\-@\uff1d\uff0b\uff0d\uff20]")


def terminal(text: str) -> str:
    """One line of text without control sequences. It may hold rich markup: show it as `rich.text.Text`."""
    return one_line(text)


def markdown(text: str) -> str:
    """A code span: no emphasis, link, image, HTML or autolink works inside one.

    A vertical bar would end a table's cell even there, so a broken bar stands for it.
    """
    safe = one_line(text).replace("|", "\u00a6")
    if not safe:
        return ""
    longest = max((len(run) for run in re.findall("`+", safe)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{safe}{pad}{fence}"


def latex(text: str) -> str:
    """Text that typesets as itself with any engine; characters outside ASCII become their code points."""
    safe = "".join(_LATEX.get(c, c if c.isascii() else f"(U+{ord(c):04X})") for c in one_line(text))
    return re.sub("-(?=-)", "-{}", safe)  # hyphens that would join into a dash


def csv(text: str) -> str:
    """A text cell that no spreadsheet evaluates: one that begins like a formula gets an apostrophe in front."""
    safe = one_line(text)
    return f"'{safe}" if _FORMULA.match(safe) else safe


def figure(text: str, limit: int = 40) -> str:
    """A short label for a plot whose text is not parsed as mathematics; what its font lacks becomes a question mark."""
    safe = "".join(c if ord(c) < 0x250 else "?" for c in one_line(text))
    # matplotlib leaves labels with a leading underscore out of legends.
    shown = f" {safe}" if safe.startswith("_") else safe
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def html(text: str) -> str:
    """Text for an element or a quoted attribute."""
    return _html.escape(plain(text), quote=True)
