"""Cells of a table: what is summed up with what, labels, filters, and the options of a run behind them."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.reports import captions, cells, frame, pivot
from evalsuite.reports.select import select
from evalsuite.schema import Record
from gdn2.errors import DataError, UserError

RECORD = Record(
    schema_version=1, run_id="run-a", key="", model="m", mixer="gdn2", family="recurrent", params=1_200_000,
    checkpoint="c" * 64, task="niah_single_2", task_version=1, protocol="exact", length=1024, sample_id="0", seed=42,
    metric="string_match_all", score=1.0, prompt_tokens=900, truncated_tokens=0, depth=0.5, target="1", output="1",
    output_tokens=1, outcome="target", logprob=None, decided_early=False, error=None, latency_s=0.1,
    created_at="2026-01-02T03:04:05+00:00", data="d" * 64, weight=1.0, metric_count=1,
)  # fmt: skip


def row(**changes):
    made = dataclasses.asdict(RECORD) | changes
    name = "/".join(
        str(made[n]) for n in ("run_id", "model", "task", "protocol", "length", "seed", "sample_id", "data")
    )
    return made | {"key": changes.get("key", name)}


def records(*rows, runs=None):
    made = frame.from_rows(rows, texts=["target"])
    return dataclasses.replace(made, runs=runs or {})


def run_of(*resolved, **model):
    return {"model": {"checkpoint": "c" * 64, "family": "recurrent", **model}, "invocations": [{"resolved": resolved}]}


def asked(**changes):
    cell = {"task": "niah_single_2", "task_version": 1, "protocol": "exact", "data": "d" * 64, "length": 1024}
    return cell | {"samples": 10} | changes


def summed(made):
    return cells.summary(made).to_dict("records")


@pytest.mark.parametrize(
    ("length", "label"),
    [
        (0, ""), (1, "1"), (512, "512"), (1000, "1000"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"),
        (1280, "1280"), (2048, "2K"), (131072, "128K"), (1 << 20, "1M"), (3 << 19, "1.5M"),
        ((1 << 20) + 1024, "1025K"), (1 << 24, "16M"),
    ],
)  # fmt: skip
def test_lengths_as_people_write_them(length, label):
    assert cells.length_label(length) == label


@pytest.mark.parametrize(
    ("params", "label"),
    [
        (0, ""), (7, "7"), (999, "999"), (1000, "1K"), (1234, "1.23K"), (999_499, "999K"), (999_500, "1M"),
        (999_499_999, "999M"), (999_600_000, "1B"), (10**6, "1M"),
        (1_204_000, "1.2M"), (99_950_000, "100M"), (10**9, "1B"), (1_340_000_000, "1.34B"), (70 * 10**9, "70B"),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(params, label):
    assert cells.size_label(params) == label


@given(st.lists(st.text(max_size=4), max_size=6))
def test_known_names_come_first_in_their_order_then_the_others_by_name(names):
    order = ("b", "a")
    found = sorted(names, key=lambda name: cells.rank(name, order))
    known = [name for name in found if name in order]
    assert found == known + sorted(name for name in names if name not in order)
    assert known == sorted(known, key=order.index)


def test_a_cell_is_one_model_on_one_question_set_at_one_length():
    apart = [
        {"family": "hybrid"}, {"checkpoint": "e" * 64}, {"mixer": "kda"}, {"params": 7}, {"task": "vt"},
        {"protocol": "lm-eval"}, {"data": "e" * 64}, {"metric": "acc"}, {"length": 2048}, {"model": "n"},
    ]  # fmt: skip
    made = records(row(), row(sample_id="1", score=0.0), *(row(sample_id=f"{i}x", **c) for i, c in enumerate(apart)))
    found = summed(made)
    assert len(found) == 1 + len(apart)
    assert [(c["n"], c["mean"]) for c in found if c["n"] == 2] == [(2, 0.5)]
    # Seeds and outcomes are not part of the question.
    assert len(summed(records(row(), row(seed=1, outcome="other", depth=None)))) == 1


def test_superseded_versions_never_count():
    (found,) = summed(records(row(task_version=1, score=0.0), row(task_version=2, sample_id="1")))
    assert (found["task_version"], found["n"], found["mean"]) == (2, 1, 1.0)


def test_what_was_asked_is_what_the_run_says_or_at_least_what_it_answered():
    two = [row(), row(sample_id="1")]
    assert summed(records(*two))[0]["asked"] == 2
    assert summed(records(*two, runs={"run-a": run_of(asked())}))[0]["asked"] == 10
    # Of several invocations the largest; of a complete set its size; another cell's plan does not count.
    assert summed(records(*two, runs={"run-a": run_of(asked(samples=3), asked(samples=5))}))[0]["asked"] == 5
    assert summed(records(*two, runs={"run-a": run_of(asked(complete=500))}))[0]["asked"] == 500
    for other in ({"length": 2048}, {"protocol": "lm-eval"}, {"data": "x"}, {"task_version": 2}, {"task": "vt"}):
        assert summed(records(*two, runs={"run-a": run_of(asked(**other))}))[0]["asked"] == 2
    assert summed(records(row(length=0), runs={"run-a": run_of(asked(length=None))}))[0]["asked"] == 10
    failed = row(sample_id="2", score=None, error="oom")
    (found,) = summed(records(*two, failed))
    assert (found["n"], found["errors"], found["asked"]) == (2, 1, 3)
    with pytest.raises(DataError, match="run.json of run-a does not say what was asked"):
        cells.asked_for(records(row(), runs={"run-a": {"invocations": [{}]}}))


def test_a_cell_whose_samples_all_failed_is_there_and_empty():
    (found,) = summed(records(row(score=None, error="oom"), row(sample_id="1", score=None, error="oom")))
    assert (found["n"], found["asked"], found["errors"], found["method"]) == (0, 2, 2, "")
    assert math.isnan(found["mean"]) and math.isnan(found["prompt_min"])
    assert pivot.figure(found).value is None and pivot.figure(found).partial


def test_runs_of_one_model_are_pooled_unless_they_asked_the_same():
    other = {"run_id": "run-b"}
    (pooled,) = summed(records(row(), row(sample_id="1", **other)))
    assert (pooled["run"], pooled["n"], pooled["runs"]) == ("", 2, ("run-a", "run-b"))
    apart = summed(records(row(), row(score=0.0, **other), row(model="n"), row(sample_id="9", **other)))
    assert [(c["model"], c["run"], c["n"]) for c in apart] == [("m", "run-a", 1), ("m", "run-b", 2), ("n", "", 1)]
    assert sorted(cells.names(apart).values()) == ["n", "run-a", "run-b"]


def test_two_checkpoints_of_one_name_are_told_apart():
    entries = summed(records(row(), row(checkpoint="e" * 64, sample_id="1"), row(model="n", sample_id="2")))
    assert sorted(cells.names(entries).values()) == ["m @cccccccc", "m @eeeeeeee", "n"]
    # One name in two families is two models, and needs no more than that.
    entries = summed(records(row(), row(checkpoint="e" * 64, family="hybrid")))
    assert set(cells.names(entries).values()) == {"m"}


@pytest.mark.parametrize(
    ("metric", "scores", "want"),
    [
        ("string_match_all", [1.0, 0.0], 50.0),
        ("bits_per_byte", [0.5, 0.7], 0.6),  # no share, though both are within 0..1
        ("word_perplexity", [math.log(8), math.log(2)], 4.0),
        ("value_logprob", [-3.0, -1.0], -2.0),
        ("value_rank", [1.0, 5.0], 3.0),
    ],
)
def test_a_mean_is_shown_in_its_own_unit(metric, scores, want):
    (found,) = summed(records(*(row(metric=metric, score=s, sample_id=str(i)) for i, s in enumerate(scores))))
    value, low, high = cells.shown(found)
    assert value == pytest.approx(want) and low <= value <= high
    assert found["shares"] == (metric == "string_match_all")


def test_scores_count_by_their_weights():
    (found,) = summed(records(row(metric="acc", weight=3.0), row(metric="acc", score=0.0, sample_id="1", weight=1.0)))
    assert found["mean"] == 0.75 and found["n"] == 2


def test_windows_are_the_widest_of_a_hybrid():
    mixers = {"a": {"mixer": "attention", "window": 512}, "b": {"window": 2048}, "c": {"window": None}, "d": {}}
    details = {"config": {"mixers": mixers}}
    hybrid, recurrent = (run_of(family=family, details=details) for family in ("hybrid", "recurrent"))
    assert cells.attention_windows(records(row(), runs={"r": hybrid})) == {"c" * 64: 2048}
    assert cells.attention_windows(records(row(), runs={"r": recurrent})) == {}
    for odd in ({}, {"config": None}, {"config": 3}, {"config": {}}):
        assert cells.attention_windows(records(row(), runs={"r": run_of(family="hybrid", details=odd)})) == {}


def kept(filters, *rows):
    return sorted(select(records(*rows), filters).frame["sample_id"].tolist())


def test_filters_of_several_names_all_hold_and_values_of_one_are_alternatives():
    rows = [
        row(sample_id="a"), row(sample_id="b", length=2048), row(sample_id="c", task="vt"), row(sample_id="d", seed=7),
    ]  # fmt: skip
    assert kept([], *rows) == ["a", "b", "c", "d"]
    assert kept(["length=1k"], *rows) == ["a", "c", "d"] and kept(["length=2048"], *rows) == ["b"]
    assert kept(["length=1k,2k"], *rows) == kept(["length=1k", "length=2k"], *rows) == ["a", "b", "c", "d"]
    assert kept(["length=1k", "task=vt"], *rows) == ["c"] and kept(["task=vt", "task=niah_single_2"], *rows) == [
        "a", "b", "c", "d",
    ]  # fmt: skip
    assert kept(["seed=7"], *rows) == ["d"] and kept(["sample_id=a"], *rows) == ["a"]


def test_the_beginning_is_enough_for_digests_alone():
    rows = [row(sample_id="1"), row(sample_id="12", model="mm", data="e" * 64, seed=421)]
    assert kept(["data=ddd"], *rows) == ["1"] and kept(["data=e"], *rows) == ["12"]
    assert kept(["sample_id=1"], *rows) == ["1", "12"] and kept(["run_id=run"], *rows) == ["1", "12"]
    assert kept(["model=m"], *rows) == ["1"] and kept(["seed=42"], *rows) == ["1"]
    # A value is a text, never a pattern.
    for hostile in ("data=.*", "model=[a-z]+", "model=m ", "sample_id=1|2", "data=D"):
        with pytest.raises(DataError, match="no records fit"):
            kept([hostile], *rows)


def test_failures_are_filtered_as_answers_are():
    failed = row(sample_id="9", score=None, error="oom", task="vt")
    found = select(records(row(), failed), ["task=vt"])
    assert not len(found.frame) and found.errors["sample_id"].tolist() == ["9"]
    assert not len(select(records(row(), failed), ["task=niah_single_2"]).errors)


@pytest.mark.parametrize("text", ["", "task", "task=", "=vt", "tsk=vt", "score=1", "depth=0.5", "length=x", "length=0"])
def test_a_wrong_filter_is_one_line(text):
    with pytest.raises(UserError, match="is not NAME=VALUE|is unknown|is not a number of tokens") as caught:
        kept([text], row())
    assert "\n" not in str(caught.value)


def test_a_caption_names_what_the_cells_are_of():
    provenance = {"packages": {"gdn2-eval": "0.1.0", "torch": "2.13"}, "code": {"commit": "a" * 40, "dirty": True}}
    run = run_of() | {"invocations": [{"resolved": [], "provenance": provenance}, {"resolved": []}]}
    made = records(row(), row(seed=7, protocol="lm-eval", task="piqa", metric="acc"), runs={"run-a": run})
    notes = captions.described(made, summed(made))
    texts = [(note.text, note.values) for note in notes]
    assert ("Protocol", ("exact", "lm-eval")) in texts and ("Metric", ("acc", "string_match_all")) in texts
    assert ("Task versions and data", ("S-NIAH-2 v1 dddddddd", "piqa v1 dddddddd")) in texts
    assert ("Seeds: 7, 42.", ()) in texts and texts[0][0].startswith("Intervals hold for this haystack")
    assert texts[-1] == ("Software", ("gdn2-eval 0.1.0 aaaaaaaaaa+changes, torch 2.13", "gdn2-eval, torch ?"))
    # Nothing is said of a haystack where no task has one, nor of software that no run names.
    plain = records(row(task="piqa"))
    assert [note.text for note in captions.described(plain, summed(plain))] == [
        "Protocol", "Metric", "Task versions and data", "Seeds: 42.",
    ]  # fmt: skip
