"""Haystacks: what is read, how it is cut, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import tasks
from evalsuite.types import Setting
from gdn2.errors import DataError
from gdn2.tokenizer import load_tokenizer
from tasks.ruler.haystack import MAX_CHARS, MAX_WORDS, NeedleHaystack, load_haystack, split_sentences
from tasks.ruler.templates import NIAH_TASKS
from tasks.ruler.words import filler, held_out


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


REFUSED = {
    b"": "0 bytes but not a word",
    b" \n\t \x0c\r\n": "7 bytes but not a word",
    b"Good text \xff here": r"byte 10 \(0xff\) is not UTF-8",
    "UTF-16".encode("utf-16"): r"byte 0 \(0xff\) is not UTF-8",
    b"A surrogate \xed\xa0\x80.": r"byte 12 \(0xed\) is not UTF-8",
}


@pytest.mark.parametrize("data", REFUSED)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    file = write(tmp_path / "bad.txt", data)
    with pytest.raises(DataError, match=REFUSED[data]) as caught:
        load_haystack(file)
    assert file in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_haystack(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no \.txt file"):
        load_haystack(str(tmp_path))
    for name in ("", "a\0b", "x" * 5000, "/dev/zero", "no\nsuch"):
        with pytest.raises(DataError, match="haystack") as caught:
            load_haystack(name)
        assert "\n" not in str(caught.value)


def test_bad_haystacks_are_refused_by_every_task(trained: Callable, tmp_path: Path) -> None:
    for name in tasks.names():
        task = tasks.get(name)
        if task.suite != "ruler":
            continue
        setting = Setting(task.protocols[0], 1024, 2, options={"haystack": str(tmp_path / "nowhere")})
        with pytest.raises(DataError):
            task.samples(setting, trained("plain"))


def test_a_directory_is_its_text_files_by_name(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Two."), ("a.txt", "One."), ("c.md", "No."), ("B.txt", "Capital.")):
        (tmp_path / name).write_text(text)
    assert load_haystack(str(tmp_path)).text() == "Capital.\nOne.\nTwo."


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "h.txt"
    digest = load_haystack(write(file, b"Old text.")).digest
    assert load_haystack(write(file, b"Other, longer text.")).digest != digest
    assert load_haystack(str(file)).sentence(0) == "Other, longer text."


def test_upstreams_json_is_read(tmp_path: Path) -> None:
    file = tmp_path / "essays.json"
    file.write_text(json.dumps({"text": "Some essay."}))
    assert load_haystack(str(file)).text() == "Some essay."
    for bad in ('{"text": "\\ud800"}', "[]", '{"text": 1}', "{", '{"other": ""}'):
        file.write_text(bad + " " * len(bad))
        with pytest.raises(DataError, match="JSON|object|surrogate"):
            load_haystack(str(file))


def test_sentences() -> None:
    text = "Mr. Smith\n went to  J. Doe. “Really?” he asked. (Yes!) It ended... and so on"
    assert split_sentences(text) == [
        "Mr. Smith went to J. Doe.",
        "“Really?”",
        "he asked.",
        "(Yes!)",
        "It ended...",
        "and so on",
    ]


@given(st.text(max_size=400))
def test_cutting_loses_nothing(text: str) -> None:
    assert "".join(split_sentences(text)).replace(" ", "") == "".join(text.split())


def test_nothing_is_longer_than_its_bound() -> None:
    sentences = split_sentences("word " * 1000 + "y" * 10_000_000)
    assert max(sentence.count(" ") + 1 for sentence in sentences) <= MAX_WORDS
    assert max(len(word) for sentence in sentences for word in sentence.split()) <= MAX_CHARS


def test_contains_finds_keys_and_values_only_where_they_are(tmp_path: Path) -> None:
    haystack = load_haystack(write(tmp_path / "h.txt", b"Call 1234567 or the (self-made) man. Plain words."))
    assert haystack.contains("1234567") and haystack.contains("self-made") and haystack.contains("2345")
    assert not haystack.contains("7654321") and not haystack.contains("plain-words")


def test_lines_of_a_needle_haystack_never_answer_a_question() -> None:
    for task in (task for task in NIAH_TASKS if task.haystack == "needle"):
        lines = NeedleHaystack(task, 42)
        pairs = [lines.pair(i) for i in range(300)]
        assert all(filler(text) and held_out(text) for pair in pairs for text in pair)
        assert NeedleHaystack(task, 42).pair(299) == pairs[299]
        assert NeedleHaystack(task, 43).pair(299) != pairs[299]
        assert lines.sentence(3) == task.needle(*pairs[3])


def test_the_bundled_haystack_cannot_hold_a_needle() -> None:
    haystack = load_haystack("bundled")
    text = " ".join(haystack.sentence(i) for i in range(3000))
    assert not set("-0123456789") & set(text)
    assert haystack.size is None


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    task = tasks.get("niah_single_2")
    one, two, same = (write(tmp_path / f"{i}.txt", data) for i, data in enumerate((b"Text a.", b"Text b.", b"Text a.")))
    digests = [task.data_digest(Setting("exact", 1024, options={"haystack": file})) for file in (one, two, same)]
    assert digests[0] == digests[2] != digests[1]
    assert task.data_digest(Setting("exact", 1024)) not in digests


def test_a_text_the_tokenizer_cannot_read_is_refused(tmp_path: Path) -> None:
    letters = {letter: i for i, letter in enumerate(map(chr, range(33, 127)))}
    Tokenizer(models.BPE(vocab=letters, merges=[])).save(str(tmp_path / "ascii.json"))
    tokenizer = load_tokenizer(tmp_path / "ascii.json", bos="no")
    file = write(tmp_path / "h.txt", "文字列文字列。".encode() * 50)
    setting = Setting("exact", 4000, 2, options={"haystack": file})
    with pytest.raises(DataError, match="makes no token"):
        tasks.get("niah_single_2").samples(setting, tokenizer)[0]
