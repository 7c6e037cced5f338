"""Paired comparisons: the right pairs, the right tests, one correction over all of them."""

import dataclasses
import random

import pytest

from evalsuite import stats
from evalsuite.reports import compare, frame, gridformats
from gdn2.errors import DataError, UserError
from tests.evalsuite.test_cells import records as cells_records
from tests.evalsuite.test_cells import row


@pytest.fixture(scope="module")
def base(synthetic):
    found = (r for r in synthetic.records(synthetic.MODELS[0]) if r.task == "niah_single_2" and r.length <= 4096)
    return list(found)


def records(rows):
    return frame.from_rows(map(dataclasses.asdict, rows), texts=["target"])


def other(rows, chance=0.4, name="other", **changes):
    rng = random.Random(name)
    return [
        dataclasses.replace(r, model=name, checkpoint=name * 3, run_id=name, key=f"{name}{r.key}"[:32], **changes)
        for r in (dataclasses.replace(r, score=float(rng.random() < chance)) for r in rows)
    ]


def found(a, b):
    return list(compare.comparisons(records(a), records(b)))


def test_cells_are_compared_on_their_pairs(base):
    theirs = other(base)
    for cell in found(base, theirs):
        a = [r.score for r in base if r.length == cell.length]
        b = [r.score for r in theirs if r.length == cell.length]
        expected = stats.paired(b, a)
        assert cell.difference == expected
        assert (cell.first, cell.second) == pytest.approx((sum(a) / 16, sum(b) / 16))
        assert expected.method == "mcnemar"
    assert [cell.length for cell in found(base, theirs)] == [1024, 2048, 4096]


def test_order_of_the_records_does_not_matter(base):
    theirs = other(base)
    assert found(base, theirs) == found(base[::-1], random.Random(1).sample(theirs, len(theirs)))


def test_only_the_same_questions_are_paired(base):
    theirs = other(base)
    changed = [dataclasses.replace(r, target="another") if r.sample_id in ("0", "1") else r for r in theirs]
    (first, *_) = found(base, changed[3:])
    assert first.difference.n == 13
    assert first.unpaired == 16 + 13 - 2 * 13
    for change in ({"protocol": "lm-eval"}, {"data": "f" * 64}, {"task_version": 2}, {"seed": 7}, {"length": 99}):
        assert found(base, other(base, **change)) == []


def test_holm_is_over_everything_shown(base):
    grid = compare.build([records(base), records(other(base, 0.3)), records(other(base, 0.9, "third"))])
    keys = [head.key for head in grid.heads]
    p = [line.cells[keys.index("p")].value for line in grid.lines]
    adjusted = [line.cells[keys.index("p_holm")].value for line in grid.lines]
    assert len(p) == 6
    assert adjusted == pytest.approx(stats.holm(p))
    marks = [line.cells[keys.index("difference")].mark for line in grid.lines]
    assert marks == ["*" if value < 0.05 else "" for value in adjusted]
    assert "*" in marks
    assert len({line.section for line in grid.lines}) == 2
    assert "over the 6 tests" in gridformats.markdown(grid)


def test_the_detectable_difference_is_that_of_the_pairs(base):
    (first, *_) = found(base, other(base))
    deltas = [b.score - a.score for a, b in zip(base[:16], other(base)[:16], strict=True)]
    mean = sum(deltas) / 16
    spread = (sum((d - mean) ** 2 for d in deltas) / 15) ** 0.5
    assert first.detectable == pytest.approx(2.8016 * spread / 4, rel=1e-4)


def test_runs_that_cannot_be_compared_are_refused(base):
    one, two = records(base), records(other(base))
    with pytest.raises(UserError, match="at least two runs"):
        compare.build([one])
    with pytest.raises(UserError, match="one model each, not of other, synthetic-gdn2"):
        compare.build([records(base + other(base)), two])
    with pytest.raises(DataError, match="share no samples"):
        compare.build([one, records(other(base, seed=9))])
    twice = base + [dataclasses.replace(r, key=r.key[::-1], run_id="again") for r in base]
    with pytest.raises(DataError, match="several times"):
        compare.build([records(twice), two])


def test_below_best_marks_what_is_worse_by_holm(base):
    cell = [r for r in base if r.length == 1024]
    same, worse = records(cell).frame, records(other(cell, 0.05)).frame
    groups = [{"a": (1.0, same), "b": (0.1, worse), "c": (0.9, same)}]
    assert compare.below_best(groups) == {(0, "b")}
    assert compare.below_best([]) == set()


def test_no_pair_that_differs_still_leaves_a_width():
    low, high = stats.newcombe([1] * 16, [1] * 16)
    assert -0.25 < low < -0.1
    assert 0.1 < high < 0.25


def test_newcombe_covers_the_truth_of_pairs():
    import numpy as np

    rng = np.random.default_rng(61)
    for shares in ([0.9, 0.06, 0.02, 0.02], [0.4, 0.2, 0.1, 0.3], [0.97, 0.02, 0.005, 0.005]):
        hits = 0
        for _ in range(400):
            both, a, b, neither = rng.multinomial(120, shares)
            first = [1] * both + [1] * a + [0] * b + [0] * neither
            second = [1] * both + [0] * a + [1] * b + [0] * neither
            low, high = stats.newcombe(first, second)
            hits += low <= shares[1] - shares[2] <= high
        assert 0.92 <= hits / 400 <= 1.0, shares


def built(first, second, **changes):
    """The one line of a table of two runs, by column; scores by sample."""
    sides = [
        cells_records(
            *(
                row(
                    model=name,
                    checkpoint=name * 64,
                    run_id=name,
                    sample_id=str(i),
                    score=score,
                    target=str(i),
                    **changes,
                )
                for i, score in enumerate(scores)
            )
        )
        for name, scores in (("a", first), ("b", second))
    ]
    grid = compare.build(sides)
    (line,) = grid.lines
    return grid, line, dict(zip([head.key for head in grid.heads], line.cells, strict=True))


def test_a_line_of_the_table_worked_out_by_hand():
    grid, line, cells = built([1, 1, 1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    assert grid.title == "Paired comparison" and grid.corners == ("task", "length")
    assert line.labels == ("S-NIAH-2", "1K") and line.section == "b @bbbbbbbb against a @aaaaaaaa"
    assert line.runs == ("a", "b") and cells["profile"] == "exact"
    assert (cells["first"].value, cells["second"].value) == (60.0, pytest.approx(30.0))
    moved = cells["difference"]
    assert moved.value == pytest.approx(-30.0) and moved.low < -30 < moved.high and moved.n == moved.asked == 10
    # Three pairs differ, all one way: the exact test of 3 in 3 under a fair coin, two-sided.
    assert cells["p"].value == cells["p_holm"].value == pytest.approx(0.25) and moved.mark == ""
    deltas = [0, 0, -1, -1, 0, 0, 0, 0, -1, 0]
    spread = (sum((d + 0.3) ** 2 for d in deltas) / 9) ** 0.5
    assert cells["detectable"].value == pytest.approx(100 * 2.80158 * spread / 10**0.5, rel=1e-4)
    assert cells["unpaired"].value == 0


def test_what_is_worse_for_certain_is_marked_and_what_is_even_has_nothing_to_detect():
    _, _, cells = built([1.0] * 12, [0.0] * 12)
    assert cells["p"].value == pytest.approx(2 / 2**12) and cells["difference"].mark == "*"
    assert cells["difference"].value == -100.0 and cells["detectable"] is None  # all pairs differ alike
    _, _, cells = built([1.0] * 12, [1.0] * 12)
    assert cells["p"].value == 1.0 and cells["difference"].mark == "" and cells["detectable"] is None


def test_scores_that_are_no_shares_are_shown_as_they_are_and_named():
    _, line, cells = built([-3.0, -1.0, -2.0], [-1.0, -1.0, -1.0], metric="value_logprob")
    assert line.labels[0] == "S-NIAH-2 value_logprob"
    assert (cells["first"].value, cells["second"].value, cells["difference"].value) == (-2.0, -1.0, 1.0)
    _, line, _ = built([1.0, 0.0], [1.0, 1.0], metric="acc", task="piqa", length=0)
    assert line.labels == ("piqa", "-")


def test_weights_count_in_the_means():
    sides = []
    for name, scores in (("a", (1.0, 0.0)), ("b", (0.0, 1.0))):
        rows = [
            row(model=name, checkpoint=name, run_id=name, sample_id=str(i), score=score, weight=weight, metric="acc")
            for i, (score, weight) in enumerate(zip(scores, (3.0, 1.0), strict=True))
        ]
        sides.append(cells_records(*rows))
    (found,) = compare.comparisons(sides[0], sides[1])
    assert (found.first, found.second, found.difference.mean) == (0.75, 0.25, -0.5)
