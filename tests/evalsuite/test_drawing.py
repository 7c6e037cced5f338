"""What figures are made of: sizes, looks, axes, files that are the same every time, the numbers behind the lines."""

import dataclasses
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.reports import drawing, plots, retrieved
from gdn2.errors import DataError, StorageError, UserError
from tests.evalsuite.test_cells import records, row, run_of


@pytest.mark.parametrize(
    ("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 4, 2), (9, 4, 3)]
)
def test_panels_fill_a_grid_row_by_row(count, across, down):
    figure, axes = drawing.panels(count)
    assert len(axes) == count and drawing.columns(count) == across
    places = [ax.get_subplotspec() for ax in axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places] == [divmod(i, across) for i in range(count)]
    width, height = figure.get_size_inches()
    assert width == pytest.approx(drawing.PANEL[0] * max(across, 2)) and height == pytest.approx(1.45 * down + 0.2)


def test_axes_are_named_once_a_row_and_once_below():
    figure, axes = drawing.panels(5)
    drawing.name_axes(figure, axes, "accuracy (%)")
    assert [ax.get_ylabel() for ax in axes] == ["accuracy (%)", "", "", "", "accuracy (%)"]
    assert figure.get_supxlabel() == "context length (tokens)"


def test_lines_can_be_told_apart():
    looks = [tuple(map(str, drawing.look(n).values())) for n in range(35)]
    assert len(set(looks)) == len(looks)
    assert all(a[0] != b[0] and a[1] != b[1] and a[2] != b[2] for a, b in zip(looks, looks[1:], strict=False))


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from([1 << n for n in range(7, 21)] + [1536, 3000]), min_size=1))
def test_an_axis_names_at_most_six_lengths_and_shows_all(lengths):
    figure, (ax,) = drawing.panels(1)
    drawing.length_axis(ax, [*lengths, *lengths])
    ticks = [round(t) for t in ax.get_xticks()]
    assert 1 <= len(ticks) <= 6 and set(ticks) <= lengths and ticks[0] == min(lengths)
    low, high = ax.get_xlim()
    assert low < min(lengths) and max(lengths) < high


def test_a_legend_is_one_for_all_panels_without_repetition():
    figure, axes = drawing.panels(2)
    for ax in axes:
        for n in range(3):
            ax.plot([0, 1], [n, n], label=f"model {n}")
    before = figure.get_size_inches()[1]
    drawing.legend(figure, axes)
    (made,) = figure.legends
    assert [text.get_text() for text in made.get_texts()] == ["model 0", "model 1", "model 2"]
    assert figure.get_size_inches()[1] == pytest.approx(before + 0.15 * 2 + 0.05)
    bare, (ax,) = drawing.panels(1)
    drawing.legend(bare, [ax])
    assert not bare.legends


@pytest.mark.parametrize("name", ["a.png", "a.SVG", "new/place/a.pdf"])
def test_a_figure_is_the_same_bytes_every_time(tmp_path, name):
    digests = set()
    for _ in range(2):
        with drawing.style():
            figure, (ax,) = drawing.panels(1)
            ax.plot([1, 2], [3, 4])
            drawing.save(figure, [tmp_path / name])
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [name.rpartition("/")[2]]


def test_files_of_no_format_and_places_that_are_none_are_refused(tmp_path):
    for name in ("a.gif", "a", "a.png.txt", ".png"):
        with pytest.raises(UserError, match="must end in .png, .svg, .pdf"):
            drawing.check_files([tmp_path / "good.png", tmp_path / name])
    (tmp_path / "file").write_text("")
    figure, _ = drawing.panels(1)
    with pytest.raises(StorageError, match="cannot write"):
        drawing.save(figure, [tmp_path / "file" / "a.svg"])


def test_the_style_does_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with drawing.style():
        assert matplotlib.rcParams["font.size"] != before["font.size"] or dict(matplotlib.rcParams) != before
    assert dict(matplotlib.rcParams) == before


HYBRID = run_of(family="hybrid", details={"config": {"mixers": {"a": {"mixer": "attention", "window": 512}}}})


def test_what_a_window_alone_would_find_is_worked_out_by_hand():
    """A needle at depth d of P tokens is (1 - d) P tokens from the end: seen where that is within the window."""
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = [
        row(family="hybrid", depth=depth, length=length, prompt_tokens=length - 24, sample_id=f"{i}")
        for length in (1024, 4120)
        for i, depth in enumerate(depths)
    ]
    made = records(*rows, runs={"r": HYBRID})
    # Of 1000 tokens: 1000, 750, 500, 250, 0 from the end. Of 4096: 4096, 3072, 2048, 1024, 0.
    assert plots.window_baseline(made, "niah_single_2") == {512: {1024: 0.6, 4120: 0.2}}
    assert plots.window_baseline(made, "niah_multiquery") == {} and plots.window_baseline(made, "vt") == {}
    edge = records(row(family="hybrid", depth=0.0, prompt_tokens=512), runs={"r": HYBRID})
    assert plots.window_baseline(edge, "niah_single_2") == {512: {1024: 1.0}}
    assert plots.window_baseline(records(*rows), "niah_single_2") == {}
    unknown = records(*(one | {"depth": None} for one in rows), runs={"r": HYBRID})
    assert plots.window_baseline(unknown, "niah_single_2") == {}


@pytest.mark.parametrize(
    ("outcome", "place"),
    [
        ("target", "target"), ("partial", "partial"), ("other", "other"), ("nothing", "nothing"), ("", ""),
        ("distractor:1", "last distractor"), ("distractor:2", "second to last"), ("distractor:3", "earlier distractor"),
        ("distractor:12", "earlier distractor"), ("distractor", "earlier distractor"), ("distractor:", ""),
        ("distractor:x", ""), ("distractor:1 ", ""), ("scored", ""), ("Target", ""),
    ],
)  # fmt: skip
def test_outcomes_have_a_place_among_the_looks(outcome, place):
    assert retrieved.category(outcome) == place and (not place or place in retrieved.LOOKS)


def test_shares_of_what_was_retrieved_add_up_to_one():
    outcomes = ["target", "target", "distractor:1", "distractor:7", "nothing", "scored"]
    rows = [row(outcome=outcome, sample_id=str(i)) for i, outcome in enumerate(outcomes)]
    again = dict(rows[0]) | {"metric": "value_rank", "outcome": "other"}  # of a sample the first metric tells
    (shares,) = retrieved.shares(records(*rows, again)).to_dict("records")
    assert shares == {
        "target": 0.4, "partial": 0.0, "last distractor": 0.2, "second to last": 0.0, "earlier distractor": 0.2,
        "other": 0.0, "nothing": 0.2,
    }  # fmt: skip
    assert list(shares) == list(retrieved.LOOKS)
    for silent in (row(outcome="scored"), row(length=0)):
        with pytest.raises(DataError, match="do not say what was retrieved"):
            retrieved.shares(records(silent))


def test_a_panel_shows_what_was_asked_and_hatches_what_is_few(tmp_path):
    rows = [row(depth=(i % 20) / 20, sample_id=str(i), score=float(i % 2)) for i in range(40)]
    plots.depth_heatmap(records(*rows), [tmp_path / "a.svg"], bins=2)
    assert "hatched" not in (tmp_path / "a.svg").read_text(encoding="utf-8")
    plots.depth_heatmap(records(*rows), [tmp_path / "b.svg"], bins=10)
    assert "hatched: fewer than 10 samples" in (tmp_path / "b.svg").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="no needle depths"):
        plots.depth_heatmap(records(*(one | {"depth": None} for one in rows)), [tmp_path / "c.svg"])
    with pytest.raises(DataError, match="no task with lengths"):
        plots.accuracy(dataclasses.replace(records(row(length=0))), [tmp_path / "c.svg"])
    assert not (tmp_path / "c.svg").exists()
