"""Speed and memory from benchmark files: Figure 2 beside the published one, and against context length."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from evalsuite.reports import throughput
from gdn2.errors import DataError


def texts(path):
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "results" / "bench"
    folder.mkdir(parents=True)
    row = {"model": "m3", "mixer": "mamba3", "family": "hybrid", "mixers": {"x": {"mixer": "mamba3", "rank": 4}}}
    row |= {"tokens_per_s": 30_000.0, "peak_bytes": None}
    rows = [row | {"length": n, "batch": b} for n, b in ((2048, 8), (99, 1))]
    device = {"before": {"name": "Toy GPU"}, "after": {}}
    (folder / "training_toy_1.json").write_text(json.dumps({"kind": "training", "device": device, "rows": rows}))
    read = {"work": "prefill 4096", "contender": "ours", "batch": 0, "tokens_per_s": 1e5, "peak_bytes": 1 << 30}
    engine = {"kind": "engine", "asked": {"model": "/x/gdn2-tiny"}, "device": device}
    rows = [read, read | {"work": "choices"}, read | {"work": "prefill 8192", "tokens_per_s": 9e4}]
    (folder / "engine_toy.json").write_text(json.dumps(engine | {"rows": rows}))
    (folder / "kernels_toy.json").write_text(json.dumps({"kind": "kernels", "rows": []}))
    return tmp_path / "results"


def test_benchmark_files_are_read(bench):
    speeds = throughput.load([bench])
    assert [(s.kind, s.model, s.listed, s.length, s.peak_bytes) for s in speeds] == [
        ("reading", "gdn2-tiny, ours", "", 4096, 1 << 30),
        ("reading", "gdn2-tiny, ours", "", 8192, 1 << 30),
        ("training", "m3", "mamba3_mimo", 2048, None),
        ("training", "m3", "mamba3_mimo", 99, None),
    ]
    assert throughput.load([bench / "nothing"]) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "training"}', '{"kind": "training", "rows": [{}]}'])
def test_a_damaged_file_is_one_line(bench, content):
    (bench / "bench" / "training_x.json").write_text(content)
    with pytest.raises(DataError, match="^cannot read .*training_x.json: .{1,120}$"):
        throughput.load([bench])


def test_figure_2_as_a_table(bench):
    grid = throughput.grid(throughput.load([bench]), "matched")
    (line,) = grid.lines
    cells = dict(zip([head.key for head in grid.heads], line.cells, strict=True))
    assert line.labels == ("mamba3_mimo", "m3")
    assert cells["2048x8"].value == 30.0
    assert cells["2048x8_published"].value == 34.44
    assert cells["2048x8_difference"].value == pytest.approx(-4.44)
    assert cells["4096x4"] is None
    assert any(note.values == ("Toy GPU",) for note in grid.notes)
    assert len(throughput.grid([], "all").lines) == 7


def test_a_model_the_figure_does_not_list_has_a_row_of_its_own(paperlike):
    mine = throughput.Speed("training", "mine", "recurrent", "deltanet", 2048, 8, 5e4, None, paperlike.SPEEDS[0].device)
    grid = throughput.grid([*paperlike.SPEEDS, mine], "all")
    assert [line.labels for line in grid.lines][-1] == ("deltanet", "mine")
    assert len(grid.lines) == 8


def test_the_figures_name_what_they_show(bench, tmp_path):
    speeds = throughput.load([bench])
    throughput.plot(speeds, [tmp_path / "a.svg"])
    assert {"one H100", "measured,", "Toy GPU", "gdn2 (published)", "m3"} <= set(texts(tmp_path / "a.svg"))
    throughput.plot([], [tmp_path / "b.svg"])
    assert not [t for t in texts(tmp_path / "b.svg") if t and "measured" in t]
    throughput.against_length(speeds, [tmp_path / "c.svg", tmp_path / "c.png"])
    assert {"peak memory (GiB)", "thousand tokens / s", "gdn2-tiny, ours (reading)", "m3 (training)"} <= set(
        texts(tmp_path / "c.svg")
    )
    with pytest.raises(DataError, match="no measurements"):
        throughput.against_length([], [tmp_path / "d.svg"])


def test_devices_are_told_apart(bench):
    content = json.loads((bench / "bench" / "training_toy_1.json").read_text())
    content["device"]["before"]["name"] = "Other GPU"
    (bench / "bench" / "training_toy_2.json").write_text(json.dumps(content))
    lines = throughput.grid(throughput.load([bench]), "matched").lines
    assert [line.labels[1] for line in lines] == ["m3, Toy GPU", "m3, Other GPU"]


def test_measurements_lie_beside_records_or_elsewhere(bench, tmp_path):
    records = tmp_path / "one.jsonl"
    assert throughput.beside_records([bench, records]) == [records]
    assert throughput.beside_records([bench]) == [bench]
    (bench / "runs").mkdir()
    assert throughput.beside_records([bench, records]) == [bench, records]
