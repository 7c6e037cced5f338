"""The commands `tables` and `plot`: what they print, write and refuse."""

import io

import pandas as pd
import pytest

from evalsuite.reports import actions
from gdn2.errors import DataError, UserError


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def tables(synthetic, warnings):
    def call(out=None, form="text", check=False, runs=None, where=(), **shape):
        output = actions.Output(out, form, check)
        return actions.tables(runs or [synthetic.HOME], actions.Shape(**shape), where, output, warnings.append)

    return call


@pytest.mark.parametrize(("form", "name"), [("markdown", "table.md"), ("latex", "table.tex"), ("csv", "table.csv")])
def test_tables_are_printed_in_every_format(synthetic, tables, form, name):
    assert tables(form=form) + "\n" == (synthetic.HOME / name).read_text(encoding="utf-8")


def test_text_fits_the_terminal(tables, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, tables().splitlines())) <= 80
    assert "S-NIAH-2, published" in tables()


def test_a_table_is_written_then_checked(tables, tmp_path):
    out = tmp_path / "new" / "table.csv"
    assert tables(out) == f"wrote {out}"
    before = out.read_bytes()
    assert tables(out, check=True) == f"{out} is what the records give"
    out.write_bytes(before + b"more\n")
    with pytest.raises(DataError, match="is not what the records give"):
        tables(out, check=True)
    assert out.read_bytes() == before + b"more\n"


def test_wrong_options_are_refused_by_name(tables, tmp_path):
    wrong = [
        ({"form": "pdf"}, "format 'pdf' is unknown"),
        ({"published": "some"}, "published 'some' is unknown"),
        ({"check": True}, "name it with --out"),
        ({"out": tmp_path / "t.txt"}, "must end in .md, .tex, .csv"),
        ({"effective": True, "down": "model"}, "rows and columns of its own"),
        ({"down": "modl"}, "column 'modl' is unknown; did you mean model"),
        ({"where": ["task"]}, "filter 'task' is not NAME=VALUE"),
        ({"where": ["tsk=x"]}, "column 'tsk' is unknown; did you mean task"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            tables(**options)
    assert not list(tmp_path.iterdir())


def test_results_is_the_default_place(tmp_path, monkeypatch, synthetic, warnings):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no records at 'results'"):
        actions.tables([], actions.Shape(), [], actions.Output(), warnings.append)
    (tmp_path / "results").symlink_to(synthetic.HOME)
    assert "synthetic-kda" in actions.tables([], actions.Shape(), [], actions.Output(), warnings.append)


def test_damaged_records_are_named_then_counted(synthetic, tables, tmp_path, warnings):
    good = (synthetic.HOME / "runs" / "synthetic-kda" / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(good + "{}\n" * 30)
    tables(runs=[tmp_path])
    assert len(warnings) == actions.NAMED + 1
    assert "records.jsonl:65: damaged record" in warnings[0]
    assert warnings[-1] == "25 more damaged records are left out"


def test_a_file_that_holds_no_records_gives_no_table(tables, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("nothing\n")
    with pytest.raises(DataError, match="no scores within 0 to 1"):
        tables(runs=[path])


def test_plots_are_written_once_a_kind(synthetic, tmp_path, warnings):
    out = tmp_path / "figures"
    only = ["model=synthetic-gdn2", "task=niah_single_2", "length=1k", "length=2k"]
    said = actions.plot([synthetic.HOME], [], only, actions.Figures(out, "png, SVG,png"), warnings.append)
    names = [f"{name}.{kind}" for name in ("accuracy", "depth", "retrieved") for kind in ("png", "svg")]
    assert said.splitlines() == [f"wrote {out / name}" for name in names]
    assert sorted(p.name for p in out.iterdir()) == names


def test_every_task_has_a_plot_and_large_maps_are_parted(synthetic, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(actions, "PANELS", 2)
    tasks = ["niah_single_1", "niah_single_2"]
    records = actions.select(actions.load([synthetic.HOME], warnings.append), [f"task={task}" for task in tasks])
    names = [drawn.name for drawn in actions._of_records(records)]
    assert names == ["accuracy", *(f"{kind}-{task}" for kind in ("accuracy", "depth", "retrieved") for task in tasks)]


def test_figures_can_be_chosen_by_name(synthetic, tmp_path, warnings):
    asked = actions.Figures(tmp_path, "svg", "depth-niah_single_2, retrieved")
    said = actions.plot([synthetic.HOME], [], [], asked, warnings.append)
    assert said.splitlines() == [f"wrote {tmp_path / name}" for name in ("depth-niah_single_2.svg", "retrieved.svg")]
    with pytest.raises(UserError, match="figure 'dept' cannot be drawn from this; did you mean depth"):
        actions.plot([synthetic.HOME], [], [], actions.Figures(tmp_path, "svg", "dept"), warnings.append)


def test_a_log_alone_is_drawn_without_records(root, tmp_path, warnings):
    log = root / "gdn2" / "zoo" / "gdn2-tiny" / "training.jsonl"
    said = actions.plot([], [log], [], actions.Figures(tmp_path, "svg"), warnings.append)
    assert said == f"wrote {tmp_path / 'training.svg'}"


def test_nothing_to_draw_is_refused(synthetic, tmp_path, warnings):
    with pytest.raises(DataError, match="no records fit"):
        actions.plot([synthetic.HOME], [], ["task=piqa"], actions.Figures(tmp_path), warnings.append)


@pytest.mark.parametrize("kinds", ["gif", "", "png,,svg"])
def test_unknown_kinds_of_plots_are_refused(synthetic, tmp_path, warnings, kinds):
    with pytest.raises(UserError, match="plot format '.*' is unknown; known: pdf, png, svg"):
        actions.plot([synthetic.HOME], [], [], actions.Figures(tmp_path, kinds), warnings.append)


def test_any_columns_make_a_table(tables, tmp_path):
    text = tables(down="model,length", across="task", where=["task=niah_single_2", "length=4k", "length=1k"])
    rows = [line.split() for line in text.splitlines() if line.startswith("synthetic")]
    assert [row[:3] for row in rows] == [
        ["synthetic-gdn2", "1K", "100.0"],
        ["synthetic-gdn2", "4K", "62.5"],
        ["synthetic-gdn2-h", "1K", "100.0"],
        ["synthetic-gdn2-h", "4K", "75.0"],
        ["synthetic-kda", "1K", "100.0"],
        ["synthetic-kda", "4K", "43.8"],
    ]
    out = tmp_path / "t.csv"
    tables(out, down="model", across="task,length")
    assert tables(out, check=True, down="model", across="task,length").endswith("is what the records give")
    assert out.read_text().startswith("section,model,runs,niah_single_1/1024,niah_single_1/1024_low")


def test_scores_that_would_share_a_place_are_refused(tables):
    with pytest.raises(UserError, match="two scores fall on one place: they differ in length"):
        tables(down="model", across="task")


def test_a_filter_without_records_is_refused(tables):
    with pytest.raises(DataError, match="no records fit 'task=piqa'"):
        tables(where=["task=piqa"])


def test_filters_know_the_beginning_of_a_digest(tables, synthetic):
    whole = synthetic.digest("weights", "synthetic-kda")
    assert "synthetic-gdn2" not in tables(where=[f"checkpoint={whole[:7]}"])


def test_effective_lengths_are_given_in_both_definitions(tables):
    text = tables(effective=True)
    assert "85.6 %  " in text
    assert "85 % of own" in text
    assert "average of 4" in text
    assert "<1024" in text
    csv = tables(effective=True, form="csv")
    read = pd.read_csv(io.StringIO(csv)).set_index("model")
    signs = read[[name for name in read if name.endswith("_sign")]].stack()
    assert set(signs.dropna()) == {"<"}
    assert read.loc["synthetic-kda", "niah_single_2_absolute"] > 1024
    assert "$<$1024" in tables(effective=True, form="latex")
    short = ["task=niah_single_2", "length=1k", "length=2k"]
    assert "≥2048" in tables(effective=True, where=short)
    assert r"$\geq$2048" in tables(effective=True, where=short, form="latex")
    assert "&lt;" in tables(effective=True, form="markdown")
    with pytest.raises(DataError, match="at two lengths"):
        tables(effective=True, where=["length=1k"])


def test_runs_are_compared_by_path_and_by_id(synthetic, warnings, tmp_path):
    paths = [str(synthetic.HOME / "runs" / f"synthetic-{name}") for name in ("gdn2", "kda")]
    said = actions.compare(paths, tmp_path, [], actions.Output(), warnings.append)
    assert "synthetic-kda @" in said
    assert "p (Holm)" in said
    mixed = ["synthetic-gdn2", paths[1]]
    only = actions.compare(mixed, synthetic.HOME, ["length=8k"], actions.Output(), warnings.append)
    assert "over the 1 tests" in only
    with pytest.raises(UserError, match="run 'synthetic-x' is not in"):
        actions.compare(["synthetic-x", paths[1]], synthetic.HOME, [], actions.Output(), warnings.append)
    out = tmp_path / "c.csv"
    actions.compare(paths, tmp_path, [], actions.Output(out), warnings.append)
    assert "p_holm" in out.read_text()


def test_the_papers_tables_are_written_then_checked(synthetic, warnings, tmp_path):
    out = tmp_path / "tables"
    said = actions.paper([synthetic.HOME], out, "all", [], False, warnings.append)
    assert said == f"wrote tables 2 to 5 and figure 2 to {out}"
    names = {p.name for p in out.iterdir()}
    assert {f"table{n}.{s}" for n in (2, 3, 4, 5) for s in ("txt", "md", "tex", "csv")} <= names
    assert {"figure2.txt", "figure2.csv", "figure2.png", "figure2.svg", "figure2.pdf"} <= names
    assert actions.paper([synthetic.HOME], out, "all", [], True, warnings.append).endswith("what the records give")
    (out / "table4.csv").write_text((out / "table4.csv").read_text().replace("26.84", "26.85"))
    with pytest.raises(DataError, match=r"table4.csv is not what the records give: line 2 differs"):
        actions.paper([synthetic.HOME], out, "all", [], True, warnings.append)
    with pytest.raises(UserError, match="name it with --out"):
        actions.paper([synthetic.HOME], None, "all", [], True, warnings.append)
    assert "Table 5" in actions.paper([synthetic.HOME], None, "none", ["model=synthetic-gdn2"], False, warnings.append)


def test_every_number_of_a_table_leads_to_its_records(tables, synthetic, warnings):
    run = synthetic.HOME / "runs" / "synthetic-gdn2-h"
    lines = actions.trace(run, ["task=niah_multikey_1", "length=4k"], warnings.append)
    assert [line.split()[3] for line in lines[1:12]] == [str(i) for i in range(11)]
    scores = [float(line.split()[5]) for line in lines[1:12]]
    assert lines[12] == "niah_multikey_1 4K string_match_all: 18.18 [5.14 to 47.70] from 11 of 16 samples"
    assert sum(scores) / 11 == pytest.approx(0.1818, abs=1e-4)
    assert "18.2†" in tables(down="model", across="task,length")
    failed = actions.trace(synthetic.HOME / "runs" / "synthetic-kda", ["length=8k"], warnings.append)
    assert "error: niah_single_2 3: out of memory" in failed


def test_the_committed_table_is_what_the_committed_records_give(root, warnings):
    zoo = root / "results" / "zoo"
    if not any(zoo.glob("runs/*/run.json")):
        pytest.skip("needs records in results/zoo/runs")
    output = actions.Output(zoo / "table.md", check=True)
    said = actions.tables([zoo], actions.Shape(published="none"), [], output, warnings.append)
    assert said.endswith("is what the records give")


def test_a_column_stands_once(tables):
    for shape in ({"down": "model,model"}, {"down": "task", "across": "length,task"}):
        with pytest.raises(UserError, match="^column '(model|task)' stands twice in --rows and --columns"):
            tables(**shape)
    where = ["model=synthetic-gdn2"]
    assert tables(down="task", where=where) == tables(down="task", across="length", where=where)
