"""The published figures: Tables 2-5 and Figure 2 of Gated DeltaNet-2 (arXiv 2605.22791).

They are data beside the measured ones: a report shows them in columns of their own, labelled as published.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Item = Literal["table2", "table3", "table4", "table5", "figure2"]

NINE = (
    "lambada_acc", "piqa_acc", "hellaswag_acc_norm", "winogrande_acc", "arc_easy_acc", "arc_challenge_acc",
    "openbookqa_acc", "social_iqa_acc", "boolq_acc",
)  # fmt: skip
RECALL = ("swde", "squad", "fda", "triviaqa", "nq", "drop")


@dataclass(frozen=True, slots=True)
class Column:
    """Where a column of the paper comes from here: a metric of a task, or the mean of other columns.

    A column with `lower` is a perplexity, else a share in percent.
    """

    group: str  # as the paper prints it
    name: str
    task: str = ""
    metric: str = ""
    length: int = 0
    lower: bool = False
    mean_of: tuple[str, ...] = ()

    @property
    def decimals(self) -> int:
        """As the paper prints it."""
        return 1 if self.length else 2


_NIAH = {
    "s_niah_1": ("S-NIAH-1", "niah_single_1"),
    "s_niah_2": ("S-NIAH-2", "niah_single_2"),
    "s_niah_3": ("S-NIAH-3", "niah_single_3"),
    "mk_niah_1": ("MK-NIAH-1", "niah_multikey_1"),
}
COLUMNS: dict[str, Column] = {
    "wikitext_ppl": Column("Wiki.", "ppl", "wikitext", "word_perplexity", lower=True),
    "lambada_ppl": Column("LMB.", "ppl", "lambada_openai", "perplexity", lower=True),
    "lambada_acc": Column("LMB.", "acc", "lambada_openai", "acc"),
    "piqa_acc": Column("PIQA", "acc", "piqa", "acc"),
    "hellaswag_acc_norm": Column("Hella.", "acc_n", "hellaswag", "acc_norm"),
    "winogrande_acc": Column("Wino.", "acc", "winogrande", "acc"),
    "arc_easy_acc": Column("ARC-e", "acc", "arc_easy", "acc"),
    "arc_challenge_acc": Column("ARC-c", "acc", "arc_challenge", "acc"),
    "openbookqa_acc": Column("OBQA", "acc", "openbookqa", "acc"),
    "social_iqa_acc": Column("SIQA", "acc", "social_iqa", "acc"),
    "boolq_acc": Column("BoolQ", "acc", "boolq", "acc"),
    **{
        f"{short}@{length}": Column(label, f"{length // 1024}K", task, "string_match_all", length)
        for short, (label, task) in _NIAH.items()
        for length in (1024, 2048, 4096, 8192)
    },
    **{
        name: Column(label, "score", name, "contains")
        for name, label in zip(RECALL, ("SWDE", "SQuAD", "FDA", "TriviaQA", "NQ", "DROP"), strict=True)
    },
    "common_avg": Column("Common.", "avg", mean_of=NINE),
    "recall_avg": Column("Recall", "avg", mean_of=RECALL),
}
# "avg" stands for another mean in each table.
MEANS: dict[Item, tuple[str, ...]] = {"table2": NINE, "table4": RECALL}


def column(item: Item, name: str) -> Column:
    """The column `name` of a table."""
    return Column("Avg.", "", mean_of=MEANS[item]) if name == "avg" else COLUMNS[name]


def alias(family: str, mixer: str, mixers: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Family and name under which the paper lists a model like this one.

    Args:
        mixers: the model's own options by layer name, as its run says them; empty where it does not.
    """
    if family == "transformer":
        return "hybrid", "transformer"
    options = next((dict(o) for o in mixers.values() if o.get("mixer") == mixer), {})
    if mixer == "mamba3" and options:
        return family, "mamba3_siso" if options.get("rank") is None else "mamba3_mimo"
    if mixer == "gdn2":
        for option, (value, name) in ABLATIONS.items():
            if options.get(option) == value:
                return family, name
    return family, mixer


# Options of the mixer gdn2 that Table 5 varies, and its names for what they make.
ABLATIONS = {
    "scalar_erase": (True, "gdn2_scalar_erase (w-only: scalar b, channel w)"),
    "scalar_write": (True, "gdn2_scalar_write (b-only: channel b, scalar w)"),
    "erase_max": (2, "gdn2_neg_eigval (b in [0,2])"),
}
UNABLATED = "gdn2 (b in [0,1])"


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
                source = COLUMNS[column]
                scores[family, mixer, source.task, source.length] = value
    return scores
