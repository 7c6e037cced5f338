"""How many pairs a state holds: where recall falls below half as there are more, with an interval from resampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from evalsuite.stats.intervals import SEED, bootstrap_means
from evalsuite.stats.length import Floats, crossing, monotone

HALF = 0.5


@dataclass(frozen=True, slots=True)
class Capacity:
    """Pairs with a 95 % interval; each of the three is a measured end of the sweep when censored there.

    `censored` "above": at least half is still recalled of the most pairs; "below": less than half of the fewest.
    """

    pairs: float
    low: float
    high: float
    censored: Literal["", "above", "below"]


def capacity(scores: Mapping[int, ArrayLike], seed: int = SEED) -> Capacity:
    """Capacity from the recall (0..1, [n] contexts each) of at least one number of pairs.

    A curve that never rises with the logarithm of the pairs is fitted and read between its points. Raises ValueError
    without scores.
    """
    if not scores:
        raise ValueError("a capacity needs the recall of at least one number of pairs")
    ordered = sorted(scores)
    logs = np.log2(np.asarray(ordered, dtype=np.float64))
    counts: Floats = np.asarray([len(np.asarray(scores[pairs])) for pairs in ordered], dtype=np.float64)
    means: Floats = np.asarray([np.asarray(scores[pairs]).mean() for pairs in ordered], dtype=np.float64)
    draws = np.stack([bootstrap_means(scores[pairs], seed=seed + i) for i, pairs in enumerate(ordered)], axis=1)
    low, high = np.quantile([crossing(logs, monotone(draw, counts), HALF) for draw in draws], [0.025, 0.975])
    fitted = monotone(means, counts)
    censored: Literal["", "above", "below"] = ""
    if fitted[-1] >= HALF:
        censored = "above"
    elif fitted[0] < HALF:
        censored = "below"
    return Capacity(float(2 ** crossing(logs, fitted, HALF)), float(2**low), float(2**high), censored)
