"""Statistics against scipy, closed forms, published figures and simulation."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from evalsuite import stats
from evalsuite.stats.intervals import bootstrap_means
from evalsuite.stats.length import crossing, monotone


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(500, 500, 0.9924, 1.0), (465, 500, 0.904, 0.949), (189, 500, 0.337, 0.421), (100, 100, 0.963, 1.0)],
)
def test_wilson_gives_the_known_intervals(successes, n, low, high):
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=6e-4)


def test_wilson_is_the_closed_form():
    z = scipy_stats.norm.ppf(0.975)
    for successes, n in ((0, 1), (1, 1), (3, 7), (250, 500), (999, 1000)):
        p = successes / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        expected = (max(0.0, centre - half), min(1.0, centre + half))
        assert stats.wilson(successes, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "p"), [(100, 0.96), (100, 0.99), (500, 0.9), (500, 0.99)])
def test_wilson_covers_where_the_normal_interval_does_not(n, p):
    draws = np.random.default_rng(7).binomial(n, p, size=4000)
    table = np.array([stats.wilson(int(k), n) for k in range(n + 1)])
    covered = float(((table[draws, 0] <= p) & (p <= table[draws, 1])).mean())
    assert 0.90 <= covered <= 0.985
    if p == 0.99:
        mean = draws / n
        half = 1.96 * np.sqrt(mean * (1 - mean) / (n - 1))
        assert float((abs(mean - p) <= half).mean()) < covered - 0.05


def test_bootstrap_covers_fractional_scores():
    rng = np.random.default_rng(11)
    values, weights = np.array([0, 0.25, 0.5, 0.75, 1]), np.array([0.1, 0.1, 0.2, 0.2, 0.4])
    truth, hits, trials = float(values @ weights), 0, 400
    for _ in range(trials):
        low, high = stats.bootstrap(rng.choice(values, p=weights, size=150))
        hits += low <= truth <= high
    assert 0.92 <= hits / trials <= 0.98


def test_bootstrap_by_cluster_covers_what_the_plain_one_does_not():
    rng = np.random.default_rng(13)
    trials, plain, clustered = 80, 0, 0
    clusters = np.repeat(np.arange(60), 8)
    for _ in range(trials):
        shared = rng.normal(0.5, 0.2, size=60)
        scores = shared[clusters] + rng.normal(0, 0.1, size=480)
        low, high = stats.bootstrap(scores)
        plain += low <= 0.5 <= high
        low, high = stats.bootstrap(scores, clusters)
        clustered += low <= 0.5 <= high
    assert clustered / trials >= 0.88
    assert plain / trials < 0.75


def test_drawing_equal_clusters_together_has_the_bootstrap_standard_error():
    scores = np.random.default_rng(3).choice([0, 0.5, 1], size=300)
    means = bootstrap_means(scores, resamples=20_000)
    assert means.std() == pytest.approx(scores.std() / math.sqrt(300), rel=0.03)
    assert means.mean() == pytest.approx(scores.mean(), abs=1e-3)


def test_interval_chooses_its_method_and_repeats_itself():
    assert stats.interval([1, 0, 1, 1]).method == "wilson"
    fractional = stats.interval([1, 0.5, 1, 0.25, 0])
    assert fractional.method == "bootstrap"
    assert fractional == stats.interval([1, 0.5, 1, 0.25, 0])
    shared = stats.interval([1, 0, 1, 1], clusters=["a", "a", "b", "c"])
    assert (shared.method, shared.n, shared.mean) == ("bootstrap", 3, 0.75)
    assert math.isnan(stats.interval([0.5]).low)


def test_equal_fractional_scores_have_a_wide_interval_instead_of_none():
    found = stats.interval([0.25] * 20)
    assert (found.mean, found.method) == (0.25, "wilson")
    assert (found.low, found.high) == stats.wilson(5, 20)
    between = stats.interval([0.3] * 7)
    assert (between.low, between.high) == (stats.wilson(2, 7)[0], stats.wilson(3, 7)[1])
    assert stats.interval([1.5] * 4).low == 1.5


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")]])
def test_interval_refuses_missing_scores(scores):
    with pytest.raises(ValueError, match="finite scores"):
        stats.interval(scores)


def test_mcnemar_is_the_exact_test_of_the_discordant_pairs():
    a = [1] * 30 + [1] * 9 + [0] * 2 + [0] * 10
    b = [1] * 30 + [0] * 9 + [1] * 2 + [0] * 10
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11
    assert stats.mcnemar(a, b) == pytest.approx(2 * tail, abs=1e-12)
    assert stats.mcnemar(a, a) == 1.0
    assert stats.mcnemar(a, b) == stats.mcnemar(b, a)


def test_mcnemar_has_the_known_power_on_paired_samples():
    rng = np.random.default_rng(5)
    rejected = {"effect": 0, "none": 0}
    for kind, only_b in (("effect", 0.02), ("none", 0.06)):
        for _ in range(500):
            u = rng.random(500)
            a = (u < 0.90) | ((u >= 0.90) & (u < 0.96))
            b = (u < 0.90) | ((u >= 0.96) & (u < 0.96 + min(only_b, 0.04)))
            if kind == "none":
                swap = rng.random(500) < 0.5
                a, b = np.where(swap, b, a), np.where(swap, a, b)
            rejected[kind] += stats.mcnemar(a, b) < 0.05
    assert rejected["effect"] / 500 == pytest.approx(0.874, abs=0.05)
    assert rejected["none"] / 500 <= 0.06


def test_paired_difference_of_fractional_scores():
    rng = np.random.default_rng(17)
    a = rng.choice([0, 0.5, 1], size=400, p=[0.2, 0.3, 0.5])
    worse = np.maximum(0, a - rng.choice([0, 0.5], size=400, p=[0.7, 0.3]))
    found = stats.paired(a, worse)
    assert found.method == "bootstrap"
    assert found.mean == pytest.approx(float((a - worse).mean()))
    assert found.low < found.mean < found.high
    assert found.p < 0.01
    assert stats.paired(a, a).p == 1.0
    assert stats.paired([1], [0]).p == 1.0


def test_paired_takes_mcnemar_for_right_and_wrong():
    a, b = [1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]
    found = stats.paired(a, b)
    assert (found.method, found.p) == ("mcnemar", stats.mcnemar(a, b))
    with pytest.raises(ValueError, match="same samples"):
        stats.paired([1, 0], [1])


def test_holm_against_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_and_mcnemar_agree_with_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for successes, n in ((0, 7), (3, 7), (465, 500), (500, 500)):
        theirs = proportion.proportion_confint(successes, n, method="wilson")
        assert stats.wilson(successes, n) == pytest.approx(theirs, abs=1e-12)
    p = np.random.default_rng(2).random(20) ** 3
    assert stats.holm(list(p)) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))
    a = np.array([1] * 12 + [0] * 5 + [1] * 3)
    b = np.array([0] * 12 + [1] * 5 + [1] * 3)
    assert stats.mcnemar(a, b) == pytest.approx(contingency.mcnemar([[3, 12], [5, 0]], exact=True).pvalue)


def test_planning_gives_the_known_figures():
    assert stats.detectable(500, 0.5) == pytest.approx(0.089, abs=6e-4)
    assert stats.detectable(500, 0.9) == pytest.approx(0.053, abs=6e-4)
    assert stats.detectable(500, 0.5, correlation=0.5) == pytest.approx(0.063, abs=6e-4)
    assert stats.detectable(500, 0.9, correlation=0.5) == pytest.approx(0.038, abs=6e-4)
    n = stats.samples_needed(0.03, 0.5)
    assert n == pytest.approx(4360, abs=5)
    assert stats.detectable(n, 0.5) <= 0.03 < stats.detectable(n - 1, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.samples_needed(3, 0.5)


def test_monotone_pools_what_rises():
    fitted = monotone(np.array([0.9, 1.0, 0.4, 0.6]), np.array([1.0, 3.0, 1.0, 1.0]))
    assert fitted == pytest.approx([0.975, 0.975, 0.5, 0.5])


def test_crossing_reads_between_lengths_on_a_log_axis():
    logs = np.log2(np.array([1024.0, 2048, 4096]))
    assert crossing(logs, np.array([1.0, 0.9, 0.5]), 0.7) == pytest.approx(11.5)
    assert crossing(logs, np.array([1.0, 0.9, 0.8]), 0.7) == 12
    assert crossing(logs, np.array([0.5, 0.4, 0.3]), 0.7) == 10


def test_effective_length_in_both_definitions():
    rng = np.random.default_rng(23)
    curve = {512: 0.80, 1024: 0.78, 2048: 0.74, 4096: 0.3, 8192: 0.1}
    scores = {length: (rng.random(500) < p).astype(float) for length, p in curve.items()}
    absolute = stats.effective_length(scores)
    assert (absolute.tokens, absolute.censored) == (512, "below")
    relative = stats.effective_length(scores, "relative")
    assert relative.censored == ""
    assert 2048 < relative.tokens < 4096
    assert relative.low < relative.tokens < relative.high
    assert relative == stats.effective_length(scores, "relative")
    base = max(float(np.mean(scores[512])), float(np.mean(scores[1024])))
    assert relative.threshold == pytest.approx(0.85 * base)


def test_effective_length_is_censored_at_the_ends_of_the_sweep():
    perfect = stats.effective_length({1024: np.ones(50), 4096: np.ones(50)})
    assert (perfect.tokens, perfect.low, perfect.high, perfect.censored) == (4096, 4096, 4096, "above")
    nothing = stats.effective_length({1024: np.zeros(50), 4096: np.zeros(50)}, "relative")
    assert (nothing.tokens, nothing.censored) == (1024, "below")
    with pytest.raises(ValueError, match="at least one length"):
        stats.effective_length({})


def test_effective_length_interval_covers_the_truth():
    rng = np.random.default_rng(29)
    lengths = [512, 1024, 2048, 4096, 8192]
    p = np.array([0.99, 0.97, 0.9, 0.7, 0.4])
    truth = 2 ** crossing(np.log2(np.array(lengths, dtype=float)), p, 0.856)
    hits = 0
    for _ in range(40):
        scores = {n: (rng.random(200) < q).astype(float) for n, q in zip(lengths, p, strict=True)}
        found = stats.effective_length(scores)
        hits += found.low <= truth <= found.high
    assert hits >= 35


def test_weighted_scores_are_resampled_with_their_weights():
    rng = np.random.default_rng(41)
    words = rng.integers(50, 2000, size=62)
    nats = rng.normal(3.0, 0.3, size=62)
    found = stats.interval(nats, weights=words)
    mean = float(nats @ words / words.sum())
    assert found.mean == pytest.approx(mean)
    # The ratio estimator's linearised standard error, 62 clusters.
    error = math.sqrt(float((((nats - mean) * words) ** 2).sum())) / words.sum()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.12)
    assert stats.interval([1, 0, 1, 1], weights=[2, 2, 2, 2]).method == "wilson"
    assert stats.interval([1, 0, 1, 1], weights=[2, 2, 2, 3]).mean == pytest.approx(7 / 9)
    assert stats.paired(nats, nats - 1, weights=words).mean == pytest.approx(1)


def test_bootstrap_agrees_with_scipy():
    scores = np.random.default_rng(43).choice([0, 0.25, 0.5, 1], size=200)
    theirs = scipy_stats.bootstrap((scores,), np.mean, n_resamples=4000, method="percentile", random_state=1)
    ours = stats.bootstrap(scores)
    assert ours == pytest.approx((theirs.confidence_interval.low, theirs.confidence_interval.high), abs=0.006)


def test_power_of_the_exact_test_is_that_of_simulation_and_of_the_literature():
    assert stats.mcnemar_power(500, 0.06, 0.02) == pytest.approx(0.874, abs=0.01)
    assert stats.mcnemar_power(500, 0.04, 0.04) < 0.05
    assert stats.mcnemar_power(3, 0.5, 0.1) == 0
    rng = np.random.default_rng(47)
    rejected = 0
    for _ in range(400):
        first, second, _ = rng.multinomial(200, [0.12, 0.05, 0.83])
        rejected += scipy_stats.binomtest(int(first), int(first + second)).pvalue <= 0.05 if first + second else 0
    assert stats.mcnemar_power(200, 0.12, 0.05) == pytest.approx(rejected / 400, abs=0.07)


def test_paired_samples_needed_reach_the_power_asked_for():
    n = stats.mcnemar_samples_needed(0.03, 0.9, 0.5)
    shares = stats.discordant(0.03, 0.9, 0.5)
    assert stats.mcnemar_power(n, *shares) >= 0.8
    assert stats.mcnemar_power(int(0.95 * n), *shares) < 0.8
    assert n >= stats.samples_needed(0.03, 0.9, 0.5)
    assert shares[0] - shares[1] == pytest.approx(0.03)
    with pytest.raises(ValueError, match="no two scores"):
        stats.discordant(0.3, 0.95, 0.5)
    with pytest.raises(ValueError, match="cannot correlate"):
        stats.discordant(0.2, 0.8, 0.99)


def test_bootstrap_p_values_are_uniform_without_an_effect():
    rng = np.random.default_rng(53)
    p = [stats.paired(*rng.choice([0, 0.25, 0.5, 1], size=(2, 80))).p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1
    assert np.mean(p) == pytest.approx(0.5, abs=0.08)


def test_effective_length_of_an_average_over_tasks():
    rng = np.random.default_rng(59)
    ids = np.arange(300)
    curve = {1024: (1.0, 0.9), 2048: (1.0, 0.8), 4096: (0.9, 0.2)}
    parts = {n: [((rng.random(300) < p).astype(float), ids) for p in ps] for n, ps in curve.items()}
    found = stats.effective_length_of_average(parts)
    means = [np.mean([s.mean() for s, _ in part]) for part in parts.values()]
    assert found.tokens == pytest.approx(2 ** crossing(np.log2(np.array(list(curve), float)), np.array(means), 0.856))
    assert found.low < found.tokens < found.high
    # A task that was not asked everywhere counts where it was, and its samples may be others.
    assert stats.effective_length_of_average({**parts, 8192: [(np.zeros(3), [7, 8, 900])]}).tokens == found.tokens


def test_effective_length_of_many_samples_is_quick():
    import time

    rng = np.random.default_rng(67)
    scores = {n: (rng.random(200_000) < p).astype(float) for n, p in ((1024, 0.99), (2048, 0.9), (4096, 0.7))}
    start = time.process_time()
    found = stats.effective_length(scores)
    assert time.process_time() - start < 5
    assert found.high / found.low < 1.02


def test_resampling_whole_samples_has_the_right_spread():
    from evalsuite.stats.length import _resampled

    rng = np.random.default_rng(71)
    ids = np.arange(400)
    first = rng.random(400)
    second = np.where(rng.random(400) < 0.8, first, rng.random(400))  # the same samples, mostly with the same score
    draws = _resampled([[(first, ids)], [(second, ids)]], 1)
    assert draws.std(axis=0) == pytest.approx([x.std() / 20 for x in (first, second)], rel=0.06)
    assert np.corrcoef(draws.T)[0, 1] == pytest.approx(np.corrcoef(first, second)[0, 1], abs=0.05)
