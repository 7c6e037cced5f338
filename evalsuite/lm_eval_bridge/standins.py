"""Stand-ins for what lm-eval's tasks import and should not, or no longer can.

`evaluate` runs code that it loads from the hub, for metrics that most tasks never call; here it has ROUGE, of the
library behind the hub's, and nothing else. `transformers.data.metrics` left transformers with version 5: here are the
few functions of it that tasks call, SQuAD's own definitions (Rajpurkar et al. 2016).
"""

from __future__ import annotations

import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from gdn2.errors import UserError

_SQUAD = "transformers.data.metrics"


@contextmanager
def stand_ins() -> Iterator[None]:
    """While it lasts, whoever imports the modules above gets those of this file."""
    modules = {"evaluate": _module("evaluate", load=_load)}
    if _squad_has_left():
        squad = _module(
            f"{_SQUAD}.squad_metrics", normalize_answer=normalize_answer, compute_exact=exact, compute_f1=overlap
        )
        modules |= {_SQUAD: _module(_SQUAD, squad_metrics=squad), f"{_SQUAD}.squad_metrics": squad}
    before, registry = {name: sys.modules.get(name) for name in modules}, logging.getLogger("lm_eval.api.registry")
    level = registry.level
    registry.setLevel(logging.CRITICAL)  # it calls every metric that `evaluate` does not give an error
    sys.modules.update(modules)
    try:
        yield
    finally:
        registry.setLevel(level)
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@cache
def _squad_has_left() -> bool:
    """Whether a transformers is installed that has no metrics; without importing it."""
    try:
        return int(version("transformers").partition(".")[0]) >= 5
    except PackageNotFoundError:
        return False


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def _load(name: str, *args: object, **options: object) -> Rouge:
    if name != "rouge":
        raise UserError(f"metric {str(name)[:60]!r} is code of the hub's evaluate library, which is not run here")
    return Rouge()


class Rouge:
    """The hub's metric `rouge`: the middle of bootstrapped means of F-measures, or the F-measures of all texts."""

    def compute(
        self, predictions: Sequence[str], references: Sequence[Any], rouge_types: Sequence[str] | None = None,
        use_aggregator: bool = True, use_stemmer: bool = False,
    ) -> Mapping[str, Any]:  # fmt: skip
        """F-measures by kind; a reference may be several texts, of which the best counts."""
        from rouge_score import rouge_scorer, scoring

        kinds = list(rouge_types or ("rouge1", "rouge2", "rougeL", "rougeLsum"))
        scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=use_stemmer)
        scores = [
            scorer.score(reference, said) if isinstance(reference, str) else scorer.score_multi(reference, said)
            for reference, said in zip(references, predictions, strict=True)
        ]
        if not use_aggregator:
            return {kind: [score[kind].fmeasure for score in scores] for kind in kinds}
        aggregator = scoring.BootstrapAggregator()
        for score in scores:
            aggregator.add_scores(score)
        found = aggregator.aggregate()
        return {kind: found[kind].mid.fmeasure for kind in kinds}


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and white space beyond single spaces."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", plain).split())


def exact(gold: str, said: str) -> int:
    """Whether two answers are one after `normalize_answer`."""
    return int(normalize_answer(gold) == normalize_answer(said))


def overlap(gold: str, said: str) -> float:
    """F1 of the words of two answers; of answers without words, whether both are."""
    wanted, found = (normalize_answer(text).split() if text else [] for text in (gold, said))
    if not wanted or not found:
        return int(wanted == found)
    common = sum((Counter(wanted) & Counter(found)).values())
    if not common:
        return 0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
