"""Effective context length: the longest context at which a model still scores above a threshold.

Two definitions: an absolute threshold (RULER: 85.6 %, Llama-2-7B's average at 4K) and one relative to the model's own
score at its shortest contexts (NoLiMa: 85 % of the base score), which suits small base models.

Accuracy is made monotone in length (isotonic regression, weighted by samples) and read between the measured lengths on
a log axis. The interval resamples the scores of each length. A value at either end of the sweep is censored: the truth
lies beyond it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from evalsuite.stats.intervals import SEED, Floats, bootstrap_means

RULER_THRESHOLD = 0.856
BASE_SHARE = 0.85  # NoLiMa
BASE_LENGTH = 1024  # NoLiMa's longest base context, tokens


@dataclass(frozen=True, slots=True)
class EffectiveLength:
    """Tokens with a 95 % interval; each of the three is a measured end of the sweep when censored there.

    `censored` "above": the threshold is still met at the longest length; "below": not met at the shortest.
    """

    tokens: float
    low: float
    high: float
    censored: Literal["", "above", "below"]
    threshold: float  # 0..1


def monotone(scores: Floats, weights: Floats) -> Floats:
    """Least-squares fit of `scores` [lengths] that never rises with length."""
    from scipy.optimize import isotonic_regression

    return np.asarray(isotonic_regression(scores, weights=weights, increasing=False).x)


def crossing(log_lengths: Floats, scores: Floats, threshold: float) -> float:
    """Where non-increasing `scores` fall below `threshold`, in log tokens, clipped to the measured range."""
    if scores[0] < threshold:
        return float(log_lengths[0])
    met = int(np.flatnonzero(scores >= threshold)[-1])
    if met == len(scores) - 1:
        return float(log_lengths[-1])
    share = (scores[met] - threshold) / (scores[met] - scores[met + 1])
    return float(log_lengths[met] + share * (log_lengths[met + 1] - log_lengths[met]))


def _base(lengths: Floats, scores: Floats) -> float:
    short = lengths <= max(BASE_LENGTH, lengths[0])
    return float(scores[short].max())


def effective_length(
    scores: Mapping[int, ArrayLike], definition: Literal["absolute", "relative"] = "absolute", seed: int = SEED
) -> EffectiveLength:
    """Effective length from the scores (0..1, [n] each) of at least one length in tokens.

    "absolute" asks for `RULER_THRESHOLD`, "relative" for `BASE_SHARE` of the best score at or below `BASE_LENGTH`
    tokens (or at the shortest length, when all are longer); the base is resampled with the rest.
    """
    if not scores:
        raise ValueError("an effective length needs scores of at least one length")
    ordered = sorted(scores)
    lengths = np.asarray(ordered, dtype=np.float64)
    counts = np.asarray([len(np.asarray(scores[length])) for length in ordered], dtype=np.float64)
    means = np.asarray([np.asarray(scores[length]).mean() for length in ordered], dtype=np.float64)
    logs = np.log2(lengths)

    def read(values: Floats) -> tuple[float, float]:
        # A model that never scores meets no threshold, not even 85 % of nothing.
        own = max(BASE_SHARE * _base(lengths, values), 1e-9)
        threshold = RULER_THRESHOLD if definition == "absolute" else own
        return crossing(logs, monotone(values, counts), threshold), threshold

    at, threshold = read(means)
    draws = np.stack([bootstrap_means(scores[length], seed=seed + i) for i, length in enumerate(ordered)], axis=1)
    low, high = np.quantile([read(draw)[0] for draw in draws], [0.025, 0.975])
    fitted = monotone(means, counts)
    censored: Literal["", "above", "below"] = ""
    if fitted[-1] >= threshold:
        censored = "above"
    elif fitted[0] < threshold:
        censored = "below"
    return EffectiveLength(float(2**at), float(2**low), float(2**high), censored, threshold)
