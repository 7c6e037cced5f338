"""Reading runs back: which run is meant, what a table says of it, and the one line at the end of a run."""

import dataclasses
import json

import numpy as np
import pytest

from evalsuite import options, show
from evalsuite.plan import CellSummary, Plan
from evalsuite.runner import Outcome
from evalsuite.store import write_json
from evalsuite.types import Field, Generate, LogLikelihood, ModelInfo, Prompt, Rolling
from gdn2.errors import UserError
from tests.evalsuite.test_cells import RECORD


def run(out, name, **changes):
    content = {"version": 1, "id": name, "identity": {"model": "m"}, "model": {}, "totals": {"samples": 3}}
    content |= {"invocations": [{"started_at": "2026-01-02T03:04:05.678+00:00"}], "status": "complete"} | changes
    (out / "runs" / name).mkdir(parents=True)
    write_json(out / "runs" / name / "run.json", content)
    return out / "runs" / name


def test_a_run_is_found_by_its_id_or_an_unambiguous_beginning(tmp_path):
    places = {name: run(tmp_path, name) for name in ("tiny", "tiny-a", "tiny-b", "other")}
    assert show.find(tmp_path, "tiny") == places["tiny"]  # whole before every longer one
    assert show.find(tmp_path, "tiny-a") == places["tiny-a"] and show.find(tmp_path, "o") == places["other"]
    assert show.locate(tmp_path, str(places["other"])) == places["other"]
    for name, message in (
        ("tin", "run 'tin' may be any of tiny, tiny-a, tiny-b: give more of its id"),
        ("tiny-c", "run 'tiny-c' is not in .*; did you mean tiny-b or tiny-a or tiny"),
        ("", "run '' is not in"), ("*", r"run '\*' is not in"), ("../other", "run '../other' is not in"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            show.find(tmp_path, name)
    with pytest.raises(UserError, match="there are none"):
        show.find(tmp_path / "nowhere", "tiny")


def test_the_list_of_runs_tells_what_cannot_be_read(tmp_path):
    run(tmp_path, "b")
    run(tmp_path, "a", status="running", invocations=[])  # nobody holds its lock: it died without a word
    (run(tmp_path, "c") / "run.json").write_text("{")
    assert show.runs(tmp_path) == [
        ("a", "m", "killed", 3, ""), ("b", "m", "complete", 3, "2026-01-02T03:04:05"), ("c", "?", "unreadable", 0, ""),
    ]  # fmt: skip


def record(**changes):
    return dataclasses.replace(RECORD, **changes)


def test_means_are_weighted_and_sorted_by_task_and_length():
    made = show.cells(
        [
            record(length=2048, score=0.0, key="a"),
            record(length=512, key="b"),
            record(task="b", length=0, key="c"),
            record(length=2048, key="d", weight=3.0),
            record(length=2048, score=None, error="oom", key="e"),
            record(task="a", metric="z", score=None, error="oom", key="f"),
            record(length=2048, data="e" * 64, key="g"),
        ]  # fmt: skip
    )
    assert [(c.task, c.length, c.n, c.failed, c.mean) for c in made] == [
        ("a", 1024, 0, 1, None), ("b", 0, 1, 0, 1.0), ("niah_single_2", 512, 1, 0, 1.0),
        ("niah_single_2", 2048, 2, 1, 0.75), ("niah_single_2", 2048, 1, 0, 1.0),
    ]  # fmt: skip


def test_scores_are_shown_in_their_unit_and_beside_the_complete_set():
    cells = show.cells([record(), record(task="w", length=0, metric="word_perplexity", score=2.0, key="p")])
    header, rows = show.score_table(cells, {"w": 62})
    assert header == ("task", "profile", "length", "metric", "n", "failed", "mean")
    assert rows == [
        ("niah_single_2", "exact", 1024, "string_match_all", 1, 0, "1.0000"),
        ("w", "exact", "-", "word_perplexity", "1 of 62", 0, "7.3891"),
    ]
    assert show.score_table(show.cells([record(score=None, error="x")]))[1][0][-1] == "-"


def test_the_price_of_a_run_in_one_line():
    rows = [CellSummary("t", "exact", 1024, 5, 2, 3, 3000), CellSummary("u", "exact", None, 1, 0, 4, 123)]
    assert show.estimate(rows, None) == "7 requests, 3,123 tokens to read; time: unknown until the first answers"
    assert show.estimate(rows, 10.0) == "7 requests, 3,123 tokens to read; time: about 5 min 12 s at 10 tokens/s"
    assert show.estimate([], 10.0) == "0 requests, 0 tokens to read; time: about 0 s at 10 tokens/s"
    assert show.plan_table(rows)[1] == [("t", "exact", 1024, 5, 2, 3, "3,000"), ("u", "exact", "-", 1, 0, 4, "123")]


def outcome(**changes):
    return dataclasses.replace(Outcome(9, before=2, answered=5, failed=0, tokens=100, seconds=61.0), **changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, ""),
        ({"failed": 2}, "; 2 failed: the results are partial, the same command asks them again"),
        ({"signal": 2}, "; interrupted with 2 to go: the same command goes on"),
        ({"lost": (1, 3)}, "; processes 1, 3 were lost: what they answered is kept, the same command asks the rest"),
        (
            {"report": {"tokens_asked": 12345, "tokens_read": 2000, "tokens_shared": 10345}},
            "; 12,345 prompt tokens asked, 2,000 read, 10,345 shared",
        ),
        ({"report": {"events": ["a", "b"]}}, "; memory was exhausted 2 times"),
    ],
)
def test_what_an_invocation_did_in_one_line(changes, line):
    assert show.outcome_line(outcome(**changes)) == f"5 samples answered in 1 min 01 s, 2 were there before{line}"


def test_a_length_beyond_the_window_is_told():
    info = ModelInfo("m", "gdn2", "hybrid", 1, "c", "t", window=4096)

    def plan(window, *lengths):
        cells = [type("Cell", (), {"setting": type("Setting", (), {"length": n})()})() for n in lengths]
        return Plan("r", {}, dataclasses.replace(info, window=window), tuple(cells))

    assert show.too_long(plan(4096, 1024, 4096, None)) == "" == show.too_long(plan(None, 1 << 20))
    assert show.too_long(plan(4096, 1024, 4097)).startswith("length 4097 is beyond the 4096 tokens that m can see")
    assert show.too_long(plan(4096)) == ""


def test_long_texts_keep_both_ends():
    assert show.abridged("x" * 2000) == "x" * 2000
    assert show.abridged("a" * 1500 + "b" * 1500) == f"{'a' * 1000}\n[...]\n{'b' * 1000}"
    assert show.abridged("abcdef", limit=4) == "ab\n[...]\nef"


def test_what_a_model_read_is_shown_for_every_kind_of_request():
    def prompt(text):
        return Prompt(np.zeros(1, np.int32), text)

    assert show.prompt_text(Generate(prompt("ask"), 3)) == "ask"
    assert show.prompt_text(LogLikelihood(prompt("a b"), prompt(" c"))) == "a b |  c"
    assert show.prompt_text(Rolling(prompt("page"), None)) == "page"


def test_fields_of_several_tasks_stand_together():
    class Task:
        def __init__(self, name, default):
            self.name, self.fields = name, {"pairs": Field(default, "[0-9]+", "a number")}

        def expand(self, profile):
            return (profile,)

    made = show.field_table([Task("a", "8"), Task("b", "8"), Task("c", "4"), type("Plain", (), {"name": "d"})()])
    assert made[1] == [("pairs", "8", "a number", "a, b"), ("pairs", "4", "a number", "c")]


def test_the_size_of_complete_sets_is_what_the_run_said(tmp_path):
    cell = {"task": "t", "task_version": 1, "protocol": "exact", "data": "d", "length": None, "samples": 3}
    place = run(tmp_path, "r", invocations=[{"resolved": [cell | {"complete": 9}, cell | {"task": "u"}]}, {}])
    assert show.complete(place) == {"t": 9}
    names = dict(show.settings(place))
    assert (names["run"], names["status"], names["invocations"], names["totals.samples"]) == ("r", "complete", "2", "3")
    assert json.loads((place / "run.json").read_text())["id"] == "r"


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:0", "cuda:999"])
def test_devices_that_can_be(value):
    assert options.device(value) == value


@pytest.mark.parametrize(
    "value", ["", "CPU", "gpu", "cuda:", "cuda:1000", "cuda:-1", "cuda:0 ", "mps", "cuda:0\n", "cpu:0"]
)
def test_devices_that_cannot(value):
    with pytest.raises(UserError, match="^device .* is not cpu, cuda, cuda:N or auto$"):
        options.device(value)
