"""The paper's tables from records: exact for fixed records, averages as the paper forms them, nothing mixed."""

import dataclasses
import io
import math
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from evalsuite.reports import cells, gridformats, paper, papertables
from evalsuite.reports.grid import Figure
from gdn2.errors import UserError

FORMS = {"text": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv"}


@pytest.fixture(scope="module")
def made(paperlike):
    return paperlike.records()


@pytest.fixture(scope="module")
def grids(paperlike):
    return paperlike.grids()


def line(grid, label):
    (found,) = [x for x in grid.lines if x.labels[1].startswith(label)]
    return dict(zip([head.key for head in grid.heads], found.cells, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_fixed_records_give_the_exact_tables(paperlike, grids, form):
    for name, grid in grids.items():
        expected = (paperlike.HOME / f"{name}{FORMS[form]}").read_text(encoding="utf-8")
        assert gridformats.RENDER[form](grid) == expected, name


def test_a_cell_is_the_mean_of_its_records(made, grids):
    rows = made.frame[(made.frame["model"] == "toy-gdn2") & (made.frame["task"] == "piqa")]
    cell = line(grids["table2"], "toy-gdn2 ")["piqa_acc"]
    assert cell.value == pytest.approx(100 * rows["score"].mean())
    assert (cell.n, cell.asked, cell.place) == (24, 24, 1)
    assert line(grids["table2"], "toy-gdn2 ")["piqa_acc_difference"].value == pytest.approx(cell.value - 72.80)


def test_perplexity_is_the_exponential_of_the_weighted_mean(made, grids):
    rows = made.frame[(made.frame["model"] == "toy-kda") & (made.frame["task"] == "wikitext")]
    cell = line(grids["table2"], "toy-kda")["wikitext_ppl"]
    assert cell.value == pytest.approx(math.exp(np.average(rows["score"], weights=rows["weight"])))
    assert cell.low < cell.value < cell.high


def test_less_perplexity_is_better(grids):
    wiki = {label: line(grids["table2"], label)["wikitext_ppl"] for label in ("toy-gdn2 ", "toy-kda", "toy-gdn2-neg")}
    assert min(wiki.values(), key=lambda c: c.value).place == 1
    assert max(wiki.values(), key=lambda c: c.value).place == 0
    assert wiki["toy-kda"].mark == "*"


def test_averages_are_formed_as_the_paper_forms_them(grids):
    cells_of = line(grids["table2"], "toy-gdn2 ")
    nine = [cells_of[name].value for name in paper.NINE]
    assert cells_of["avg"].value == pytest.approx(sum(nine) / 9)
    assert cells_of["avg"].low < cells_of["avg"].value < cells_of["avg"].high
    derived = line(grids["table5"], "toy-gdn2 ")
    recall = line(grids["table4"], "toy-gdn2 ")
    assert derived["common_avg"] == dataclasses.replace(cells_of["avg"], place=derived["common_avg"].place)
    assert derived["recall_avg"].value == recall["avg"].value
    assert derived["s_niah_2@4096"].value == line(grids["table3"], "toy-gdn2 ")["s_niah_2@4096"].value


@pytest.mark.parametrize("item", ["table2", "table4"])
def test_the_papers_own_averages_follow_from_its_cells(paperlike, made, item):
    """A model that scores what the paper prints is given the paper's average."""
    source = paper.load(item)
    for family, models in source.rows.items():
        for name, printed in models.items():
            figures = {c: Figure(value) for c, value in printed.items() if c != "avg"}
            rows = {c: pd.DataFrame({"score": [printed[c] / 100] * 2, "weight": [1.0, 1.0]}) for c in figures}
            model = papertables.Model(family, name, name, 0, (), figures, rows)
            papertables._average(model, {"avg": paper.column(item, "avg")})
            assert model.figures["avg"].value == pytest.approx(printed["avg"], abs=0.005 + 1e-9)


def test_the_interval_of_an_average_covers_it(made, paperlike):
    rng = np.random.default_rng(3)
    truth, hits = np.array([0.3, 0.6, 0.9, 0.5]), 0
    names = paper.NINE[:4]
    for _ in range(60):
        scores = {c: rng.random(80) < p for c, p in zip(names, truth, strict=True)}
        rows = {c: pd.DataFrame({"score": s, "weight": 1.0}) for c, s in scores.items()}
        figures = {c: Figure(100 * float(r["score"].mean()), n=80, asked=80) for c, r in rows.items()}
        model = papertables.Model("recurrent", "x", "x", 0, (), figures, rows)
        papertables._average(model, {"avg": paper.Column("", "", mean_of=names)})
        hits += model.figures["avg"].low <= 100 * truth.mean() <= model.figures["avg"].high
    assert hits >= 52


def test_cells_without_data_are_empty_and_partial_ones_marked(grids):
    kda, attention = line(grids["table2"], "toy-kda"), line(grids["table2"], "toy-attention")
    assert kda["boolq_acc"] is None
    assert kda["avg"] is None
    assert kda["boolq_acc_published"].value == 60.67
    assert (attention["piqa_acc"].n, attention["piqa_acc"].asked, attention["piqa_acc"].place) == (11, 24, 0)
    assert attention["avg"].partial
    text = gridformats.terminal(grids["table2"])
    assert "36.36†" in text
    assert "n=11/24" in text


def test_measured_and_published_never_share_a_column(grids):
    for item in papertables.TABLES:
        grid = grids[item]
        for i, head in enumerate(grid.heads):
            column = [x.cells[i] for x in grid.lines if x.cells[i]]
            if head.key.endswith("_published"):
                assert all(cell.n == 0 and math.isnan(cell.low) for cell in column)
            elif head.key.endswith("_difference"):
                assert head.signed
            else:
                assert all(not math.isnan(cell.low) for cell in column)


def test_models_stand_where_the_paper_lists_their_kind(grids):
    listed = {x.labels[1].split(" ")[0]: (x.section, x.labels[0]) for x in grids["table3"].lines if x.labels[1]}
    assert listed["toy-mamba3-h"] == ("hybrid", "mamba3_mimo")
    assert listed["toy-attention"] == ("hybrid", "transformer")
    assert listed["toy-gdn2-neg"] == ("recurrent", "gdn2_neg_eigval (b in [0,2])")
    assert [x.labels[0] for x in grids["table3"].lines][:2] == ["mamba2", "gdn"]
    ablations = {x.labels[0]: x.labels[1] for x in grids["table5"].lines}
    assert len(ablations) == 4
    assert ablations["gdn2 (b in [0,1])"].startswith("toy-gdn2 ")
    assert ablations["gdn2_scalar_erase (w-only: scalar b, channel w)"] == ""


@pytest.mark.parametrize(
    ("family", "mixer", "options", "expected"),
    [
        ("recurrent", "mamba3", {"mixer": "mamba3"}, "mamba3_siso"),
        ("recurrent", "mamba3", {"mixer": "mamba3", "rank": 4}, "mamba3_mimo"),
        ("recurrent", "mamba3", {"mixer": "mamba3", "rank": None}, "mamba3_siso"),
        ("recurrent", "mamba3_mimo", {"mixer": "mamba3", "rank": 4}, "mamba3_mimo"),
        ("hybrid", "gdn2", {"mixer": "gdn2", "scalar_write": True}, "gdn2_scalar_write (b-only: channel b, scalar w)"),
        ("hybrid", "gdn2", {"mixer": "gdn2", "scalar_write": False, "erase_max": 1}, "gdn2"),
        ("recurrent", "deltanet", {"mixer": "deltanet"}, "deltanet"),
    ],
)
def test_aliases(family, mixer, options, expected):
    assert paper.alias(family, mixer, {"layer": options}) == (family, expected)
    assert paper.alias("recurrent", "mamba3", {}) == ("recurrent", "mamba3")
    for name in ("attention", "transformer"):
        assert paper.alias("transformer", name, {}) == ("hybrid", "transformer")


def test_published_figures_can_be_left_out_or_matched(made):
    none = papertables.build("table3", made, "none")
    assert [head.key for head in none.heads] == list(paper.load("table3").columns)
    assert len(none.lines) == 5
    matched = papertables.build("table3", made, "matched")
    assert all(x.labels[1] for x in matched.lines)
    assert line(matched, "toy-kda")["s_niah_2@4096_published"].value == 89.0


def test_question_sets_never_share_a_column(made):
    frame = made.frame.copy()
    other = frame[(frame["model"] == "toy-kda") & (frame["task"] == "piqa")].index
    frame["protocol"] = frame["protocol"].cat.add_categories("lm-eval")
    frame.loc[other, "protocol"] = "lm-eval"
    with pytest.raises(UserError, match=r"piqa differ in protocol \(exact and lm-eval\).*--where protocol=exact"):
        papertables.build("table2", dataclasses.replace(made, frame=frame))


def test_records_of_other_tasks_leave_the_measured_columns_empty(made):
    only = dataclasses.replace(made, frame=made.frame[made.frame["task"] == "piqa"])
    grid = papertables.build("table4", only)
    assert not any(x.labels[1] for x in grid.lines)
    assert len(grid.lines) == 13


def test_every_column_of_the_paper_has_a_source():
    for item in papertables.TABLES:
        for name in paper.load(item).columns:
            column = paper.column(item, name)
            assert column.task or all(paper.COLUMNS[part].task for part in column.mean_of)


def test_csv_opens_in_pandas_and_names_the_runs(grids):
    read = pd.read_csv(io.StringIO(gridformats.to_csv(grids["table2"])))
    ours = read[read["measured here"].notna()].set_index("measured here")
    assert ours.loc["toy-gdn2 1.2M", "runs"] == "toy-gdn2-run"
    assert ours.loc["toy-gdn2 1.2M", "piqa_acc_n"] == 24
    assert pd.api.types.is_numeric_dtype(read["avg_low"])
    assert len(read) == 14


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs and graphicx")
def test_latex_compiles(paperlike, tmp_path):
    bodies = "\n\\clearpage\n".join(p.read_text(encoding="utf-8") for p in sorted(paperlike.HOME.glob("*.tex")))
    head = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(head + bodies + "\\end{document}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert cells.size_label(1_300_000_000) == "1.3B"


def test_every_source_is_a_task_of_the_package():
    import tasks

    for column in paper.COLUMNS.values():
        if column.task:
            assert column.task in tasks.names()
            assert tasks.get(column.task).has_lengths == bool(column.length)
