"""Intervals of numbers that are made from all samples together, such as F1 or BLEU, and of their differences.

Samples are drawn with replacement, with a fixed seed, and the number is made again of each draw. Where it is a function
of sums over samples (BLEU of counts of n-grams), only the sums are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.stats.intervals import BATCH_CELLS, RESAMPLES, SEED
from gdn2.errors import DataError

FEWER = 200  # draws of a number that has to be made of whole samples every time; lm-eval takes 100 of such

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sums:
    """A number that is `finish` of the column sums of `counts` [samples, columns]."""

    counts: Floats
    finish: Callable[[Floats], float]


class Statistic(Protocol):
    """One number of many items."""

    def value(self, items: Sequence[Any]) -> float:
        """The number. Raises DataError where these items have none."""

    def sums(self, items: Sequence[Any]) -> Sums | None:
        """The same by way of sums, None where there is no such way."""


def draws(statistic: Statistic, items: Sequence[Any], seed: int = SEED) -> Floats:
    """The number of draws of `items` with replacement, NaN for a draw that has none.

    Equally many items are drawn alike: [draws] of two models on the same samples are pairs.
    """
    n = len(items)
    form = statistic.sums(items)
    if form is not None and not np.isclose(form.finish(form.counts.sum(0)), statistic.value(items), rtol=1e-9, atol=0):
        form = None
    found = []
    for times in _drawn(n, seed, FEWER if form is None else RESAMPLES):
        if form is not None:
            found += [form.finish(row) for row in times @ form.counts]
        else:
            found += [_value(statistic, [items[i] for i in np.repeat(np.arange(n), row).tolist()]) for row in times]
    return np.array(found, dtype=np.float64)


def _drawn(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each of `n` samples is in each draw, in batches of [draws, n]; of more draws the first are the same."""
    rng = np.random.default_rng(seed)
    batch = max(1, BATCH_CELLS // n)
    for start in range(0, resamples, batch):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(batch, resamples - start))


def _value(statistic: Statistic, items: Sequence[Any]) -> float:
    try:
        return statistic.value(items)
    except DataError:
        return float("nan")


def ends(found: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of draws; NaN where some draws have no number."""
    if not len(found) or np.isnan(found).any():
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)
