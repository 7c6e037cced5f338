"""lm-eval's metrics of one document as scores of ours: a mean's part, or what an aggregate of all documents needs.

lm-eval makes one number of the values of all documents with an aggregation: its own by name, or a function of the task.
Those that are weighted means become scores with weights; for any other the record keeps the value itself, and
`evalsuite.lm_eval_bridge.corpus` makes the number where it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from evalsuite import items
from evalsuite.lm_eval_bridge.corpus import named, own
from evalsuite.types import Score

# One document's value of a metric to a score and its weight; lm-eval's aggregate follows from their weighted mean.
Part = Callable[[Any], tuple[float, float]]


def _mean(value: Any) -> tuple[float, float]:
    return float(value), 1.0


def _nats(value: Any) -> tuple[float, float]:
    return -float(value), 1.0


def _nats_a_unit(value: Any) -> tuple[float, float]:
    total, units = value
    return -float(total) / max(units, 1), float(units)


def _bits_a_unit(value: Any) -> tuple[float, float]:
    nats, units = _nats_a_unit(value)
    return nats / math.log(2), units


class Measures:
    """The metrics of one task.

    Args:
        task: lm-eval's object.
        name: what records call it, without the prefix.
    """

    def __init__(self, task: Any, name: str) -> None:
        import numpy
        from lm_eval.api.registry import AGGREGATION_REGISTRY, get_aggregation

        self._task, self._name = task, name
        self._parts: dict[Any, Part] = {numpy.mean: _mean, get_aggregation("mean"): _mean}
        self._parts |= {get_aggregation("perplexity"): _nats, get_aggregation("weighted_perplexity"): _nats_a_unit}
        self._parts |= {get_aggregation("bits_per_byte"): _bits_a_unit}
        self._names = {function: named(name) for name, function in AGGREGATION_REGISTRY.items()}

    def lower(self) -> tuple[str, ...]:
        """Metrics of which less is better."""
        return tuple(sorted(str(name) for name, higher in self._task.higher_is_better().items() if higher is False))

    def score(self, metric: str, value: Any, shown: str, target: str, output: str) -> Score:
        """What one document's `value` of `metric` says; `shown` is the metric's name in the record."""
        # As in lm-eval, a metric that has no aggregation has a mean.
        aggregate = self._task.aggregation().get(metric)
        part = _mean if aggregate is None else self._parts.get(aggregate)
        try:
            if part is not None:
                score, weight = part(value)
                return Score(shown, score, target, output, "scored", weight)
            text = items.dumps(value)
        except (TypeError, ValueError) as error:
            return Score(shown, None, target, output, "error", 1.0, f"{metric} cannot be recorded: {error}")
        aggregation = self._names.get(aggregate) or own(self._name, metric)
        return Score(shown, None, target, output, "scored", item=text, aggregation=aggregation)
