"""Effective context length: the longest context at which a model still scores above a threshold.

Two definitions: an absolute threshold (RULER: 85.6 %, Llama-2-7B's average at 4K) and one relative to the model's own
score at its shortest contexts (NoLiMa: 85 % of the base score), which suits small base models.

Accuracy is made monotone in length (isotonic regression, weighted by samples) and read between the measured lengths on
a log axis. The interval resamples the scores of each length. A value at either end of the sweep is censored: the truth
lies beyond it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from evalsuite.stats.intervals import BATCH_CELLS, RESAMPLES, SEED, Floats

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


Definition = Literal["absolute", "relative"]
Part = tuple[ArrayLike, ArrayLike]  # scores 0..1 of one task at one length, and the sample each belongs to, [n] each


def effective_length(
    scores: Mapping[int, ArrayLike], definition: Definition = "absolute", seed: int = SEED
) -> EffectiveLength:
    """Effective length from the scores (0..1, [n] each) of at least one length in tokens; score i of each length
    belongs to sample i. See `effective_length_of_average`."""
    parts = {length: [(values, np.arange(np.asarray(values).size))] for length, values in scores.items()}
    return effective_length_of_average(parts, definition, seed)


def effective_length_of_average(
    parts: Mapping[int, Sequence[Part]], definition: Definition = "absolute", seed: int = SEED
) -> EffectiveLength:
    """Effective length of the unweighted average over the parts (tasks) of each length in tokens.

    "absolute" asks for `RULER_THRESHOLD`, "relative" for `BASE_SHARE` of the best score at or below `BASE_LENGTH`
    tokens (or at the shortest length, when all are longer); the base is resampled with the rest. Whole samples are
    resampled, with their scores at every length and in every task: they share a needle.
    """
    if not parts or not all(parts.values()):
        raise ValueError("an effective length needs scores of at least one length")
    ordered = sorted(parts)
    lengths = np.asarray(ordered, dtype=np.float64)
    counts = np.asarray([sum(np.asarray(s).size for s, _ in parts[length]) for length in ordered], dtype=np.float64)
    logs = np.log2(lengths)

    def read(values: Floats) -> tuple[float, float]:
        # A model that never scores meets no threshold, not even 85 % of nothing.
        own = max(BASE_SHARE * _base(lengths, values), 1e-9)
        threshold = RULER_THRESHOLD if definition == "absolute" else own
        return crossing(logs, monotone(values, counts), threshold), threshold

    means = np.asarray([np.mean([np.mean(np.asarray(s)) for s, _ in parts[length]]) for length in ordered])
    at, threshold = read(means)
    draws = _resampled([parts[length] for length in ordered], seed)
    low, high = np.quantile([read(draw)[0] for draw in draws], [0.025, 0.975])
    fitted = monotone(means, counts)
    censored: Literal["", "above", "below"] = ""
    if fitted[-1] >= threshold:
        censored = "above"
    elif fitted[0] < threshold:
        censored = "below"
    return EffectiveLength(float(2**at), float(2**low), float(2**high), censored, threshold)


def _resampled(columns: Sequence[Sequence[Part]], seed: int) -> Floats:
    """Averages of each column over its parts in `RESAMPLES` draws of samples, [resamples, columns].

    Samples with the same scores everywhere are drawn together by their count.
    """
    parts = [(np.asarray(scores, np.float64), np.asarray(ids)) for column in columns for scores, ids in column]
    names = np.unique(np.concatenate([ids for _, ids in parts]))
    places = [np.searchsorted(names, ids) for _, ids in parts]
    size = len(names)
    sums = [np.bincount(at, weights=scores, minlength=size) for at, (scores, _) in zip(places, parts, strict=True)]
    sizes = [np.bincount(at, minlength=size).astype(np.float64) for at in places]
    kinds, counts = np.unique(np.stack([*sums, *sizes], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    batch = max(1, BATCH_CELLS // len(kinds))
    drawn = []
    for start in range(0, RESAMPLES, batch):
        times = rng.multinomial(size, counts / size, size=min(batch, RESAMPLES - start))
        total, number = np.split(times @ kinds, 2, axis=1)
        plain = np.asarray([scores.mean() for scores, _ in parts])
        # The plain mean where no sample of a part was drawn.
        drawn.append(np.where(number > 0, total / np.maximum(number, 1), plain))
    means = np.concatenate(drawn)
    ends = np.cumsum([len(column) for column in columns])[:-1]
    return np.stack([part.mean(axis=1) for part in np.split(means, ends, axis=1)], axis=1)
