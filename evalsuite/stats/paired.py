"""Comparing two models on the same samples, and planning how many samples a difference needs.

All tests are two-sided. Scores are paired by sample: sample i has the same key, value and depth for every model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from evalsuite.stats.intervals import SEED, bootstrap_means, wilson


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


def newcombe(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """95 % interval of the difference a - b of two 0/1 score vectors [n]: Newcombe 1998, paired method 10.

    Wilson's intervals of both, joined with their correlation: it has a width where no pair differs.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    n = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    p, q = (both + only_a) / n, (both + only_b) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + only_a, n), wilson(both + only_b, n)
    products = float(both * neither - only_a * only_b)
    if products > 0:
        products = max(0.0, products - n / 2)
    scale = np.sqrt(float(both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    phi = products / scale if scale else 0.0
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return float(p - q - np.sqrt(max(0.0, below))), float(p - q + np.sqrt(max(0.0, above)))


def paired(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None, seed: int = SEED
) -> Difference:
    """Compare paired scores [n]: exact McNemar for 0/1 scores of distinct clusters, else the paired bootstrap.

    The interval is Newcombe's for the former (see `newcombe`), the paired bootstrap's for the latter, where it is NaN
    for fewer than two clusters. The bootstrap p-value is twice the share of resampled differences on the far side of
    zero (at least 2 / (resamples + 1)). `weights` are the units each pair stands for, [n]; None: one each.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"paired scores need the same samples, got {first.shape} and {second.shape}")
    delta = first - second
    n = len(delta) if clusters is None else len(np.unique(np.asarray(clusters)))
    units = np.ones_like(delta) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(delta @ units / units.sum())
    even = bool((units == units[0]).all())
    if even and n == len(delta) and np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return Difference(mean, *newcombe(first, second), mcnemar(first, second), n, "mcnemar")
    if n < 2:
        return Difference(mean, float("nan"), float("nan"), 1.0, n, "bootstrap")
    means = bootstrap_means(delta, clusters, units, seed=seed)
    low, high = (float(x) for x in np.quantile(means, [0.025, 0.975]))
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


def discordant(difference: float, p: float, correlation: float) -> tuple[float, float]:
    """Shares of samples that only the first, and only the second, of two models gets right.

    Their scores are p + difference / 2 and p - difference / 2, correlated over the samples. Raises ValueError where no
    two such models exist.
    """
    first, second = p + difference / 2, p - difference / 2
    if not 0 <= second <= first <= 1:
        raise ValueError(f"no two scores around {p} differ by {difference}")
    both = first * second + correlation * float(np.sqrt(first * (1 - first) * second * (1 - second)))
    if both > second or both < first + second - 1:
        raise ValueError(f"scores of {first} and {second} cannot correlate by {correlation}")
    return first - both, second - both


def mcnemar_power(n: int, only_first: float, only_second: float, alpha: float = 0.05) -> float:
    """Power of the exact McNemar test with `n` samples: every count of discordant pairs by its probability."""
    from scipy.stats import binom

    share = only_first + only_second
    # Ten standard deviations around the mean hold all that is kept below; of many samples they are few counts.
    middle, around = n * share, 10 * float(np.sqrt(n * share)) + 10
    pairs = np.arange(max(0, int(middle - around)), min(n, int(middle + around)) + 1)
    weight = binom.pmf(pairs, n, share)
    kept = weight > 1e-12
    pairs, weight = pairs[kept], weight[kept]
    # Largest k of the smaller count that is rejected: 2 * P(X <= k) <= alpha under a fair coin; -1 where none is.
    k = binom.ppf(alpha / 2, pairs, 0.5)
    k = np.where(2 * binom.cdf(k, pairs, 0.5) <= alpha, k, k - 1)
    chance = only_first / share
    rejected = binom.cdf(k, pairs, chance) + binom.sf(pairs - k - 1, pairs, chance)
    return float(weight @ np.where(k >= 0, rejected, 0.0))


def mcnemar_samples_needed(
    difference: float, p: float, correlation: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Smallest n, to within a percent, at which the exact McNemar test has `power`; see `discordant`."""
    only_first, only_second = discordant(difference, p, correlation)
    n = samples_needed(difference, p, correlation, power, alpha)
    while mcnemar_power(n, only_first, only_second, alpha) < power:
        n += max(1, n // 100)
    return n
