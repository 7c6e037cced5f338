"""Comparing two models on the same samples, and planning how many samples a difference needs.

All tests are two-sided. Scores are paired by sample: sample i has the same key, value and depth for every model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from evalsuite.stats.intervals import SEED, bootstrap_means


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of `a - b` over paired samples, its 95 % interval and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    method: Literal["mcnemar", "bootstrap"]


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact McNemar p-value of two 0/1 score vectors [n]: the discordant pairs against a fair coin."""
    from scipy.stats import binomtest

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    only_a, only_b = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired(a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None, seed: int = SEED) -> Difference:
    """Compare paired scores [n]: exact McNemar for 0/1 scores of distinct clusters, else the paired bootstrap.

    The interval is the paired bootstrap's in both cases; it is NaN for fewer than two clusters. The bootstrap
    p-value is twice the share of resampled differences on the far side of zero (at least 1 / (resamples + 1)).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"paired scores need the same samples, got {first.shape} and {second.shape}")
    delta = first - second
    n = len(delta) if clusters is None else len(np.unique(np.asarray(clusters)))
    mean = float(delta.mean())
    if n < 2:
        return Difference(mean, float("nan"), float("nan"), 1.0, n, "bootstrap")
    means = bootstrap_means(delta, clusters, seed=seed)
    low, high = (float(x) for x in np.quantile(means, [0.025, 0.975]))
    if n == len(delta) and np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return Difference(mean, low, high, mcnemar(first, second), n, "mcnemar")
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1))
    return Difference(mean, low, high, p, n, "bootstrap")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: reject those below alpha to keep the family-wise error at alpha."""
    order = np.argsort(p_values, kind="stable")
    m = len(p_values)
    adjusted = np.zeros(m)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return [float(p) for p in adjusted]


def _quantile_sum(power: float, alpha: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power))


def detectable(n: int, p: float, correlation: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference of two proportions near `p` that `n` samples each detect with `power`.

    `correlation` between the two models' scores on one sample; 0 is the unpaired case. Normal approximation.
    """
    return _quantile_sum(power, alpha) * float(np.sqrt(2 * p * (1 - p) * (1 - correlation) / n))


def samples_needed(
    difference: float, p: float, correlation: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Smallest n for which `detectable` is at most `difference` (both in 0..1)."""
    if not 0 < difference < 1:
        raise ValueError(f"a difference lies between 0 and 1, got {difference}")
    z = _quantile_sum(power, alpha)
    return int(np.ceil(2 * p * (1 - p) * (1 - correlation) * (z / difference) ** 2))
