"""Intervals of numbers that are made from all samples together, such as F1 or BLEU, and of their differences.

Samples are drawn with replacement, with a fixed seed, and the number is made again of each draw. Where it is a function
of sums over samples (BLEU of counts of n-grams), only the sums are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.stats.intervals import BATCH_CELLS, RESAMPLES, SEED
from gdn2.errors import DataError

# Draws of a number that has to be made of whole samples every time: as many as hold this many characters in all.
WORK = 10_000_000
FEWEST, MOST = 20, 200
TAILS = 100  # draws from which percentiles are taken
Z = 1.959964  # two-sided 5 %

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
    fewer = min(MOST, max(FEWEST, WORK // sum(len(repr(item)) for item in items)))
    for times in _drawn(n, seed, fewer if form is None else RESAMPLES):
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


def ends(found: Floats, value: float) -> tuple[float, float]:
    """95 % interval around `value`, of which `found` are draws; NaN where some draws have no number.

    Percentiles of enough draws, of fewer than `TAILS` a normal interval with their standard deviation.
    """
    if len(found) < 2 or np.isnan(found).any():
        return float("nan"), float("nan")
    if len(found) < TAILS:
        reach = Z * float(np.std(found, ddof=1))
        return value - reach, value + reach
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def chance(found: Floats, value: float) -> float:
    """p-value of a difference `value`, of which `found` are draws, being none; 1 where that cannot be said."""
    if len(found) < 2 or np.isnan(found).any():
        return 1.0
    if len(found) < RESAMPLES:
        spread = float(np.std(found, ddof=1))
        return math.erfc(abs(value) / spread / math.sqrt(2)) if spread else float(value == 0)
    below, above = int((found <= 0).sum()), int((found >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(found) + 1))
