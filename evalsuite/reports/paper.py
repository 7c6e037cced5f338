"""The published figures: Tables 2-5 and Figure 2 of Gated DeltaNet-2 (arXiv 2605.22791).

They are data beside the measured ones: a report shows them in columns of their own, labelled as published.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Item = Literal["table2", "table3", "table4", "table5", "figure2"]

# Names of RULER's tasks in the paper's Table 3 and in this harness.
RULER_TASKS = {
    "s_niah_1": "niah_single_1",
    "s_niah_2": "niah_single_2",
    "s_niah_3": "niah_single_3",
    "mk_niah_1": "niah_multikey_1",
}


@dataclass(frozen=True, slots=True)
class Published:
    """One table or figure as printed: `rows[family][model][column]`, accuracies in percent."""

    source: str  # title and arXiv number
    models: str  # what was trained, on what
    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Mapping[str, float]]]


def directory() -> Path:
    """Where the figures lie: beside this file in an installed package, results/paper in a checkout."""
    installed = Path(__file__).parent / "paper"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "results" / "paper"


@cache
def load(item: Item) -> Published:
    """One table or figure. Raises FileNotFoundError when the package was built without its data."""
    raw = json.loads((directory() / f"{item}.json").read_text(encoding="utf-8"))
    source = raw["source"]
    return Published(
        source=f"{source['title']}, arXiv {source['arxiv']}, {raw['item']}",
        models=source["models"],
        title=raw["title"],
        columns=tuple(raw["columns"]),
        rows=raw["rows"],
    )


def ruler_scores() -> dict[tuple[str, str, str, int], float]:
    """Table 3 by (family, mixer, task, length in tokens), in percent, with this harness's task names."""
    scores: dict[tuple[str, str, str, int], float] = {}
    for family, models in load("table3").rows.items():
        for mixer, cells in models.items():
            for column, value in cells.items():
                name, length = column.split("@")
                scores[family, mixer, RULER_TASKS[name], int(length)] = value
    return scores
