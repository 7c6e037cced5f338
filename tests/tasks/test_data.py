"""The data directory: what is kept, found, imported, fetched and refused."""

import json
import socket
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from gdn2.errors import DataError, StorageError, UserError
from gdn2.tokenizer import load_tokenizer
from tasks import data
from tasks.data import commands, hub, shelf
from tasks.data.formats import read_copy
from tasks.data.spec import Dataset, conform

ROWS = [
    {"question": "Who {is} <s> it?", "options": ["A", "Ж"], "label": 1, "pair": {"text": ["x"], "label": ["A"]}},
    {"question": "", "options": [], "label": 0, "pair": {"text": ["y", "z"], "label": ["A", "B"]}},
]


def swapped(path: Path) -> list[dict]:
    """An original format: question|option,option|label on each line."""
    found = (line.split("|") for line in path.read_text().splitlines())
    return [
        {"question": q, "options": o.split(","), "label": a, "pair": {"text": ["x"], "label": ["A"]}}
        for q, o, a in found
    ]


TOY = Dataset(
    "toy", {"question": "text", "options": "texts", "label": "label", "pair": "choices"}, "owner/toy", "validation",
    records=2, licence="CC0", original=swapped,
)  # fmt: skip


class ToyTask:
    name, suite, datasets = "toy_task", "toys", (TOY,)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, one task that reads from it, and no network."""
    known = {"toy_task": ToyTask(), "free": type("Free", (), {"name": "free", "suite": "frees"})()}
    monkeypatch.setattr(tasks, "names", lambda: list(known))
    monkeypatch.setattr(tasks, "get", known.__getitem__)
    monkeypatch.setattr(tasks, "suites", lambda: {"toys": ("toy_task",), "frees": ("free",)})
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))

    def refuse(*args: object) -> None:
        raise AssertionError("a network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "data"


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_is_missing_names_the_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        data.locate(TOY)
    assert str(caught.value) == (
        f"the data of toy are not in {home}: `gdn2-eval data fetch toy --to {home}` brings them, "
        f"`gdn2-eval data import toy FILE --to {home}` takes your own copy"
    )
    assert caught.value.exit_code == 3 and not home.exists()
    monkeypatch.delenv("GDN2_DATA")
    monkeypatch.setenv("GDN2_CACHE", str(home))
    with pytest.raises(DataError, match=r"`gdn2-eval data fetch toy` brings them"):
        data.rows(TOY)


@pytest.mark.parametrize("kind", ["lines", "list", "parquet", "bom"])
def test_every_format_gives_the_same_file(home: Path, tmp_path: Path, kind: str) -> None:
    rows = [{**row, "other": 1, "label": str(row["label"])} for row in ROWS]
    path = lines(tmp_path / "copy.jsonl", rows)
    if kind == "list":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    elif kind == "parquet":
        path = tmp_path / "copy.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    said = commands.import_copy("toy_task", path, home)
    assert said == f"toy: 2 of 2 records in {home / 'toy.jsonl'}"
    assert list(data.rows(TOY)) == ROWS
    found = data.locate(TOY)
    assert (found.records, found.path) == (2, home / "toy.jsonl")
    assert found.digest == data.digest(TOY)
    assert found.digest == sha256("".join(json.dumps(row) + "\n" for row in ROWS).encode()).hexdigest()


def test_the_original_format_is_read(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.txt").write_text("Who?|A,B|1\n")
    assert commands.import_copy("toy", tmp_path / "dev.txt", home).startswith("toy: 1 of 2 records")
    assert data.rows(TOY)[0]["options"] == ["A", "B"]
    assert [row[-1] for row in commands.check(home)[0]] == ["short"]
    (tmp_path / "dev.txt").write_text("Who?|A,B\n")
    with pytest.raises(DataError, match=r"dev\.txt:1: not JSON .*; nor is it the original format"):
        commands.import_copy("toy", tmp_path / "dev.txt", home)


BAD = [
    ({"label": "x"}, r"record 1: column label of toy is 'x', not a whole number"),
    ({"label": None}, "column label of toy is None"),
    ({"label": 1.5}, "column label of toy is 1.5"),
    ({"question": 3}, "column question of toy is 3, not a text"),
    ({"options": "AB"}, "column options of toy is 'AB', not a list of texts"),
    ({"options": ["A", 1]}, "column options"),
    ({"pair": {"text": ["x"], "label": []}}, "column pair of toy is .*, not an object of the lists"),
    ({"pair": {"text": [], "label": []}}, "column pair"),
    ({"pair": "x"}, "column pair"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_columns_are_checked(home: Path, tmp_path: Path, change: dict, message: str) -> None:
    path = lines(tmp_path / "copy.jsonl", [{**ROWS[0], **change}])
    with pytest.raises(DataError, match=message):
        read_copy(replace(TOY, original=None), path)
    assert not home.exists()


def test_files_that_are_none(home: Path, tmp_path: Path) -> None:
    plain = replace(TOY, original=None)
    path = tmp_path / "copy.jsonl"
    for content, message in {
        b"": "holds no record",
        b"\xff\xfe{": "is not UTF-8: byte 0 is 0xff",
        b'{"question": "a"}\n': "column options of toy is missing; there are question",
        b'{"a": 1}\n{': r"copy\.jsonl:2: not JSON",
        b"3\n": "not an object with columns question, options, label, pair",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_copy(plain, path)
    with pytest.raises(DataError, match="is not a file"):
        read_copy(plain, tmp_path)
    path.rename(tmp_path / "copy.parquet")
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_copy(plain, tmp_path / "copy.parquet")


def test_a_changed_or_missing_file_is_found(home: Path, tmp_path: Path) -> None:
    commands.import_copy("toy", lines(tmp_path / "copy.jsonl", ROWS), home)
    assert commands.check(home) == ([("toy.jsonl", 2, 2, "CC0", "whole")], 0)
    data.rows(TOY)
    with (home / "toy.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="has changed since it was kept"):
        data.rows(TOY)
    assert commands.check(home)[0][0][-1] == "changed"
    (home / "toy.jsonl").unlink()
    assert commands.check(home) == ([("toy.jsonl", 2, 2, "CC0", "missing")], 1)
    with pytest.raises(DataError, match="are not in"):
        data.rows(TOY)
    (home / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*manifest\.json"):
        data.rows(TOY)
    (home / "manifest.json").write_text('{"version": 9, "files": {}}')
    with pytest.raises(DataError, match="version 9 is not 1"):
        commands.check(home)
    (home / "manifest.json").unlink()
    with pytest.raises(DataError, match="gdn2-eval data fetch SUITE --to"):
        commands.check(home)


def test_names(home: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "copy.jsonl", ROWS)
    with pytest.raises(UserError, match="no suite, task or data set 'tyo'; did you mean toy"):
        commands.import_copy("tyo", path, home)
    with pytest.raises(UserError, match=r"'free' reads 0 data sets \(none\): name one"):
        commands.import_copy("free", path, home)
    said: list[str] = []
    commands.fetch("free", home, None, said.append)
    assert said == ["free reads no files"]


def test_a_directory_that_cannot_be_written(home: Path, tmp_path: Path) -> None:
    home.write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        commands.import_copy("toy", lines(tmp_path / "copy.jsonl", ROWS), home)


def test_a_hub_is_fetched_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The datasets library itself, on a repository of this disk."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "repository"
    repository.mkdir()
    lines(repository / "validation.jsonl", ROWS)
    local = replace(TOY, hub=str(repository))
    monkeypatch.setattr(ToyTask, "datasets", (local,))
    said: list[str] = []
    commands.fetch("toys", home, None, said.append)
    assert said == ["[1/1] toy: 2 of 2 records, licence: CC0", f"{home} holds what toys reads"]
    assert list(data.rows(local)) == ROWS
    entry = shelf.manifest(home)["toy.jsonl"]
    assert entry.source == f"hf:{repository}@main validation" and entry.expected == 2
    (repository / "validation.jsonl").unlink()
    commands.fetch("toys", home, None, said.append)
    assert said[2] == "[1/1] toy: there already"


def test_a_hub_without_network_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(DataError, match="cannot fetch owner/toy: ") as caught:
        hub.fetch_dataset(TOY, home)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is not OWNER/REPO"):
        hub.fetch_tokenizer("../../x", home)


def test_a_kept_tokenizer_goes_by_its_hub_name(home: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (root / "gdn2" / "zoo" / "tokenizer.json").read_bytes()
    info = type("Info", (), {"sha": "abc"})()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repo: info)

    def download(repo: str, *, local_dir: str, **rest: object) -> None:
        (Path(local_dir) / "tokenizer.json").write_bytes(content)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.fetch_tokenizer("hf:some/one", home) == ["tokenizers/some--one/tokenizer.json"]
    assert load_tokenizer("some/one").encode("a needle")
    assert commands.check(home)[0] == [
        ("tokenizers/some--one/tokenizer.json", "-", "-", "see its page on the hub", "whole")
    ]


@given(st.lists(st.fixed_dictionaries({"question": st.text(), "label": st.integers(-(10**8), 10**8)}), max_size=4))
def test_any_text_survives(made: list[dict]) -> None:
    plain = Dataset("plain", {"question": "text", "label": "label"}, "a/b", "test")
    kept = shelf.to_lines([conform(plain, row, "x") for row in made])
    assert [json.loads(line) for line in kept.splitlines()] == made
