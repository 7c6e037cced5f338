"""Intervals, paired tests and effective lengths of scores: pure functions of arrays."""

from evalsuite.stats.intervals import Interval, bootstrap, interval, wilson
from evalsuite.stats.length import EffectiveLength, effective_length
from evalsuite.stats.paired import Difference, detectable, holm, mcnemar, paired, samples_needed

__all__ = [
    "Difference",
    "EffectiveLength",
    "Interval",
    "bootstrap",
    "detectable",
    "effective_length",
    "holm",
    "interval",
    "mcnemar",
    "paired",
    "samples_needed",
    "wilson",
]
