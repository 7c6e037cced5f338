"""The number of the records behind one cell, its interval, and the difference of two models: whatever kind it is.

A cell's records hold scores, whose weighted mean is its number; or items of which lm-eval's aggregate of all of them
is; or they are those of a group's tasks, whose numbers are averaged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evalsuite import items
from evalsuite.groups import average
from evalsuite.lm_eval_bridge.corpus import aggregate
from evalsuite.scorers import PERPLEXITIES, nats, overall
from evalsuite.stats import Difference, Interval, Sums, bootstrap_means, chance, draws, ends, interval, paired
from evalsuite.stats.intervals import SEED
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from evalsuite.schema import Record

PART = "part"  # column of a group's records: the place of the task in the group
COUNTS = "counts"  # column of a group's records: what the task counts in its average


@dataclass(frozen=True, slots=True)
class Pair:
    """One cell of two models, in the unit of the records."""

    first: float
    second: float
    difference: Difference  # first - second
    error: float  # standard error of the difference


def measure(rows: pd.DataFrame) -> Interval:
    """The number of one cell's records with its 95 % interval.

    Raises DataError where the records are of an aggregate that cannot be made here.
    """
    if PART in rows:
        parts = _parts(rows)
        weights = _weights(parts)
        values = [overall(_metric(part), measure(part).mean) for part in parts]
        value = average(values, weights)
        low, high = ends(_averaged([_drawn(part, SEED + i) for i, part in enumerate(parts)], weights), value)
        mean, low, high = (nats(_metric(rows), number) for number in (value, low, high))
        return Interval(mean, low, high, len(rows), "bootstrap")
    if (name := _aggregation(rows)) is not None:
        return corpus(name, _texts(rows))
    samples = rows["sample"].to_numpy() if "sample" in rows else None
    distinct = samples is None or len(samples) == len(set(samples.tolist()))
    return interval(rows["score"].to_numpy(), None if distinct else samples, rows["weight"].to_numpy())


@lru_cache(maxsize=4096)
def corpus(aggregation: str, texts: tuple[str, ...]) -> Interval:
    """What `aggregation` makes of items, as records hold them, in the order of samples. Raises DataError."""
    value = aggregate(aggregation).value(_items(texts))
    low, high = ends(_corpus_draws(aggregation, texts), value) if len(texts) > 1 else (float("nan"), float("nan"))
    return Interval(value, low, high, len(texts), "bootstrap")


@lru_cache(maxsize=4096)
def _corpus_draws(aggregation: str, texts: tuple[str, ...]) -> NDArray[np.float64]:
    return draws(aggregate(aggregation), _items(texts))


def in_order(records: Iterable[Record]) -> tuple[str, ...]:
    """Items of records in the order of their samples, which last digits depend on."""
    kept = sorted(records, key=lambda record: (record.seed, *_place(record.sample_id)))
    return tuple(record.item or "" for record in kept)


def pair(both: pd.DataFrame) -> Pair:
    """Compare two models on the pairs of their records of one cell.

    Columns of the first end in _a, of the second in _b. Raises DataError where a number cannot be made here.
    """
    first, second = (_side(both, side) for side in "ab")
    if PART not in both and _aggregation(first) is None:
        weights = first["weight"].to_numpy()
        a, b = (side["score"].to_numpy() for side in (first, second))
        means = [float(each @ weights / weights.sum()) for each in (a, b)]
        spread = float(np.std(a - b, ddof=1)) if len(both) > 1 else 0.0
        return Pair(means[0], means[1], paired(a, b, weights=weights), spread / math.sqrt(len(both)))
    values = [measure(side).mean for side in (first, second)]
    if PART in both:
        parts = list(zip(_parts(first), _parts(second), strict=True))
        found = [_moved(a, b, SEED + i) for i, (a, b) in enumerate(parts)]
        moved = _averaged(found, _weights([a for a, _ in parts]))
        values = [overall(_metric(first), value) for value in values]
    else:
        moved = _moved(first, second, SEED)
    value = values[0] - values[1]
    difference = Difference(value, *ends(moved, value), chance(moved, value), len(both), "bootstrap")
    return Pair(values[0], values[1], difference, float(np.std(moved, ddof=1)))


class _Mean:
    """The mean of (score, weight) as people read it; see `evalsuite.stats.Statistic`."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def value(self, items: Sequence[Any]) -> float:
        mean = sum(score * weight for score, weight in items) / sum(weight for _, weight in items)
        return overall(self._metric, mean)

    def sums(self, items: Sequence[Any]) -> Sums:
        counts = np.array([(score * weight, weight) for score, weight in items])
        return Sums(counts, lambda sums: overall(self._metric, float(sums[0] / sums[1])))


def _drawn(rows: pd.DataFrame, seed: int) -> NDArray[np.float64]:
    """The number of one cell as people read it, of draws of its samples; those of two seeds are independent."""
    if (name := _aggregation(rows)) is not None:
        return np.random.default_rng(seed).permutation(_corpus_draws(name, _texts(rows)))
    found = bootstrap_means(rows["score"].to_numpy(), None, rows["weight"].to_numpy(), seed=seed)
    return np.exp(found) if _metric(rows) in PERPLEXITIES else found


def _moved(first: pd.DataFrame, second: pd.DataFrame, seed: int) -> NDArray[np.float64]:
    """The difference first - second of the numbers, of draws of their common samples."""
    if (name := _aggregation(first)) is not None:
        found = [_corpus_draws(name, _texts(rows)) for rows in (first, second)]
        # Of more draws the first are of the same samples.
        fewest = min(map(len, found))
        return np.random.default_rng(seed).permutation(found[0][:fewest] - found[1][:fewest])
    if _metric(first) in PERPLEXITIES:
        statistic = _Mean(_metric(first))
        pairs = [list(zip(rows["score"], rows["weight"], strict=True)) for rows in (first, second)]
        return draws(statistic, pairs[0], seed) - draws(statistic, pairs[1], seed)
    delta = first["score"].to_numpy() - second["score"].to_numpy()
    return bootstrap_means(delta, None, first["weight"].to_numpy(), seed=seed)


def _averaged(found: Sequence[NDArray[np.float64]], weights: Sequence[int]) -> NDArray[np.float64]:
    """Draws of a group from those of its tasks; as many as the fewest of one."""
    fewest = min(map(len, found))
    averaged: NDArray[np.float64] = np.stack([each[:fewest] for each in found], axis=1) @ np.array(weights)
    return averaged / sum(weights)


def _parts(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [part.drop(columns=PART) for _, part in rows.groupby(PART, sort=True)]


def _weights(parts: Sequence[pd.DataFrame]) -> list[int]:
    return [int(part[COUNTS].iloc[0]) for part in parts]


def _side(both: pd.DataFrame, side: str) -> pd.DataFrame:
    """The columns of one model, those that both share included, in the same order of rows for either."""
    names = {name: name.removesuffix(f"_{side}") for name in both if name.endswith(f"_{side}")}
    shared = [name for name in both if not name.endswith(("_a", "_b"))]
    return both[[*names, *shared]].rename(columns=names)


def _aggregation(rows: pd.DataFrame) -> str | None:
    """What makes one number of the records' items; None where they have scores."""
    names = set(rows["aggregation"].unique())
    if len(names) > 1:
        raise DataError(f"records of one metric name several aggregations: {', '.join(sorted(names))}")
    return names.pop() or None


def _texts(rows: pd.DataFrame) -> tuple[str, ...]:
    """Items in the order of their samples."""
    items, seeds = rows["item"].astype("str").tolist(), rows["seed"].tolist()
    places = [_place(name) for name in rows["sample_id"].astype("str")]
    return tuple(items[i] for i in sorted(range(len(rows)), key=lambda i: (seeds[i], *places[i])))


def _place(sample_id: str) -> tuple[int, str]:
    return (int(sample_id) if re.fullmatch("[0-9]{1,18}", sample_id) else -1), sample_id


def _metric(rows: pd.DataFrame) -> str:
    return str(rows["metric"].iloc[0])


def _items(texts: Iterable[str]) -> list[Any]:
    try:
        return [items.loads(text) for text in texts]
    except ValueError as error:
        raise DataError(f"an item of these records is {error}") from None
