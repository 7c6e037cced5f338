"""The published figures are carried over exactly and agree with themselves."""

import json
import tomllib

import pytest

from evalsuite.reports import paper

ITEMS = ("table2", "table3", "table4", "table5", "figure2")


def test_every_figure_equals_the_transcription(shared):
    whole = json.loads((shared / "paper" / "paper_tables.json").read_text(encoding="utf-8"))
    for item in ITEMS:
        theirs, ours = whole[item], paper.load(item)
        family = "hybrid" if item == "figure2" else "recurrent"
        rows = {f: theirs[f] for f in ("recurrent", "hybrid") if f in theirs} or {family: theirs["rows"]}
        assert ours.rows == rows
        assert list(ours.columns) == theirs["columns"]
        assert ours.title == theirs["title"]
    assert "2605.22791" in paper.load("table2").source


@pytest.mark.parametrize(
    ("item", "left_out"), [("table2", {"wikitext_ppl", "lambada_ppl", "avg"}), ("table4", {"avg"})]
)
def test_the_printed_averages_follow_from_the_cells(item, left_out):
    table = paper.load(item)
    models = [cells for family in table.rows.values() for cells in family.values()]
    assert len(models) == 13
    for cells in models:
        averaged = [cells[c] for c in table.columns if c not in left_out]
        assert sum(averaged) / len(averaged) == pytest.approx(cells["avg"], abs=0.005 + 1e-9)


def test_the_ablations_repeat_the_figures_of_the_main_tables():
    base = paper.load("table5").rows["recurrent"]["gdn2 (b in [0,1])"]
    main, ruler, recall = (paper.load(item).rows["recurrent"]["gdn2"] for item in ("table2", "table3", "table4"))
    assert (base["wikitext_ppl"], base["common_avg"]) == (main["wikitext_ppl"], main["avg"])
    assert base["s_niah_2@4096"] == ruler["s_niah_2@4096"]
    assert base["recall_avg"] == recall["avg"]


def test_ruler_scores_use_the_names_of_the_tasks_here():
    scores = paper.ruler_scores()
    assert len(scores) == 13 * 14
    assert scores["recurrent", "gdn2", "niah_single_2", 8192] == 39.2
    assert scores["hybrid", "transformer", "niah_multikey_1", 1024] == 75.6


def test_an_installed_package_reads_the_copy_beside_it(root, tmp_path, monkeypatch):
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["results/paper"] == "evalsuite/reports/paper"
    installed = tmp_path / "evalsuite" / "reports"
    (installed / "paper").mkdir(parents=True)
    monkeypatch.setattr(paper, "__file__", str(installed / "paper.py"))
    assert paper.directory() == installed / "paper"
