"""The page as a file: our template with the libraries, the styles and the data put in.

No text from outside ever becomes markup here or in the browser. The data is JSON in one script element, without a
single `<`, and every string in it has lost what a terminal or a bidirectional reader would obey. The page's content
security policy lets nothing run but the scripts whose hashes it names, lets nothing be fetched, and, where a browser
knows trusted types, lets no string become markup but a few constants of the table library (`static/base.js`).
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from evalsuite.names import plain

HERE = Path(__file__).parent
LIBRARIES = ("d3.min.js", "plot.umd.min.js", "tabulator.min.js")
SCRIPTS = ("base.js", "charts.js", "tables.js", "samples.js")
STYLES = ("vendor/tabulator_simple.min.css", "static/page.css")

# Plot adds one style element to each chart; this is what it says for the class "chart".
_PLOT_STYLE = "sha256-zrfVyvY1E/5V+DXZunsRZW8XTqTsuIZzp8dBDThhSn8="
_SOURCE_MAP = re.compile(r"\n(//|/\*)# sourceMappingURL=[^\n]*\s*$")  # of no use without the file it names


def render(content: Mapping[str, Any]) -> str:
    """The whole page around `content`, plain JSON types: the same content gives the same bytes."""
    libraries = [_read(f"vendor/{name}") for name in LIBRARIES]
    own = '"use strict";\n' + "\n".join(_read(f"static/{name}") for name in SCRIPTS)
    style = "\n".join(map(_read, STYLES))
    scripts = [*libraries, own]
    policy = {
        "default-src": ["'none'"],
        "script-src": [_source(text) for text in scripts],
        "style-src": [_source(style), f"'{_PLOT_STYLE}'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["default"],
    }
    return Template(_read("static/page.html")).substitute(
        policy="; ".join(f"{name} {' '.join(values)}" for name, values in policy.items()),
        style=style,
        data=data({**content, "notices": notices()}),
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )


def data(content: Any) -> str:
    """`content` as JSON that cannot end a script element, of ASCII alone."""
    text = json.dumps(_inert(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def vendored() -> list[dict[str, str]]:
    """The files of others: file, package, version, path in it, licence, notice, home and sha256."""
    found: list[dict[str, str]] = json.loads(_read("vendor/vendor.json"))
    return found


def notices() -> list[tuple[str, str]]:
    """Name and licence text of each library in the page: both ask for the text to go where the code goes."""
    texts = {f"{item['package']} {item['version']}": item["notice"] for item in vendored()}
    return [(name, _read(f"vendor/{notice}").strip()) for name, notice in texts.items()]


def _inert(value: Any) -> Any:
    match value:
        case str():
            return plain(value)
        case dict():
            return {_inert(key): _inert(item) for key, item in value.items()}
        case list() | tuple():
            return [_inert(item) for item in value]
        case _:
            return value


def _read(name: str) -> str:
    return _SOURCE_MAP.sub("", (HERE / name).read_text(encoding="utf-8"))


def _source(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
