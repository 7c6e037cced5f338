"""95 % intervals of a mean score.

Scores of 0 and 1 are proportions: Wilson's interval, which keeps its coverage near 0 and 1 where the normal
approximation fails. Anything else (the fraction of four needles found, several scores of one sample) is resampled by
cluster, with a fixed seed, so that a table is the same every time it is made.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
SEED = 20260500  # any fixed number
BATCH_CELLS = 4_000_000  # of the resampled counts held at once

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its interval; `low` and `high` are NaN where the scores cannot give one (a single cluster)."""

    mean: float
    low: float
    high: float
    n: int  # clusters: samples, unless several scores share one
    method: Literal["wilson", "bootstrap"]


@lru_cache(maxsize=4096)
def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (without continuity correction) of a proportion of `n` >= 1 trials."""
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(low), float(high)


def cluster_totals(scores: Floats, clusters: ArrayLike | None, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted sum of the scores and sum of the weights of each cluster, [clusters] each; None: each score is one."""
    if clusters is None:
        return scores * weights, weights
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = (np.bincount(index, weights=w).astype(np.float64) for w in (scores * weights, weights))
    return sums, sizes


def bootstrap_means(
    scores: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None,
    resamples: int = RESAMPLES, seed: int = SEED,
) -> Floats:  # fmt: skip
    """Means of `resamples` draws of whole clusters with replacement, [resamples].

    Equal clusters are drawn together by their count (a multinomial), which is the same distribution and much less work.
    `weights` are the units each score stands for, [n]; None: one each.
    """
    values = np.asarray(scores, dtype=np.float64)
    units = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    sums, sizes = cluster_totals(values, clusters, units)
    kinds, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    n = int(counts.sum())
    rng = np.random.default_rng(seed)
    batch = max(1, BATCH_CELLS // len(counts))
    means = []
    for start in range(0, resamples, batch):
        drawn = rng.multinomial(n, counts / n, size=min(batch, resamples - start))
        means.append((drawn @ kinds[0]) / (drawn @ kinds[1]))
    return np.concatenate(means)


def bootstrap(
    scores: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None,
    confidence: float = 0.95, seed: int = SEED,
) -> tuple[float, float]:  # fmt: skip
    """Percentile interval of the mean by resampling clusters; NaN for fewer than two clusters."""
    values = np.asarray(scores, dtype=np.float64)
    n = len(values) if clusters is None else len(np.unique(np.asarray(clusters)))
    if n < 2:
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap_means(values, clusters, weights, seed=seed), [tail, 1 - tail])
    return float(low), float(high)


def interval(
    scores: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None, confidence: float = 0.95
) -> Interval:
    """Mean and interval of at least one finite score: Wilson for 0/1 scores of distinct clusters, else the bootstrap.

    Equal fractional scores get Wilson's interval of a proportion with their mean, which is too wide rather than empty.

    Args:
        scores: one score each, [n]
        clusters: what each score shares with others (a sample, a haystack), [n]; None: nothing
        weights: units each score stands for, [n]; None: one each
    """
    values = np.asarray(scores, dtype=np.float64)
    units = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite scores, got {len(values)} of which some are missing")
    n = len(values) if clusters is None else len(np.unique(np.asarray(clusters)))
    mean = float(values @ units / units.sum())
    equal = bool((units == units[0]).all())
    if equal and n == len(values) and np.isin(values, (0.0, 1.0)).all():
        low, high = wilson(int(values.sum()), n, confidence)
        return Interval(mean, low, high, n, "wilson")
    if n > 1 and (values == values[0]).all() and 0 <= mean <= 1:
        # Resampling equal scores gives no width. No score within 0..1 varies more than one of 0 or 1 of the same mean.
        k = round(mean * n, 9)
        low, high = wilson(math.floor(k), n, confidence)[0], wilson(math.ceil(k), n, confidence)[1]
        return Interval(mean, low, high, n, "wilson")
    low, high = bootstrap(values, clusters, units, confidence)
    return Interval(mean, low, high, n, "bootstrap")
