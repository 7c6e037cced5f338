"""The commands `tables` and `plot`: what they print, write and refuse."""

import pytest

from evalsuite.reports import actions
from gdn2.errors import DataError, UserError


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def tables(synthetic, warnings):
    def call(out=None, form="text", published="matched", check=False, runs=None):
        return actions.tables(runs or [synthetic.HOME], out, form, published, check, warnings.append)

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
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            tables(**options)
    assert not list(tmp_path.iterdir())


def test_results_is_the_default_place(tmp_path, monkeypatch, synthetic, warnings):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no records at 'results'"):
        actions.tables([], None, "text", "none", False, warnings.append)
    (tmp_path / "results").symlink_to(synthetic.HOME)
    assert "synthetic-kda" in actions.tables([], None, "text", "none", False, warnings.append)


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
    said = actions.plot([synthetic.HOME], tmp_path / "figures", "png, SVG,png", warnings.append)
    names = ["accuracy.png", "accuracy.svg", "depth.png", "depth.svg"]
    assert said.splitlines() == [f"wrote {tmp_path / 'figures' / name}" for name in names]
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == names


@pytest.mark.parametrize("kinds", ["gif", "", "png,,svg"])
def test_unknown_kinds_of_plots_are_refused(synthetic, tmp_path, warnings, kinds):
    with pytest.raises(UserError, match="plot format '.*' is unknown; known: pdf, png, svg"):
        actions.plot([synthetic.HOME], tmp_path, kinds, warnings.append)
