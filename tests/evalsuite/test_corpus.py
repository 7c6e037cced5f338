"""Numbers of all samples together: what a record keeps of one, intervals, differences, groups' averages."""

import dataclasses
import math
import random
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite import groups, items
from evalsuite.lm_eval_bridge import corpus as bridge
from evalsuite.lm_eval_bridge import standins
from evalsuite.lm_eval_bridge.measures import Measures
from evalsuite.reports import cells, compare, frame
from evalsuite.stats import Sums, chance, corpus, draws, ends
from gdn2.errors import DataError, UserError
from tests.evalsuite.test_schema import KEPT

texts = st.text(st.characters(exclude_categories=()), max_size=9)  # lone surrogates and control characters too
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts,
    st.integers(-9, 9).map(np.int64), st.floats(width=32).map(np.float32), st.booleans().map(np.bool_),
)  # fmt: skip
keys = st.one_of(texts, st.sampled_from(["$tuple", "$", "a"]))
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2), st.sets(st.integers() | texts, max_size=3),
        st.lists(st.floats(), max_size=4).map(np.array), st.lists(texts, max_size=3).map(lambda t: np.array(t, str)),
    ),
    max_leaves=8,
)  # fmt: skip


def alike(a: object, b: object) -> bool:
    """Whether two items are one: types, NaNs and the shapes of arrays too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        same = a.dtype == b.dtype or a.dtype.kind == b.dtype.kind == "U"
        return same and a.shape == b.shape and all(map(alike, a.ravel().tolist(), b.ravel().tolist()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    return a == b or (a != a and b != b)


@given(anything)
def test_whatever_a_metric_keeps_comes_back(item: object) -> None:
    line = items.dumps(item)
    assert line.isascii() and "\n" not in line
    assert alike(items.loads(line), item)


WRONG = ['{"$tuple": 1}', '{"$x": 1}', '{"$int64": "a"}', '{"$array": [1]}', '{"$set": [[1]]}', "NaN", "[" * 9999]


@given(st.text(max_size=40) | st.sampled_from(WRONG))
def test_anything_else_is_refused_in_one_way(text: str) -> None:
    with suppress(ValueError):
        assert text not in WRONG or items.loads(text) is None


def test_kinds_of_plain_values_and_what_has_no_form() -> None:
    assert items.dumps((np.str_("a"), True, 1.5)) == '{"$tuple":["a",true,1.5]}'
    assert items.dumps({"a": float("nan"), "b": {2, 1}}) == '{"a":{"$float":"nan"},"b":{"$set":[1,2]}}'
    for item in (object(), 1j, np.array([1j]), {"a": [print]}):
        with pytest.raises(TypeError, match="cannot be kept in a record"):
            items.dumps(item)
    for text in ('{"$tuple": [], "a": 1}', '{"$x": 1}', '{"$dict": 5}', "[1"):
        with pytest.raises(ValueError, match="."):
            items.loads(text)


class Mean:
    """A mean, with or without sums."""

    def __init__(self, sums: bool, wrong: float = 0.0) -> None:
        self._sums, self._wrong = sums, wrong

    def value(self, found: list) -> float:
        if not sum(found):
            raise DataError("nothing there")
        return sum(found) / len(found)

    def sums(self, found: list) -> Sums | None:
        counts = np.array([[x, 1.0] for x in found])
        return Sums(counts, lambda n: n[0] / n[1] + self._wrong) if self._sums else None


def test_draws_have_the_spread_of_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    found = [float(rng.random() < 0.3) for _ in range(400)]
    value = sum(found) / 400
    spread = math.sqrt(value * (1 - value) / 400)
    for statistic in (Mean(True), Mean(False), Mean(True, wrong=0.1)):
        made = draws(statistic, found)
        # Sums that do not give the number itself are not used.
        assert len(made) == (2000 if statistic._sums and not statistic._wrong else corpus.MOST)
        assert np.mean(made) == pytest.approx(value, abs=0.01) and np.std(made) == pytest.approx(spread, rel=0.15)
        low, high = ends(made, value)
        assert (value - low, high - value) == pytest.approx((1.96 * spread,) * 2, rel=0.25)
        assert np.array_equal(made, draws(statistic, found)) and not np.array_equal(made, draws(statistic, found, 7))
    # With and without sums the same samples are drawn.
    assert np.allclose(draws(Mean(True), found)[: corpus.MOST], draws(Mean(False), found))
    monkeypatch.setattr(corpus, "WORK", 400 * 3 * 30)
    assert len(draws(Mean(False), found)) == 30
    low, high = ends(draws(Mean(False), found), value)
    assert (low + high) / 2 == pytest.approx(value)


def test_draws_without_a_number_give_no_interval() -> None:
    made = draws(Mean(False), [0.0, 0.0, 1.0])
    assert np.isnan(made).any() and all(map(math.isnan, ends(made, 0.3))) and chance(made, 0.3) == 1.0
    assert all(map(math.isnan, ends(np.array([1.0]), 1.0)))


def test_chances() -> None:
    rng = np.random.default_rng(1)
    for n in (150, 2000):
        assert chance(rng.normal(0.0, 1.0, n), 0.0) > 0.9 and chance(rng.normal(5.0, 1.0, n), 5.0) < 0.01
    assert chance(np.zeros(150), 0.0) == 1.0 and chance(np.ones(150), 1.0) == 0.0


@pytest.mark.parametrize("name", ["f1", "matthews_corrcoef", "bleu", "chrf", "chrf++", "ter"])
def test_sums_give_lm_evals_number(name: str) -> None:
    rng = random.Random(name)
    words = ["a", "b", "cat", "sat", "on", "mat"]
    pairs = [(rng.randrange(2), np.int64(rng.randrange(2))) for _ in range(50)]
    lines = [tuple(" ".join(rng.choice(words) for _ in range(9)) for _ in range(2)) for _ in range(20)]
    found = pairs if name in ("f1", "matthews_corrcoef") else lines
    statistic = bridge.aggregate(bridge.named(name))
    form = statistic.sums(found)
    assert form.finish(form.counts.sum(0)) == pytest.approx(statistic.value(found), rel=1e-12)
    made = draws(statistic, found)
    assert len(made) == 2000 and ends(made, 0)[0] < statistic.value(found) < ends(made, 0)[1]
    assert statistic.sums([("x", object())]) is None or name not in ("f1", "matthews_corrcoef")


def test_more_classes_than_two_have_no_sums() -> None:
    assert bridge.aggregate("lm_eval:matthews_corrcoef").sums([(0, 1), (2, 2), (1, 0)]) is None
    assert bridge.aggregate("lm_eval:median").sums([1]) is None
    assert bridge.aggregate("lm_eval:median").value([3, 1, 2]) == 2
    with pytest.raises(DataError, match="lm-eval's f1 cannot be made: "):
        bridge.aggregate("lm_eval:f1").value(["a"])
    with pytest.raises(DataError, match="lm-eval's nanmean of these answers is nan"):
        bridge.aggregate("lm_eval:nanmean").value([float("nan")])


def test_random_functions_repeat_themselves() -> None:
    statistic = bridge.Aggregate("lm_eval:x/y", lambda found: random.random() + np.random.rand())
    random.seed(1)
    before = random.getstate()
    assert statistic.value([1]) == statistic.value([1]) and random.getstate() == before


def test_parts_of_a_mean_and_items() -> None:
    from lm_eval.api.metrics import matthews_corrcoef, mean, weighted_perplexity

    aggregation = {"acc": mean, "ppl": weighted_perplexity, "mcc": matthews_corrcoef, "own": max}
    task = SimpleNamespace(aggregation=lambda: aggregation, higher_is_better=lambda: {"ppl": False, "acc": True})
    measures = Measures(task, "toy")
    assert measures.lower() == ("ppl",)
    assert measures.score("acc", True, "acc,strict", "t", "o").value == 1.0
    assert measures.score("unheard of", 0.5, "m", "t", "o").value == 0.5
    part = measures.score("ppl", (-6.0, 3), "m", "t", "o")
    assert (part.value, part.weight, part.item) == (2.0, 3.0, None)
    kept = measures.score("own", (1, None), "own,strict", "t", "o")
    assert (kept.metric, kept.value, kept.item) == ("own,strict", None, '{"$tuple":[1,null]}')
    assert (kept.aggregation, measures.score("mcc", (1, 0), "m", "t", "o").aggregation) == (
        "lm_eval:toy/own", "lm_eval:matthews_corrcoef",
    )  # fmt: skip
    for metric, value in (("own", object()), ("acc", "yes"), ("ppl", 3)):
        failed = measures.score(metric, value, "m", "t", "o")
        assert failed.value is failed.item is None and failed.error.startswith(f"{metric} cannot be recorded: ")


def test_groups_average_what_their_tasks_have() -> None:
    averaged = groups.Averaged("acc", None, True)
    assert averaged.among({"acc", "acc_norm", "acc,strict", "f1"}) == ["acc", "acc,strict"]
    assert groups.Averaged("acc", ("strict", "none", "x"), True).among({"acc", "acc,strict"}) == ["acc,strict", "acc"]
    group = groups.Group("lm_eval:g", ("lm_eval:a", "lm_eval:b"), (averaged,))
    assert list(group.numbers({"lm_eval:a": ["acc"], "lm_eval:b": ["f1"]})) == [(averaged, "acc")]
    assert groups.read({"invocations": [{}, {"groups": groups.content([group])}]}) == {"lm_eval:g": group}
    assert groups.average([0.5, 1.0], [3, 1]) == 0.625
    for wrong in ({"name": "x"}, {"name": "x", "tasks": 5, "averages": []}, 7):
        with pytest.raises(DataError, match="does not say what its groups are"):
            groups.read({"invocations": [{"groups": [wrong]}]})


def test_stand_ins_are_there_for_as_long_as_asked() -> None:
    import sys

    before = sys.modules.get("evaluate")
    with standins.stand_ins():
        import evaluate

        assert evaluate is not before
        with pytest.raises(UserError, match="metric 'f1' is code of the hub's evaluate library, which is not run"):
            evaluate.load("f1")
        rouge = evaluate.load("rouge", keep_in_memory=True)
    assert sys.modules.get("evaluate") is before
    both = {"predictions": ["the cat sat", "no"], "references": [["a cat sat", "the cat"], "yes"]}
    found = rouge.compute(**both, rouge_types=["rouge1"], use_aggregator=False)
    assert found == {"rouge1": [pytest.approx(0.8), 0.0]}
    assert rouge.compute(**both)["rougeL"] in (0.0, 0.4, 0.8)


@pytest.mark.parametrize(
    ("gold", "said", "same", "f1"),
    [
        ("The Cat!", "cat", 1, 1.0), ("a cat sat", "cat ran off", 0, 0.4), ("", "", 1, 1), ("the", "", 1, 1),
        ("cat", "", 0, 0), ("cat", "dog", 0, 0), ("an apple-pie", "applepie", 1, 1.0), ("b b", "b", 0, 2 / 3),
    ],
)  # fmt: skip
def test_squads_metrics(gold: str, said: str, same: int, f1: float) -> None:
    assert standins.exact(gold, said) == same and standins.overlap(gold, said) == pytest.approx(f1)


def kept(model: str, task: str, values: list[float]) -> list[dict]:
    """Records of medians: of a number made from all samples together."""
    base = {"model": model, "checkpoint": model, "task": task, "metric": "med", "aggregation": "lm_eval:median"}
    return [
        dataclasses.asdict(
            dataclasses.replace(
                KEPT, **base, item=items.dumps(value), sample_id=str(i), key=f"{model}{task}{i:030}"
            )
        )
        for i, value in enumerate(values)
    ]


def grouped(*rows: dict, by_size: bool = True) -> frame.Records:
    """Records of a run that asked for a group of two tasks."""
    group = groups.Group("g", ("a", "b"), (groups.Averaged("med", None, by_size),))
    run = {"model": {}, "invocations": [{"resolved": [], "groups": groups.content([group])}]}
    return dataclasses.replace(frame.from_rows(rows, texts=True), runs={"m-0123456789ab": run})


def test_a_group_is_made_of_the_numbers_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "WORK", 4000)
    rng = random.Random(5)
    short, long = ([round(rng.random(), digits) for _ in range(21)] for digits in (1, 15))
    a, b = kept("m", "a", short), kept("m", "b", long[:11])
    for by_size, wanted in ((True, (21, 11)), (False, (1, 1))):
        table = cells.summary(grouped(*a, *b, by_size=by_size)).set_index("task")
        values = (table.loc["a", "mean"], table.loc["b", "mean"])
        assert values == (sorted(short)[10], sorted(long[:11])[5])
        assert table.loc["g", "mean"] == groups.average(values, wanted)
        assert table.loc["g", "low"] < table.loc["g", "mean"] < table.loc["g", "high"] and table.loc["g", "n"] == 32
    assert "g" not in set(cells.summary(grouped(*a))["task"])  # one of its tasks was not asked
    failed = {**a[0], "item": None, "aggregation": None, "schema_version": 1, "error": "oom"}
    assert cells.summary(grouped(failed, *a[1:], *b)).set_index("task").loc["g", ["n", "asked"]].tolist() == [31, 32]


def test_pairs_are_of_the_same_draws_whatever_their_items_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "WORK", 4000)
    rng = random.Random(6)
    short = [round(rng.random(), 1) for _ in range(25)]
    longer = [value + 1 + 1e-13 for value in short]  # one more each, in four times the characters
    assert len({len(draws(bridge.aggregate("lm_eval:median"), found)) for found in (short, longer)}) == 2
    first = grouped(*kept("m", "a", short), *kept("m", "b", short))
    second = grouped(*kept("n", "a", longer), *kept("n", "b", longer))
    made = {found.task: found for found in compare.comparisons(first, second)}
    assert set(made) == {"a", "b", "g"}
    for found in made.values():
        assert found.difference.mean == pytest.approx(1) == found.second - found.first
        assert (found.difference.low, found.difference.high) == pytest.approx((1, 1)) and found.difference.p < 1e-6
    part = grouped(*kept("n", "a", longer), *kept("n", "b", [7.0]))
    part.frame.loc[part.frame["task"] == "b", "target"] = "another"
    assert {found.task for found in compare.comparisons(first, part)} == {"a"}
