"""How many samples a difference needs, as a table for people."""

from __future__ import annotations

from evalsuite.stats.paired import detectable, discordant, mcnemar_samples_needed, samples_needed
from gdn2.errors import UserError

SCORES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CORRELATIONS = (0.0, 0.3, 0.5, 0.7)
LEAST = 0.1  # percentage points: less would take more samples than there will ever be
Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


def detect(points: float, power: float, tests: int) -> Table:
    """Samples that show a true difference of `points` percentage points, by score and correlation of the models.

    `tests` is the size of the declared family: each test is made at 5 % / tests (Holm's first step, Bonferroni's all).
    """
    _check(power)
    if not LEAST <= points < 100:
        raise UserError(f"--detect {points:g} is not a difference of {LEAST:g} to below 100 percentage points")
    header = ("score (%)", "unpaired", *(f"paired, r = {r:g}" for r in CORRELATIONS))
    rows: list[tuple[object, ...]] = []
    for p in SCORES:
        alone = samples_needed(points / 100, p, power=power, alpha=0.05 / tests)
        rows.append((f"{100 * p:g}", alone, *(_paired(points / 100, p, r, power, 0.05 / tests) for r in CORRELATIONS)))
    return header, rows


def _paired(difference: float, p: float, r: float, power: float, alpha: float) -> object:
    try:
        discordant(difference, p, r)
    except ValueError:
        return "-"
    return mcnemar_samples_needed(difference, p, r, power, alpha)


def given(samples: int, power: float, tests: int) -> Table:
    """The smallest true differences, in percentage points, that `samples` show."""
    _check(power)
    header = ("score (%)", "unpaired", *(f"paired, r = {r:g}" for r in CORRELATIONS))
    rows: list[tuple[object, ...]] = []
    for p in SCORES:
        found = [detectable(samples, p, r, power, 0.05 / tests) for r in (0.0, *CORRELATIONS)]
        rows.append((f"{100 * p:g}", *(f"{100 * d:.1f}" for d in found)))
    return header, rows


def _check(power: float) -> None:
    if not 0.5 <= power < 1:
        raise UserError(f"--power {power:g} is not a probability from 0.5 to below 1")
