"""Examples as they come: every kind of column, every kind of value, manifests and file names of every kind."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.errors import DataError
from tasks.data import formats, shelf
from tasks.data.spec import WHAT, Dataset, Kind, conform

TOY = Dataset("toy", {"q": "text", "n": "label"}, "owner/toy", "test", records=3, licence="CC0")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def column(kind: Kind) -> Callable:
    one = Dataset("toy", {"c": kind}, "owner/toy", "test")
    return lambda value: conform(one, {"c": value, "other": 1}, "here")["c"]


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (3, 3), (-3, -3), (0, 0), (True, 1), (False, 0), ("3", 3), (" 3 ", 3), ("-3", -3), ("007", 7),
        ("999999999", 999999999), ("1000000000", None), ("", None), ("-", None), ("--3", None), ("+3", None),
        ("3.0", None), ("1e3", None), ("²", None), ("٣", None), ("A", None), (3.0, None), (None, None), ([3], None),
    ],
)  # fmt: skip
def test_a_label_is_a_whole_number_or_its_digits(value: object, want: int | None) -> None:
    if want is None:
        with pytest.raises(DataError, match="^here: column c of toy is .*, not a whole number$"):
            column("label")(value)
        return
    assert column("label")(value) == want and type(column("label")(value)) is int


def test_lists_of_texts() -> None:
    for value in (["a", ""], ("a",), [], {"a": 1, "b": 2}):  # a JSON object is its names, as a hub's column may be
        assert column("texts")(value) == list(value)
    for value in ("ab", [1], ["a", None], None, 3, [["a"]]):
        with pytest.raises(DataError, match="not a list of texts"):
            column("texts")(value)


def test_choices_have_a_label_each_and_there_is_one_at_least() -> None:
    good = {"text": ["a", "b"], "label": ["A", "B"]}
    assert column("choices")(good | {"more": 1}) == good
    for value in (
        {"text": ["a"], "label": ["A", "B"]}, {"text": [], "label": []}, {"text": ["a"]}, {"label": ["A"]},
        {"text": "a", "label": "A"}, [["a"], ["A"]], None, {"text": ["a"], "label": [1]},
    ):  # fmt: skip
        with pytest.raises(DataError, match="not an object of the lists `text` and `label`, of one length"):
            column("choices")(value)


@settings(deadline=None)
@given(JSON, st.sampled_from(list(WHAT)))
def test_any_value_becomes_its_kind_or_one_line(value: object, kind: Kind) -> None:
    try:
        got = column(kind)(value)
    except DataError as problem:
        assert "\n" not in str(problem) and len(str(problem)) < 250
        return
    assert column(kind)(got) == got or got != got or kind == "any"  # what was made once is made of itself
    if kind == "text":
        assert got is value and isinstance(got, str)


def test_an_adapter_is_asked_only_where_a_column_is_missing() -> None:
    def adapt(row: dict) -> dict:
        return {"q": row["question"].upper(), "n": row["labels"][0]}

    one = Dataset("toy", {"q": "text", "n": "label"}, "o/t", "test", adapt=adapt)
    assert conform(one, {"question": "a", "labels": [3]}, "r") == {"q": "A", "n": 3}
    assert conform(one, {"q": "as it is", "n": 1, "question": "a", "labels": [3]}, "r") == {"q": "as it is", "n": 1}
    for odd in ({"question": 3, "labels": [1]}, {"question": "a", "labels": []}, {"question": "a"}, {}):
        with pytest.raises(DataError, match="^r: column q of toy is missing; there are "):
            conform(one, odd, "r")
    with pytest.raises(DataError, match="there are none$"):
        conform(TOY, {}, "r")
    many = {f"column {i} {'x' * 90}": i for i in range(40)}
    with pytest.raises(DataError) as caught:
        conform(TOY, many, "r")
    assert len(str(caught.value)) < 700 and "column 11" in str(caught.value) and "column 12" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.fixed_dictionaries({"q": st.text(st.characters(exclude_categories=())), "n": st.integers(-9, 9)})))
def test_rows_are_the_same_bytes_whatever_they_came_from(rows: list[dict]) -> None:
    made = shelf.to_lines(rows)
    assert made.isascii() and made.count(b"\n") == len(rows)
    assert [json.loads(line) for line in made.splitlines()] == rows


@settings(deadline=None, max_examples=60)
@given(st.lists(st.fixed_dictionaries({"q": st.text("a\u2028\u2029\x85\x0b\x0c\x1c[{", max_size=5)}), min_size=1))
def test_only_a_line_feed_ends_a_line(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert formats.read_json_lines(path) == rows


def entry(**change: object) -> dict:
    good = {"sha256": "0" * 64, "bytes": 3, "records": 1, "expected": None, "source": "s", "licence": "l"}
    return good | {"created_at": "2026-01-01T00:00:00+00:00"} | change


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": 5}, {"sha256": None}, {"bytes": "3"}, {"bytes": True}, {"records": "1"}, {"records": 1.5},
        {"expected": []}, {"licence": None}, {"source": {}}, {"created_at": 3},
    ],
)  # fmt: skip
def test_a_manifest_with_other_types_is_one_line(tmp_path: Path, change: dict) -> None:
    content = {"version": 1, "files": {"good.jsonl": entry(), "toy.jsonl": entry(**change)}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="cannot read .*manifest.json: what it says of toy.jsonl is not what we write"):
        shelf.manifest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "3", "null", '{"files": {}}', '{"version": 1}', '{"version": 1, "files": []}',
        '{"version": 1, "files": {"a": 3}}', '{"version": 1, "files": {"a": {}}}',
        json.dumps({"version": 1, "files": {"a": entry(more=1)}}), "[" * 100_000,
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="cannot read .*manifest.json: .") as caught:
        shelf.manifest(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_no_manifest_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert shelf.manifest(tmp_path) == shelf.manifest(tmp_path / "no") == shelf.manifest(tmp_path / "file") == {}


@pytest.mark.parametrize("name", ["проба.jsonl", "日本.jsonl", os.fsdecode(b"caf\xe9.jsonl"), 'quo"te\\.jsonl'])
def test_a_copy_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Also one that is no UTF-8, or that a locale without UTF-8 hands over byte by byte."""
    kept = shelf.store(tmp_path, TOY, [{"q": "a", "n": 1}], f"import:{name}")
    (found,) = shelf.manifest(tmp_path).values()
    assert found == kept and found.source == f"import:{name}"
    assert json.loads((tmp_path / "manifest.json").read_bytes().decode("utf-8"))["version"] == 1


def test_what_was_known_before_stays_known(tmp_path: Path) -> None:
    shelf.store(tmp_path, TOY, [{"q": "a", "n": 1}], "one")
    shelf.keep(tmp_path, {"sub/tokenizer.json": b"{}"}, {"sub/tokenizer.json": shelf.entry_of(b"{}", "hub", "MIT")})
    shelf.store(tmp_path, TOY, [{"q": "b", "n": 2}, {"q": "c", "n": 3}], "two")
    found = shelf.manifest(tmp_path)
    assert list(found) == ["sub/tokenizer.json", "toy.jsonl"]
    assert (found["toy.jsonl"].source, found["toy.jsonl"].records, found["toy.jsonl"].expected) == ("two", 2, 3)
    assert found["sub/tokenizer.json"].records is None and found["sub/tokenizer.json"].bytes == 2
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["manifest.json", "sub", "toy.jsonl"]
