"""The capacity of a state: where recall falls below half."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.stats import capacity


def spread(mean, n=40):
    """Scores of n contexts with this mean."""
    return np.clip(mean + np.linspace(-0.1, 0.1, n), 0, 1)


def test_half_is_read_between_the_points():
    found = capacity({16: [1.0] * 20, 32: [0.75] * 20, 64: [0.25] * 20, 128: [0.0] * 20})
    assert found.pairs == pytest.approx(2**5.5) and found.censored == ""
    assert found.low == found.high == pytest.approx(2**5.5)


def test_an_interval_is_that_of_the_contexts():
    narrow, wide = ({16: spread(0.9, n), 64: spread(0.4, n)} for n in (400, 8))
    assert capacity(narrow).low < capacity(narrow).pairs < capacity(narrow).high
    assert capacity(wide).high - capacity(wide).low > 3 * (capacity(narrow).high - capacity(narrow).low)


def test_the_ends_of_the_sweep_are_said():
    assert (capacity({4: [1.0] * 9, 8: [0.6] * 9}).censored, capacity({4: [0.1] * 9, 8: [0.0] * 9}).censored) == (
        "above",
        "below",
    )
    assert capacity({4: [0.7] * 9}).pairs == 4 == capacity({4: [0.2] * 9}).pairs
    with pytest.raises(ValueError, match="at least one"):
        capacity({})


def test_noise_that_rises_is_smoothed():
    found = capacity({2: [0.9] * 30, 4: [0.45] * 30, 8: [0.65] * 30, 16: [0.1] * 30})
    assert 8 <= found.pairs < 16  # 4 and 8 together hold 0.55


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 99))
def test_any_curve_has_a_capacity_within_the_sweep(means, seed):
    rng = np.random.default_rng(seed)
    scores = {2 ** (i + 1): rng.random(12) < mean for i, mean in enumerate(means)}
    found = capacity(scores)
    assert 2 <= found.low <= found.high <= 2 ** len(means) and 2 <= found.pairs <= 2 ** len(means)
    assert found == capacity(scores)
