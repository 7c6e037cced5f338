"""Scoring rules that several tasks share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")

# Metrics whose scores are negative log-likelihoods in nats a unit, weighted by units: words, bytes, or samples.
PERPLEXITIES = frozenset({"perplexity", "word_perplexity", "byte_perplexity"})


def perplexity(nats: float) -> float:
    """Of a mean negative log-likelihood; infinite where no float holds it."""
    return math.exp(nats) if nats < 700 else math.inf


def overall(metric: str, mean: float) -> float:
    """What a metric says of many samples, from the weighted mean of their scores."""
    return perplexity(mean) if metric in PERPLEXITIES else mean


def nats(metric: str, number: float) -> float:
    """The opposite of `overall`."""
    return math.log(number) if metric in PERPLEXITIES else number


def postprocess(text: str) -> str:
    """RULER's cleaning of a generated text: strip, control characters to line breaks, strip."""
    return _CONTROL.sub("\n", text.strip()).strip()


def contains(text: str, reference: str) -> bool:
    """Whether `reference` occurs in `text`, case ignored."""
    return reference.lower() in text.lower()


def string_match_all(text: str, references: Sequence[str]) -> float:
    """Fraction of the references that occur in `text` (RULER: niah, vt, cwe, fwe)."""
    return sum(contains(text, reference) for reference in references) / len(references)


def string_match_part(text: str, references: Sequence[str]) -> float:
    """1 when any reference occurs in `text`, else 0 (RULER: qa)."""
    return float(any(contains(text, reference) for reference in references))
