"""Benchmark files and training logs of every kind: read, or one line that names the file."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
from evalsuite.reports import throughput, training
from gdn2.errors import DataError
from tests.evalsuite.test_runfile import change, paths

ROW = {"model": "m", "mixer": "gdn2", "family": "recurrent", "mixers": {"a": {"mixer": "gdn2"}}, "params": 3}
ROW |= {"length": 2048, "batch": 8, "tokens_per_s": 1000.0, "peak_bytes": 5}
DEVICE = {"before": {"name": "Toy"}, "after": {}}
FILES = {
    "training": {"kind": "training", "device": DEVICE, "rows": [ROW]},
    "engine": {
        "kind": "engine", "device": DEVICE, "asked": {"model": "/x/tiny"},
        "rows": [{"work": "prefill 4096", "contender": "ours", "batch": None, "tokens_per_s": 9.0, "peak_bytes": 1}],
    },
}  # fmt: skip
ODD = [KeyError, None, 7, -1.5, "x", "", [], {}, [7], {"a": 7}, True, float("nan"), 10**400]


def write(tmp_path, name, content):
    (tmp_path / "bench").mkdir(exist_ok=True)
    (tmp_path / "bench" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(list(FILES)), st.sampled_from(ODD))
def test_any_entry_of_any_kind_is_a_speed_or_one_line(tmp_path, data, name, value):
    path = data.draw(st.sampled_from(sorted(paths(FILES[name]), key=str)))
    write(tmp_path, "one", change(copy.deepcopy(FILES[name]), path, value))
    try:
        speeds = throughput.load([tmp_path])
    except DataError as problem:
        assert str(problem).startswith(f"cannot read {tmp_path / 'bench' / 'one.json'}: ") and "\n" not in str(problem)
        return
    assert all(type(speed.length) is int and type(speed.tokens_per_s) is float for speed in speeds)
    assert throughput.grid(speeds, "all").lines


def test_later_files_go_last_and_other_kinds_are_passed_over(tmp_path):
    for name, rate in (("b", 2.0), ("a", 1.0)):
        write(tmp_path, name, {**FILES["training"], "rows": [ROW | {"tokens_per_s": rate}]})
    write(tmp_path, "c", {"kind": "kernels", "rows": 3})
    write(tmp_path, "d", {})
    assert [speed.tokens_per_s for speed in throughput.load([tmp_path])] == [1.0, 2.0]
    assert throughput.load([tmp_path / "bench" / "a.json", tmp_path / "no"]) == []
    (speed,) = throughput.load([tmp_path])[:1]
    assert (speed.device, speed.listed, speed.family, speed.peak_bytes) == ("Toy", "gdn2", "recurrent", 5)
    write(tmp_path, "a", {"kind": "training", "rows": [ROW | {"peak_bytes": None}]})
    assert throughput.load([tmp_path])[0].device == "unknown" and throughput.load([tmp_path])[0].peak_bytes is None


TRAIN = {"kind": "train", "tokens": 2_000_000, "loss": 1.5, "answer_tokens": 0.25}
HELD_OUT = {"kind": "held-out", "name": "n", "loss": 0.5, "exact": 0.75}


def log(tmp_path, *records, end="\n"):
    place = tmp_path / "mine" / "log.jsonl"
    place.parent.mkdir(exist_ok=True)
    place.write_text("\n".join(map(json.dumps, records)) + end, encoding="utf-8")
    return place


def test_a_log_is_its_curves(tmp_path):
    made = training.read(
        log(
            tmp_path,
            TRAIN,
            HELD_OUT,
            {"kind": "note"},
            TRAIN | {"tokens": 4_000_000, "answer_tokens": None},
            HELD_OUT | {"name": "t", "exact": None},
            HELD_OUT,
        )  # fmt: skip
    )
    assert (made.name, made.loss, made.answers) == ("mine", [(2.0, 1.5), (4.0, 1.5)], [(2.0, 25.0)])
    # Of held-out documents the exact answers in percent; the loss where there are none. At the tokens read by then.
    assert made.held_out == {"n, exact (%)": [(2.0, 75.0), (4.0, 75.0)], "t, loss": [(4.0, 0.5)]}


def test_what_is_being_written_is_left_for_later(tmp_path):
    torn = log(tmp_path, TRAIN, TRAIN, end='\n{"kind": "tra')
    assert len(training.read(torn).loss) == 2
    assert len(training.read(log(tmp_path, TRAIN, TRAIN, end="")).loss) == 1  # a whole line without its end


@pytest.mark.parametrize(
    "lines",
    [
        ["7"], ["[]"], ["{}"], ["{"], ['{"kind": "train"}'], ['{"kind": "train", "tokens": "x", "loss": 1}'],
        ['{"kind": "held-out", "loss": 1}'], [json.dumps(TRAIN | {"loss": None})], [json.dumps(TRAIN | {"tokens": []})],
        ["\ufeff{}"], ["null"], [""], [json.dumps(TRAIN | {"tokens": 10**400})],
    ],
    ids=lambda lines: lines[0][:20],
)  # fmt: skip
def test_lines_that_are_none_are_one_line(tmp_path, capsys, lines):
    place = tmp_path / "log.jsonl"
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="^cannot read .*log.jsonl as a training log: ") as caught:
        training.read(place)
    assert "\n" not in str(caught.value)
    assert cli.main(["plot", "--log", str(place), "--out", str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_log_without_steps_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").touch()
    with pytest.raises(DataError, match="holds no steps of training$"):
        training.read(tmp_path / "mine" / "log.jsonl")
    for records in ((HELD_OUT,), ({"kind": "note"},)):
        with pytest.raises(DataError, match="holds no steps of training$"):
            training.read(log(tmp_path, *records))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="as a training log"):
        training.read(tmp_path / "bytes.jsonl")
    with pytest.raises(DataError, match="as a training log"):
        training.read(tmp_path)
