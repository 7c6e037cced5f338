"""Plots from records: written, the same every time, and saying what the records say."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from evalsuite.reports import drawing, frame, plots, retrieved, training
from gdn2.errors import DataError, StorageError, UserError

DRAW = pytest.mark.parametrize("draw", [plots.accuracy, plots.depth_heatmap])


@pytest.fixture(scope="module")
def made(synthetic):
    return frame.load([synthetic.HOME])


def texts(path):
    """All texts of an SVG file."""
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@DRAW
def test_files_are_the_same_every_time(made, tmp_path, draw):
    names = ("a.png", "a.svg", "a.pdf")
    draw(made, [tmp_path / "first" / n for n in names])
    draw(made, [tmp_path / "second" / n for n in names])
    for name in names:
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        assert b"Date" not in content
    assert (tmp_path / "first" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "first" / "a.pdf").read_bytes().startswith(b"%PDF")


def test_accuracy_names_tasks_models_and_lengths(made, tmp_path):
    plots.accuracy(made, [tmp_path / "a.svg"])
    shown = texts(tmp_path / "a.svg")
    assert {"S-NIAH-1", "S-NIAH-2", "MK-NIAH-1", "MV-NIAH"} <= set(shown)
    assert {"synthetic-gdn2 (recurrent)", "synthetic-kda (recurrent)", "synthetic-gdn2-h (hybrid)"} <= set(shown)
    assert {"1K", "2K", "4K", "8K", "context length (tokens)", "accuracy (%)"} <= set(shown)
    assert "trained" not in shown


def test_accuracy_draws_means_bands_and_hollow_partial_cells(made):
    import matplotlib.figure

    table = plots.build(made, "none")
    ax = matplotlib.figure.Figure().add_subplot()
    places = table.places("niah_single_2", (), "measured")
    plots._curves(ax, table, places)
    curves = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    kda = curves["synthetic-kda (recurrent)"]
    assert list(kda.get_xdata()) == [1024, 2048, 4096, 8192]
    assert list(kda.get_ydata()) == pytest.approx([100, 100, 43.75, 100 / 15])
    assert list(curves["synthetic-gdn2-h (hybrid)"].get_xdata()) == [1024, 4096]
    looks = {(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in curves.values()}
    assert len({marker for _, marker, _ in looks}) == len({dash for *_, dash in looks}) == 3
    hollow = [line.get_xydata().tolist() for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[[8192, 100 / 15]]]
    assert len(ax.collections) == 3


def test_crowded_panels_have_bars_side_by_side(made, synthetic):
    rows = [r for r in synthetic.records(synthetic.MODELS[1]) if r.length > 1024]
    many = [
        dataclasses.asdict(dataclasses.replace(r, model=f"m{i}", checkpoint=str(i), key=f"{i}{r.key}"))
        for i in range(plots.BANDS + 1)
        for r in rows
    ]
    import matplotlib.figure

    table = plots.build(frame.from_rows(many), "none")
    ax = matplotlib.figure.Figure().add_subplot()
    plots._curves(ax, table, table.places("niah_single_2", (), "measured"))
    first = sorted(line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 3)
    assert len(set(first)) == plots.BANDS + 1
    assert first[plots.BANDS // 2] == 2048


def test_training_length_is_marked_where_the_run_says_it(made, tmp_path):
    runs = {name: {**run, "model": {"details": {"train_length": 2048}}} for name, run in made.runs.items()}
    plots.accuracy(dataclasses.replace(made, runs=runs), [tmp_path / "a.svg"])
    assert "trained" in texts(tmp_path / "a.svg")


def test_heat_map_shows_means_by_depth(made):
    import matplotlib.figure

    rows = made.frame[(made.frame["model"] == "synthetic-gdn2") & (made.frame["task"] == "niah_multikey_1")]
    given = rows.assign(run="", bin=(rows["depth"] * 4).astype(int))
    table = plots.build(frame.Records(rows, made.errors.iloc[:0], {}), "none")
    ax = matplotlib.figure.Figure().add_subplot()
    image = plots._heat(ax, given, table.rows[0], list(table.columns), 4)
    expected = 100 * given.pivot_table("score", "bin", "length", aggfunc="mean").to_numpy()
    assert np.asarray(image.get_array()) == pytest.approx(expected)
    assert len([p for p in ax.patches if p.get_hatch()]) == 16
    assert [t.get_text() for t in ax.texts] == [f"{value:.0f}" for value in expected.ravel()]


def test_heat_map_says_why_cells_are_hatched(made, tmp_path):
    plots.depth_heatmap(made, [tmp_path / "a.svg"])
    shown = texts(tmp_path / "a.svg")
    assert any("hatched: fewer than 10 samples" in (text or "") for text in shown)
    assert {"needle depth (%)", "synthetic-kda", "MV-NIAH"} <= set(shown)


def test_scales_rise_in_lightness():
    import matplotlib

    with drawing.style():
        colours = matplotlib.colormaps[matplotlib.rcParams["image.cmap"]](np.linspace(0, 1, 32))
    lightness = colours[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 0).all()


def test_drawing_leaves_the_settings_alone(made, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.accuracy(made, [tmp_path / "a.png"])
    assert dict(matplotlib.rcParams) == before


@DRAW
def test_an_unknown_suffix_is_refused_before_drawing(made, tmp_path, draw):
    with pytest.raises(UserError, match=r"must end in .png, .svg, .pdf"):
        draw(made, [tmp_path / "a.png", tmp_path / "b.gif"])
    assert not list(tmp_path.iterdir())


@DRAW
def test_records_that_give_no_plot_are_refused(made, tmp_path, draw):
    bare = dataclasses.replace(made, frame=made.frame.assign(length=0))
    with pytest.raises(DataError, match="to plot"):
        draw(bare, [tmp_path / "a.png"])


@DRAW
def test_a_place_that_cannot_be_written_is_one_line(made, tmp_path, draw):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        draw(made, [tmp_path / "file" / "a.png"])


def test_many_models_have_panels_by_family(made, synthetic, tmp_path):
    rows = [dataclasses.asdict(r) for m in synthetic.MODELS[:1] for r in synthetic.records(m) if r.length > 4096]
    many = [
        row | {"model": f"m{i}", "checkpoint": str(i), "key": f"{i}{row['key']}", "family": family}
        for i, family in enumerate(["recurrent"] * 5 + ["hybrid"] * 4)
        for row in rows
    ]
    plots.accuracy(frame.from_rows(many), [tmp_path / "a.svg"])
    shown = texts(tmp_path / "a.svg")
    assert {"S-NIAH-1, recurrent", "S-NIAH-1, hybrid", "m0 (recurrent)", "m8 (hybrid)"} <= set(shown)
    plots.accuracy(frame.from_rows(many), [tmp_path / "b.svg"], task="niah_single_1")
    assert "S-NIAH-2, hybrid" not in texts(tmp_path / "b.svg")


@pytest.fixture
def windowed(made, synthetic):
    mixers = {"w": {"mixer": "attention", "window": 512}, "g": {"mixer": "gdn2"}}
    details = {"details": {"config": {"mixers": mixers}}}
    runs = {
        name: {**run, "model": run["model"] | {"checkpoint": synthetic.digest("weights", name)} | details}
        for name, run in made.runs.items()
    }
    return dataclasses.replace(made, runs=runs)


def test_window_baseline_is_the_share_of_needles_within_reach(windowed, tmp_path):
    found = plots.window_baseline(windowed, "niah_single_2")
    rows = windowed.frame[(windowed.frame["family"] == "hybrid") & (windowed.frame["task"] == "niah_single_2")]
    for length, share in found[512].items():
        asked = rows[rows["length"] == length]
        assert share == np.mean((1 - asked["depth"]) * asked["prompt_tokens"] <= 512)
    # Depths are even, so it is about the window's share of the prompt.
    assert found[512][1024] == pytest.approx(512 / 890, abs=0.07)
    assert found[512][4096] == pytest.approx(512 / 3964, abs=0.07)
    plots.accuracy(windowed, [tmp_path / "a.svg"])
    assert "last 512 tokens only" in texts(tmp_path / "a.svg")


def test_no_baseline_without_a_hybrid_or_with_several_needles(windowed, made):
    assert plots.window_baseline(made, "niah_single_2") == {}
    assert plots.window_baseline(windowed, "niah_multivalue") == {}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("target", "target"),
        ("partial", "partial"),
        ("distractor:1", "last distractor"),
        ("distractor:2", "second to last"),
        ("distractor:17", "earlier distractor"),
        ("distractor", "earlier distractor"),
        ("nothing", "nothing"),
        ("other", "other"),
        ("scored", ""),
        ("<script>", ""),
    ],
)
def test_outcomes_are_sorted_by_recency(outcome, expected):
    assert retrieved.category(outcome) == expected


def test_what_was_retrieved_sums_to_everything(made, tmp_path):
    table = retrieved.shares(made)
    assert table.sum(axis=1).to_numpy() == pytest.approx(1)
    rows = made.frame[(made.frame["model"] == "synthetic-kda") & (made.frame["length"] == 4096)]
    twice = dataclasses.replace(made, frame=pd.concat([made.frame, made.frame.assign(metric="value", outcome="other")]))
    assert retrieved.shares(twice).equals(table)
    (share,) = table.xs("synthetic-kda", level="model").xs(4096, level="length")["target"]
    assert share == (rows["outcome"] == "target").mean()
    retrieved.plot(made, [tmp_path / "a.svg"])
    assert {"target", "nothing", "share (%)", "MV-NIAH"} <= set(texts(tmp_path / "a.svg"))
    retrieved.plot(made, [tmp_path / "b.svg"], task="niah_single_1")
    assert "MV-NIAH" not in texts(tmp_path / "b.svg")
    with pytest.raises(DataError, match="do not say what was retrieved"):
        retrieved.plot(dataclasses.replace(made, frame=made.frame.assign(outcome="")), [tmp_path / "c.svg"])


LOG = """{"kind": "train", "step": 50, "tokens": 800000, "loss": 2.5, "answer_tokens": 0.25}
{"kind": "held-out", "name": "essay-4", "step": 50, "loss": 1.5, "exact": 0.125}
{"kind": "held-out", "name": "text", "step": 50, "loss": 3.0, "exact": null}
{"kind": "train", "step": 100, "tokens": 1600000, "loss": 1.25, "answer_tokens": null}
{"kind": "train", "step": 150, "tok"""


def test_training_curves_are_those_of_the_log(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text(LOG)
    log = training.read(tmp_path / "mine" / "log.jsonl")
    assert (log.name, log.loss, log.answers) == ("mine", [(0.8, 2.5), (1.6, 1.25)], [(0.8, 25.0)])
    assert log.held_out == {"essay-4, exact (%)": [(0.8, 12.5)], "text, loss": [(0.8, 3.0)]}
    training.plot([log, dataclasses.replace(log, name="other")], [tmp_path / "a.svg"])
    assert {"training loss", "mine", "other", "million tokens", "text, loss"} <= set(texts(tmp_path / "a.svg"))


def test_the_shipped_logs_can_be_drawn(root):
    logs = sorted((root / "gdn2" / "zoo").glob("*/training.jsonl"))
    assert logs and all(training.read(log).loss for log in logs)


@pytest.mark.parametrize("content", ["", "{\n", '{"kind": "train"}\n', "[]\n", '{"kind": "train", "tokens": 1'])
def test_a_log_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(DataError, match="^cannot read .{1,200}as a training log|holds no steps"):
        training.read(tmp_path / "log.jsonl")
