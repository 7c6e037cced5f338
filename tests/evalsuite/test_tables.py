"""Tables from records: exact for fixed records, and never two different things in one cell."""

import dataclasses
import io
import math
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from evalsuite import stats
from evalsuite.reports import cells, files, formats, frame, tables
from gdn2.errors import DataError, UserError


@pytest.fixture(scope="module")
def made(synthetic):
    return frame.load([synthetic.HOME], texts=["target"])


def build(rows, **options):
    return tables.build(frame.from_rows(map(dataclasses.asdict, rows)), **options)


@pytest.fixture
def rows(synthetic):
    """16 records each of S-NIAH-1 at 1K and 2K, one model."""
    return [r for r in synthetic.records(synthetic.MODELS[0]) if r.task == "niah_single_1" and r.length <= 2048]


def test_fixed_records_are_what_the_generator_writes(synthetic, tmp_path):
    synthetic.write(tmp_path)
    for path in sorted(p for p in synthetic.HOME.rglob("*") if p.is_file()):
        assert (tmp_path / path.relative_to(synthetic.HOME)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("published", ["matched", "all"])
@pytest.mark.parametrize("suffix", [".md", ".tex", ".csv"])
def test_fixed_records_give_the_exact_tables(synthetic, made, published, suffix):
    name = {"matched": "table", "all": "table-all"}[published] + suffix
    table = tables.build(made, published)
    assert formats.render(table, files.SUFFIXES[suffix]) == (synthetic.HOME / name).read_text(encoding="utf-8")
    formats.check(table, synthetic.HOME / name)


def test_fixed_records_give_the_exact_terminal_text(synthetic, made):
    assert formats.terminal(tables.build(made)) == (synthetic.HOME / "table.txt").read_text(encoding="utf-8")


def test_cells_are_means_with_intervals_of_their_records(made):
    summed = cells.summary(made)
    assert len(summed) == 13 + 4 + 4
    for cell in summed.to_dict("records"):
        wanted = made.frame
        for name in ("model", "task", "length"):
            wanted = wanted[wanted[name] == cell[name]]
        expected = stats.interval(wanted["score"].to_numpy())
        assert (cell["mean"], cell["low"], cell["high"], cell["n"]) == (
            expected.mean,
            expected.low,
            expected.high,
            len(wanted),
        )
        assert cell["method"] == ("bootstrap" if cell["task"] == "niah_multivalue" else "wilson")
        assert cell["prompt_min"] == wanted["prompt_tokens"].min()


def test_partial_cells_are_marked_with_their_counts(made):
    table = tables.build(made)
    partial = {
        (row.name, column.task, column.length): (cell.n, cell.asked, cell.errors)
        for row in table.rows
        for cell, column in zip(row.cells, table.columns, strict=True)
        if cell and cell.partial
    }
    assert partial == {
        ("synthetic-kda", "niah_single_2", 8192): (15, 16, 1),
        ("synthetic-gdn2-h", "niah_multikey_1", 4096): (11, 16, 0),
    }
    assert "n=15/16" in formats.terminal(table)
    assert formats.markdown(table).count("†") == 3


def test_a_cell_of_errors_alone_shows_as_empty_and_partial(rows):
    failed = [dataclasses.replace(r, score=None, error="x") for r in rows if r.length == 2048]
    table = build([r for r in rows if r.length == 1024] + failed, published="none")
    cell = table.rows[0].cells[1]
    assert (cell.value, cell.n, cell.asked, cell.errors) == (None, 0, 16, 16)
    for text in (formats.terminal(table), formats.markdown(table)):
        assert "–†" in text
        assert "n=0/16" in text
    assert "nan" not in formats.to_csv(table) + formats.latex(table)


def test_published_figures_have_columns_of_their_own(made):
    table = tables.build(made, "all")
    for row in table.rows:
        for cell, column in zip(row.cells, table.columns, strict=True):
            if cell and column.source == "published":
                assert math.isnan(cell.low)
                assert cell.n == 0
    read = pd.read_csv(io.StringIO(formats.to_csv(table)))
    ours = read[read["model"] == "synthetic-gdn2"].set_index(["task", "length"])
    assert ours.loc[("niah_single_2", 8192), "published_percent"] == 39.2
    assert ours.loc[("niah_single_2", 8192), "measured_percent"] == 37.5
    paper_only = read[read["model"] == "mamba3_mimo"]
    assert len(paper_only) == 2 * 11
    assert paper_only["measured_percent"].isna().all()
    assert not [c for c in tables.build(made, "none").columns if c.source == "published"]


def test_csv_opens_in_pandas_with_numbers_as_numbers(made):
    read = pd.read_csv(io.StringIO(formats.to_csv(tables.build(made))))
    assert tuple(read.columns) == formats.CSV_COLUMNS
    numbers = ["measured_percent", "low", "high", "n", "asked", "errors", "prompt_tokens_mean", "published_percent"]
    assert all(pd.api.types.is_numeric_dtype(read[name]) for name in numbers)


def test_different_question_sets_never_share_a_column(rows):
    other = [dataclasses.replace(r, protocol="lm-eval", key=r.key[::-1]) for r in rows]
    table = build(rows + other, published="none")
    assert [(c.length, c.variant) for c in table.columns] == [
        (1024, (("protocol", "exact"),)),
        (2048, (("protocol", "exact"),)),
        (1024, (("protocol", "lm-eval"),)),
        (2048, (("protocol", "lm-eval"),)),
    ]
    assert "S-NIAH-1 (lm-eval)" in formats.terminal(table)
    assert "`(lm-eval)`" in formats.markdown(table)


@pytest.mark.parametrize(("column", "value"), [("data", "f" * 64), ("metric", "exact_match"), ("task_version", 2)])
def test_data_metrics_and_versions_are_told_apart(rows, column, value):
    other = [dataclasses.replace(r, run_id="other", key=r.key[::-1], **{column: value}) for r in rows]
    table = build(rows + other, published="none")
    assert len(table.columns) == 4
    assert {name for c in table.columns for name, _ in c.variant} == {column}


def test_checkpoints_of_one_name_have_rows_of_their_own(rows):
    other = [dataclasses.replace(r, checkpoint="e" * 64, key=r.key[::-1], score=0.0) for r in rows]
    table = build(rows + other, published="none")
    assert [row.name for row in table.rows] == [f"synthetic-gdn2 @{rows[0].checkpoint[:8]}", "synthetic-gdn2 @eeeeeeee"]


def test_runs_that_asked_the_same_samples_have_rows_of_their_own(rows):
    short = [r for r in rows if r.length == 1024]
    other = [dataclasses.replace(r, run_id="synthetic-gdn2-2", key=r.key[::-1], score=0.0) for r in short]
    failed = dataclasses.replace(rows[-1], run_id="synthetic-gdn2-2", key="f" * 32, score=None, error="x")
    table = build([*other, *rows, failed], published="none")
    assert [row.name for row in table.rows] == ["synthetic-gdn2", "synthetic-gdn2-2"]
    means = [[cell and cell.value for cell in row.cells] for row in table.rows]
    assert means == [[100.0, 100.0], [0.0, None]]
    assert table.rows[1].cells[1].errors == 1
    assert any("named after the run" in note.text for note in table.notes)


def test_runs_of_different_samples_share_a_row(rows):
    other = [dataclasses.replace(r, run_id="more") if r.length == 2048 else r for r in rows]
    assert build(other, published="none").rows == build(rows, published="none").rows


def test_seeds_are_pooled_and_named(rows):
    other = [dataclasses.replace(r, seed=7, key=r.key[::-1], run_id="seed-7") for r in rows]
    table = build(rows + other, published="none")
    assert [cell.n for cell in table.rows[0].cells] == [32, 32]
    assert any(note.text == "Seeds: 7, 42." for note in table.notes)


@pytest.mark.parametrize(("metric", "score"), [("word_perplexity", 17.5), ("value_rank", 1.0), ("value_logprob", 0.0)])
def test_scores_that_are_no_shares_are_left_out_and_named(rows, metric, score):
    """Whatever their values: a rank that is always 1 is not 100 %."""
    other = [dataclasses.replace(r, metric=metric, score=score) for r in rows]
    table = build(rows + other, published="none")
    assert len(table.columns) == 2
    assert any(note.values == (metric,) for note in table.notes)


def test_a_task_without_lengths_has_one_column(rows):
    short = [dataclasses.replace(r, task="piqa", length=None, metric="acc") for r in rows[:16]]
    text = formats.markdown(build(short, published="none"))
    assert "| model | family | size | score |" in text


def test_what_is_significantly_worse_is_marked(rows):
    """Paired tests within a family and column; another family's model is not compared."""
    worse = [
        dataclasses.replace(r, model="worse", checkpoint="w" * 64, run_id="w", key=r.key[::-1], score=0.0) for r in rows
    ]
    apart = [dataclasses.replace(r, model="apart", family="hybrid", key=f"{r.key[1:]}h", run_id="a") for r in worse]
    records = frame.from_rows(map(dataclasses.asdict, rows + worse + apart), texts=["target"])
    table = tables.build(records, "none")
    marks = {row.name: [cell.mark for cell in row.cells] for row in table.rows}
    assert marks == {"synthetic-gdn2": ["", ""], "worse": ["*", "*"], "apart": ["", ""]}
    assert "0.0*" in formats.terminal(table)
    assert r"0.0\*" in formats.markdown(table)
    assert r"0.0$^{\ast}$" in formats.latex(table)
    assert any("Holm" in note.text for note in table.notes)
    # Without targets nobody knows that the questions were the same.
    assert not [c for row in build(rows + worse, published="none").rows for c in row.cells if c.mark]


def test_rows_stand_by_family_then_mixer(made):
    names = [(row.family, row.mixer) for row in tables.build(made, "all").rows]
    assert [family for family, _ in names] == ["recurrent"] * 6 + ["hybrid"] * 7
    assert [m for f, m in names if f == "hybrid"][0] == "transformer"
    assert names[-1] == ("hybrid", "gdn2")


def test_order_and_run_of_the_records_do_not_matter(synthetic, made):
    rows = [r for model in synthetic.MODELS for r in synthetic.records(model)]
    forward, backward = (build(order) for order in (rows, rows[::-1]))
    assert formats.markdown(forward) == formats.markdown(backward)
    assert repr(forward.rows) == repr(backward.rows)  # nan, which equals nothing, among the published figures' counts


@pytest.mark.parametrize(
    ("length", "label"),
    [(0, ""), (512, "512"), (1000, "1000"), (1024, "1K"), (1536, "1.5K"), (131072, "128K"), (1 << 20, "1M")],
)
def test_lengths_for_people(length, label):
    assert cells.length_label(length) == label


def test_narrow_terminals_get_published_figures_below(made):
    wide, narrow = (formats.terminal(tables.build(made), width) for width in (120, 80))
    assert "S-NIAH-2, published" in narrow
    assert "published" not in re.sub(r"\(published\)", "", wide)
    assert max(map(len, narrow.splitlines())) <= 80


def test_check_names_the_first_line_that_differs(made, tmp_path):
    path = tmp_path / "deep" / "table.md"
    table = tables.build(made)
    formats.write(table, path)
    formats.check(table, path)
    path.write_text(path.read_text().replace("37.5", "99.9"))
    with pytest.raises(DataError, match="table.md is not what the records give: line 15 differs"):
        formats.check(table, path)
    with pytest.raises(DataError, match="cannot read"):
        formats.check(table, tmp_path / "none.md")


def test_an_unknown_suffix_is_one_line():
    with pytest.raises(UserError, match=r"^table file 'table.docx' must end in .md, .tex, .csv$"):
        files.format_of(Path("table.docx"))


def test_a_run_file_that_does_not_say_what_was_asked_is_one_line(made):
    broken = dataclasses.replace(made, runs={"r": {"invocations": [{}]}})
    with pytest.raises(DataError, match="run.json of r does not say what was asked"):
        tables.build(broken)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs and graphicx")
@pytest.mark.parametrize("name", ["table.tex", "table-all.tex"])
def test_latex_compiles(synthetic, tmp_path, name):
    body = (synthetic.HOME / name).read_text(encoding="utf-8")
    document = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n" + body + "\\end{document}\n"
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 10_000
