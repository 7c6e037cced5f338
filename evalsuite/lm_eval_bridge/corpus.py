"""lm-eval's aggregates of all documents together, found again by the name that records give them.

`lm_eval:mcc` would be one of lm-eval's registered aggregations, `lm_eval:cola/mcc` the one that its task `cola` has for
a metric `mcc`. Only what lm-eval's own configuration names is ever called, whatever a record says.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from evalsuite.lm_eval_bridge import index, loading
from evalsuite.lm_eval_bridge.index import PREFIX
from evalsuite.lm_eval_bridge.standins import stand_ins
from evalsuite.stats import Sums
from evalsuite.stats.intervals import SEED
from gdn2.errors import DataError, UserError


def named(aggregation: str) -> str:
    """How a record names one of lm-eval's registered aggregations."""
    return PREFIX + aggregation


def own(task: str, metric: str) -> str:
    """How a record names the aggregation that a task of lm-eval, or one as a group asks it, has for `metric`."""
    return f"{PREFIX}{task}/{metric}"


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What makes one number of the items of all samples; see `evalsuite.stats.Statistic`."""

    name: str
    function: Callable[[Sequence[Any]], Any]

    def value(self, items: Sequence[Any]) -> float:
        """The number, lm-eval's own to the last digit for items in its order. Raises DataError where there is none."""
        try:
            # What sklearn and others warn of, such as a class without members, is in the number.
            with warnings.catch_warnings(), loading.quiet(), loading.without_network(), stand_ins(), _repeatable():
                warnings.simplefilter("ignore")
                found = float(self.function(list(items)))
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())[:160] or "no reason given"
            raise DataError(f"lm-eval's {self.name[len(PREFIX) :]} cannot be made: {reason}") from error
        if not math.isfinite(found):
            raise DataError(f"lm-eval's {self.name[len(PREFIX) :]} of these answers is {found}")
        return found

    def sums(self, items: Sequence[Any]) -> Sums | None:
        """The number as a function of sums over items, where there is such a form; made for resampling."""
        make = _SUMS.get(self.name)
        try:
            return None if make is None else make(items)
        except (TypeError, ValueError, AttributeError, AssertionError, IndexError):
            return None


@contextmanager
def _repeatable() -> Iterator[None]:
    """While it lasts, a function that draws random numbers draws the same ones every time."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@lru_cache(maxsize=1024)
def aggregate(name: str) -> Aggregate:
    """The aggregate that records call `name`. Raises DataError where the lm-eval installed here does not have it."""
    try:
        from importlib.metadata import version

        at = f"lm-eval {version('lm_eval')}"
        from lm_eval.api.registry import AGGREGATION_REGISTRY
    except ImportError:
        raise DataError(f"{name} needs lm-eval, which is not installed here") from None
    import lm_eval.api.metrics  # noqa: F401  registers them

    plain = name.removeprefix(PREFIX)
    task, slash, metric = plain.rpartition("/")
    try:
        if not name.startswith(PREFIX):
            raise LookupError("not a name of lm-eval's")
        function = _own(task, metric) if slash else AGGREGATION_REGISTRY[plain]
    except (LookupError, ValueError, ImportError, AttributeError, TypeError, OSError, UserError) as error:
        reason = "" if isinstance(error, KeyError) else f": {' '.join(str(error).split())[:120]}"
        raise DataError(f"{at} has no aggregation {plain[:80]!r}{reason}") from None
    return Aggregate(name, function)


def _own(task: str, metric: str) -> Any:
    """The aggregation function that the configuration of `task` names for `metric`."""
    (member,) = index.named(task).members
    config = loading.configuration(member.task, member.changes)
    with loading.quiet(), loading.without_network(), stand_ins():
        if "class" in config:
            kind = loading.imported(str(config["class"]))
            # Its constructor reads data, which a table has no need of.
            return kind.aggregation(object.__new__(kind))[metric]
        for entry in config.get("metric_list") or ():
            if str(entry.get("metric")).rsplit(".", 1)[-1] == metric and (found := entry.get("aggregation")):
                return loading.imported(str(found))
    raise LookupError(f"its task {task} has no metric {metric}")


def _pairs(items: Sequence[Any]) -> Any:
    import numpy as np

    golds, guesses = (np.asarray(each) for each in zip(*items, strict=True))
    if not np.isin(np.concatenate([golds, guesses]), (0, 1)).all():
        raise ValueError("not two classes")
    kinds = np.zeros((len(golds), 4))
    kinds[np.arange(len(golds)), 2 * golds.astype(int) + guesses.astype(int)] = 1
    return kinds


def _f1(items: Sequence[Any]) -> Sums:
    return Sums(_pairs(items), lambda n: 2 * n[3] / (2 * n[3] + n[1] + n[2]) if n[1:].any() else 0.0)


def _mcc(items: Sequence[Any]) -> Sums:
    def finish(n: Any) -> float:
        scale = math.sqrt((n[3] + n[1]) * (n[3] + n[2]) * (n[0] + n[1]) * (n[0] + n[2]))
        return float(n[3] * n[0] - n[1] * n[2]) / scale if scale else 0.0

    return Sums(_pairs(items), finish)


def _sacrebleu(kind: str, **options: Any) -> Callable[[Sequence[Any]], Sums]:
    def make(items: Sequence[Any]) -> Sums:
        import numpy as np
        import sacrebleu.metrics

        metric = getattr(sacrebleu.metrics, kind)(**options)
        references, said = zip(*items, strict=True)
        several = [[each] if isinstance(each, str) else list(each) for each in references]
        texts = [each if isinstance(each, str) else each[0] for each in said]
        # Sentence by sentence; `evalsuite.stats` checks that their sums give lm-eval's own number.
        counts = metric._extract_corpus_statistics(texts, list(zip(*several, strict=True)))
        return Sums(np.array(counts, dtype=np.float64), lambda n: metric._compute_score_from_stats(n.tolist()).score)

    return make


_SUMS: dict[str, Callable[[Sequence[Any]], Sums]] = {
    named("f1"): _f1,
    named("matthews_corrcoef"): _mcc,
    named("bleu"): _sacrebleu("BLEU"),
    named("chrf"): _sacrebleu("CHRF"),
    named("chrf++"): _sacrebleu("CHRF", word_order=2),
    named("ter"): _sacrebleu("TER"),
}
