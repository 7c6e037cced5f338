"""Sample sizes before a run."""

import pytest

from evalsuite.stats import detectable, planning, samples_needed
from evalsuite.stats.paired import mcnemar_power
from gdn2.errors import UserError


def test_samples_for_a_difference_agree_with_the_formulas():
    header, rows = planning.detect(3, 0.8, 1)
    table = {row[0]: row for row in rows}
    assert table["50"][1] == samples_needed(0.03, 0.5)
    assert len(header) == len(rows[0])
    # Pairs that agree more need fewer samples; a score that no difference fits has none.
    assert list(table["90"][2:]) == sorted(table["90"][2:], reverse=True)
    assert set(table["99"][2:]) == {"-"}
    assert planning.detect(3, 0.8, 20)[1][0][1] > table["50"][1]


def test_differences_for_samples_agree_with_the_formulas():
    _, rows = planning.given(500, 0.8, 1)
    assert rows[0][1] == f"{100 * detectable(500, 0.5):.1f}"
    assert float(planning.given(2000, 0.8, 1)[1][0][1]) == pytest.approx(float(rows[0][1]) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("points", "power"),
    [
        (0, 0.8), (100, 0.8), (-3, 0.8), (1e-300, 0.8), (0.0999, 0.8), (float("nan"), 0.8), (float("inf"), 0.8),
        (3, 1.0), (3, 0.2), (3, 0.4999), (3, float("nan")),
    ],
)  # fmt: skip
def test_wrong_wishes_are_refused(points, power):
    with pytest.raises(UserError, match="--detect .* is not|--power .* is not"):
        planning.detect(points, power, 1)


def test_the_smallest_difference_and_the_surest_test_have_an_answer():
    header, rows = planning.detect(planning.LEAST, 0.999, 10**6)
    assert all(isinstance(n, int) and n > 10**5 for row in rows for n in row[1:] if n != "-")
    assert planning.detect(99.9, 0.5, 1)[1][0][1] >= 1
    # A single sample shows nothing, and more of them always show less.
    several = [[float(value) for value in planning.given(n, 0.8, 1)[1][0][1:]] for n in (10, 100, 10_000)]
    assert all(a > b > c for a, b, c in zip(*several, strict=True))


def test_the_power_is_that_of_every_count_of_discordant_pairs():
    """Against the sum over all counts, which only few samples allow."""
    from scipy.stats import binom

    def whole(n, first, second, alpha):
        total = 0.0
        for pairs in range(n + 1):
            k = next((k for k in range(pairs, -1, -1) if 2 * binom.cdf(k, pairs, 0.5) <= alpha), -1)
            chance = first / (first + second)
            rejected = binom.cdf(k, pairs, chance) + binom.sf(pairs - k - 1, pairs, chance) if k >= 0 else 0.0
            total += binom.pmf(pairs, n, first + second) * rejected
        return total

    for n, first, second, alpha in (
        (1, 0.5, 0.4, 0.05),
        (40, 0.3, 0.05, 0.05),
        (60, 0.01, 0.001, 0.05),
        (50, 0.6, 0.4, 0.01),
    ):
        assert mcnemar_power(n, first, second, alpha) == pytest.approx(whole(n, first, second, alpha), abs=1e-9)
    assert mcnemar_power(10**9, 0.2501, 0.25) > 0.8  # of a billion samples a ten-thousandth
