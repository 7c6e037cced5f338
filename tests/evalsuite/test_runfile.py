"""run.json read back: whatever is in it, readers get what they count with or one line that names the entry."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
from evalsuite import runfile, show
from evalsuite.reports import captions, cells, frame, plots
from evalsuite.schema import NewerSchemaError
from evalsuite.watch import Watch
from gdn2.errors import DataError

CELL = ("invocations", 0, "resolved", 0)


@pytest.fixture
def run(synthetic, tmp_path):
    """A copy of a run with few records."""
    return Path(shutil.copytree(synthetic.HOME / "runs" / "synthetic-gdn2-h", tmp_path / "runs" / "r"))


def change(content, path, value):
    """`content` with another value at `path`; KeyError takes the entry away."""
    out = copy.deepcopy(content)
    holder = out
    for part in path[:-1]:
        holder = holder[part]
    if value is KeyError:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return out


def paths(content, before=()):
    inside = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in inside:
        yield (*before, name)
        if isinstance(value, dict | list):
            yield from paths(value, (*before, name))


def put(run, content):
    (run / runfile.NAME).write_text(json.dumps(content), encoding="ascii")


@pytest.fixture
def whole(synthetic):
    """The content of that run's file, with all that a run of today writes."""
    content = json.loads((synthetic.HOME / "runs" / "synthetic-gdn2-h" / runfile.NAME).read_text("ascii"))
    last = content["invocations"][-1] | {"passed": {"model": "scripted:last", "device": "cpu"}}
    totals = {"samples": 3, "tokens": 900, "seconds": 1.5}
    return content | {"invocations": [last], "totals": totals, "identity": {"model": "m", "seed": 42}}


WRONG = [
    (("id",), 3, "id is missing or not a str"),
    (("identity",), KeyError, "identity is missing or not a dict"),
    (("model",), [], "model is missing or not a dict"),
    (("invocations",), {}, "invocations is missing or not a list"),
    (("invocations",), [7], r"invocations\[0\] is not what a run writes there"),
    (("invocations", 0), "x", r"invocations\[0\] is not"),
    (("invocations", 0, "resolved"), None, r"invocations\[0\]\.resolved is not"),
    (CELL, 7, r"invocations\[0\]\.resolved\[0\] is not"),
    ((*CELL, "task"), KeyError, r"resolved\[0\]\.task is not"),
    ((*CELL, "length"), KeyError, r"resolved\[0\]\.length is not"),
    ((*CELL, "length"), "1k", r"resolved\[0\]\.length is not"),
    ((*CELL, "samples"), True, r"resolved\[0\]\.samples is not"),
    ((*CELL, "samples"), 1.5, r"resolved\[0\]\.samples is not"),
    ((*CELL, "complete"), "all", r"resolved\[0\]\.complete is not"),
    (("totals", "samples"), None, r"totals\.samples is not"),
    (("totals", "seconds"), "1", r"totals\.seconds is not"),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[".".join(map(str, p)) for p, _, _ in WRONG])
def test_what_readers_count_with_is_checked_and_named(run, whole, capsys, path, value, words):
    put(run, change(whole, path, value))
    with pytest.raises(DataError, match=words) as caught:
        runfile.read(run)
    assert str(run / runfile.NAME) in str(caught.value) and caught.value.exit_code == 3
    for command in (["show", str(run)], ["watch", str(run)], ["tables", "--runs", str(run)]):
        assert cli.main(command) == 3
        error = capsys.readouterr().err
        assert runfile.NAME in error and error.count("\n") == 1
    assert [one.status for one in show.runs(run.parent.parent)] == ["unreadable"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([KeyError, None, 7, -1.5, "x", "\ud800", [], {}, [7], {"a": 7}, True]))
def test_any_entry_of_any_kind_is_read_or_refused(whole, run, data, value):
    path = data.draw(st.sampled_from(sorted(paths(whole), key=str)))
    put(run, change(whole, path, value))
    assert len(show.runs(run.parent.parent)) == 1
    try:
        runfile.read(run)
    except DataError as problem:
        assert "\n" not in str(problem)
        return
    assert all(isinstance(text, str) for row in show.settings(run) for text in row)
    watch = Watch(run)
    watch.look()
    assert any("niah_single_2" in line for line in watch.lines())
    assert all(type(n) is int for n in show.complete(run).values())
    records = frame.load([run])
    assert captions.described(records, [])
    try:
        assert all(samples >= 0 for samples in cells.asked_for(records).values())
    except DataError as problem:  # a whole part may be missing
        assert "does not say what was asked" in str(problem)
    assert isinstance(plots.window_baseline(records, "niah_single_2"), dict)


def test_a_sample_is_shown_only_where_the_settings_are_known(run, whole, capsys):
    for settings_of in ({}, {"model": "scripted:last"}, {"device": "cpu"}, {"model": 3, "device": "cpu"}):
        put(run, change(whole, ("invocations", 0, "passed"), settings_of))
        with pytest.raises(DataError, match="holds no settings"):
            show.passed(run)
    put(run, change(whole, ("invocations",), []))
    assert cli.main(["show", str(run), "--sample", "0"]) == 3
    assert "holds no settings" in capsys.readouterr().err
    put(run, whole)
    assert show.passed(run) == {"model": "scripted:last", "device": "cpu"}


def test_a_later_version_is_told_from_damage(run, whole):
    put(run, whole | {"version": runfile.VERSION + 1})
    with pytest.raises(NewerSchemaError, match="version 2 is newer than 1: update gdn2-eval"):
        runfile.read(run)
    put(run, whole | {"version": "9"})  # no number: no promise of anything
    assert runfile.read(run)["id"]


def test_the_rate_needs_time_and_tokens(run, whole, tmp_path):
    assert runfile.rate(tmp_path) is None  # no run at all
    put(run, whole)
    assert runfile.rate(run) == 600.0
    for name in ("tokens", "seconds"):
        put(run, change(whole, ("totals", name), 0))
        assert runfile.rate(run) is None
