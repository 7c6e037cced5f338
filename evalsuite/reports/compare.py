"""Models against each other on the same samples.

Two scores are paired where task, version, profile, data, metric, length, seed and sample are the same and so is the
right answer: a profile that fits samples to the tokenizer may ask two models different questions under one number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evalsuite.reports.cells import MODEL, PERCENT, QUESTIONS, length_label, members, task_label
from evalsuite.reports.frame import Records
from evalsuite.reports.grid import Figure, Grid, Head, Line, Note
from evalsuite.reports.measured import PART, Pair, pair
from evalsuite.stats import Difference, holm
from gdn2.errors import DataError, UserError

if TYPE_CHECKING:
    import pandas as pd

Group = dict[str, "tuple[float, pd.DataFrame]"]  # by name a figure, more being better, and the records behind it
ALPHA = 0.05
CELLS = [*QUESTIONS, "length"]
SAMPLE = ["seed", "sample_id", "target"]  # what makes two samples of one cell the same
Z = 1.959964 + 0.841621  # two-sided 5 %, 80 % power


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell of two models: scores as recorded, `difference` second minus first."""

    task: str
    protocol: str
    metric: str
    length: int
    first: float
    second: float
    difference: Difference
    detectable: float  # smallest true difference found with 80 % power, NaN where all pairs differ alike
    unpaired: int  # samples of either model that the other was not asked
    shares: bool
    adjusted: float = 1.0  # Holm's p over the family


def paired_records(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, Pair] | None:
    """The pairs of two cells' records and how they compare.

    None where they share no sample, or their numbers cannot be made here.
    """
    part = [PART] if PART in a else []
    both = a.merge(b, on=[*SAMPLE, *part], suffixes=("_a", "_b"))
    # Of a group, each task has to be there.
    if not len(both) or any(set(rows[PART]) != set(both[PART]) for rows in (a, b) if part):
        return None
    if both.duplicated(["seed", "sample_id", *part]).any():
        raise DataError("a model answered one sample several times under different settings: compare single runs")
    try:
        return both, pair(both)
    except DataError:
        return None


def below_best(groups: Sequence[Group]) -> set[tuple[int, str]]:
    """(group, name) of those significantly worse than the best of their group, by Holm over all tests of all groups.
    """
    tests: dict[tuple[int, str], float] = {}
    for i, group in enumerate(groups):
        best = max(group, key=lambda name: (group[name][0], name), default="")
        for name, (_, rows) in group.items():
            if name != best and (found := paired_records(group[best][1], rows)):
                tests[i, name] = found[1].difference.p
    adjusted = holm(list(tests.values()))
    return {key for key, p in zip(tests, adjusted, strict=True) if p < ALPHA}


def worse_note(group: str) -> Note:
    """What the mark of `below_best` means."""
    return Note(f"* worse than the best measured of its {group}: p < {ALPHA}, paired tests, Holm over the table.")


def comparisons(first: Records, second: Records) -> Iterator[Comparison]:
    """Every cell that both models answered, in order of task and length, then those of groups."""
    theirs = _cells(second)
    for key, rows in _cells(first).items():
        other = theirs.get(key)
        found = None if other is None else paired_records(other, rows)
        if other is None or found is None:
            continue
        both, made = found
        named = dict(zip(CELLS, key, strict=True))
        scores = both[["score_a", "score_b"]].stack()
        yield Comparison(
            named["task"], named["protocol"], named["metric"], int(named["length"]),
            made.second, made.first, made.difference, Z * made.error if made.error else float("nan"),
            len(rows) + len(other) - 2 * len(both),
            bool(scores.between(0, 1).all() or both["aggregation_a"].isin(PERCENT).all()),
        )  # fmt: skip


def _cells(records: Records) -> dict[tuple[Any, ...], pd.DataFrame]:
    """The records of one model by `CELLS`."""
    found = dict(iter(records.frame.groupby(CELLS, observed=True)))
    of_groups = {key: rows for key, rows in members(records).items() if PART in rows}
    return found | {key[len(MODEL) + 1 :]: rows for key, rows in of_groups.items()}


HEADS = (
    Head("", "profile", "profile"),
    Head("score", "first", "first", decimals=2),
    Head("score", "second", "second", decimals=2),
    Head("", "difference", "difference", decimals=2, signed=True),
    Head("", "p", "p", decimals=4),
    Head("", "p (Holm)", "p_holm", decimals=4),
    Head("", "detectable", "detectable", decimals=2),
    Head("", "unpaired", "unpaired", decimals=0),
)


def build(runs: Sequence[Records]) -> Grid:
    """The first model against each other one: paired tests on every cell both answered, Holm over all of them.

    `runs` hold one model each, with targets. Raises UserError for fewer than two, DataError where nothing is paired.
    """
    if len(runs) < 2:
        raise UserError("compare takes at least two runs: the first is what the others are compared with")
    base, *others = [_named(records) for records in runs]
    found: list[tuple[str, tuple[str, ...], Comparison]] = []
    for name, records in others:
        ids = tuple(sorted({*base[1].frame["run_id"].unique(), *records.frame["run_id"].unique()}))
        found += [(f"{name} against {base[0]}", ids, c) for c in comparisons(base[1], records)]
    if not found:
        raise DataError("these runs share no samples: ask the same tasks, lengths, profile, seed and data")
    adjusted = holm([c.difference.p for _, _, c in found])
    lines = [_line(s, ids, replace(c, adjusted=p)) for (s, ids, c), p in zip(found, adjusted, strict=True)]
    small = any(not c.shares and max(abs(c.first), abs(c.second)) <= 1 for _, _, c in found)
    heads = tuple(replace(head, decimals=4) if small and head.decimals else head for head in HEADS)
    return Grid("Paired comparison", ("task", "length"), heads, tuple(lines), tuple(_notes(len(found))))


def _notes(tests: int) -> list[Note]:
    return [
        Note(
            "Second minus first on the samples both answered, 95 % interval (Newcombe; for fractions and numbers of "
            "all samples together the paired bootstrap); shares in percent."
        ),
        Note(
            f"* p < {ALPHA} after Holm's correction over the {tests} tests shown: exact McNemar for right and wrong, "
            "the paired bootstrap for other scores; below 0.00005 p prints as 0."
        ),
        Note("Detectable: the smallest true difference these pairs show with 80 % power at 5 %."),
        Note("Unpaired: samples that only one of the two was asked, or asked with another right answer."),
    ]


def _named(records: Records) -> tuple[str, Records]:
    models = records.frame[MODEL].drop_duplicates()
    if len(models) != 1:
        names = ", ".join(sorted(set(models["model"]))[:5])
        raise UserError(f"compare takes runs of one model each, not of {names or 'none'}")
    name, checkpoint = models.iloc[0][["model", "checkpoint"]]
    return f"{name} @{checkpoint[:8]}", records


def _line(section: str, ids: tuple[str, ...], c: Comparison) -> Line:
    scale = 100 if c.shares else 1
    d = c.difference
    mark = "*" if c.adjusted < ALPHA else ""
    moved = Figure(scale * d.mean, scale * d.low, scale * d.high, d.n, d.n, mark=mark)
    detectable = None if math.isnan(c.detectable) else Figure(scale * c.detectable)
    task = task_label(c.task) + ("" if c.metric in ("string_match_all", "acc") else f" {c.metric}")
    cells = (
        c.protocol, Figure(scale * c.first), Figure(scale * c.second), moved, Figure(d.p), Figure(c.adjusted),
        detectable, Figure(c.unpaired),
    )  # fmt: skip
    return Line((task, length_label(c.length) or "-"), cells, section, ids)
