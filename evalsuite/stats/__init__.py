"""Intervals, paired tests and effective lengths of scores: pure functions of arrays."""

from evalsuite.stats.capacity import Capacity, capacity
from evalsuite.stats.corpus import Statistic, Sums, chance, draws, ends
from evalsuite.stats.intervals import Interval, bootstrap, bootstrap_means, interval, wilson
from evalsuite.stats.length import Definition, EffectiveLength, effective_length, effective_length_of_average
from evalsuite.stats.paired import (
    Difference,
    detectable,
    discordant,
    holm,
    mcnemar,
    mcnemar_power,
    mcnemar_samples_needed,
    newcombe,
    paired,
    samples_needed,
)

__all__ = [
    "Capacity",
    "Definition",
    "Difference",
    "EffectiveLength",
    "Interval",
    "Statistic",
    "Sums",
    "bootstrap",
    "bootstrap_means",
    "capacity",
    "chance",
    "detectable",
    "discordant",
    "draws",
    "effective_length",
    "effective_length_of_average",
    "ends",
    "holm",
    "interval",
    "mcnemar",
    "mcnemar_power",
    "mcnemar_samples_needed",
    "newcombe",
    "paired",
    "samples_needed",
    "wilson",
]
