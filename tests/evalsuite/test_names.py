"""Names and texts from outside: the exact forms that file names, messages and tables take."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.names import aligned, one_line, plain, quoted, refuse_unusable, slug, suggest, task_options
from gdn2.errors import UserError

ANY = st.text(st.characters(exclude_categories=()), max_size=80)


@pytest.mark.parametrize("name", ["gdn2-tiny", "a", "A.b_c-9", "x" * 48, "com10", "console", "lpt", "nul2"])
def test_a_name_that_is_safe_stays(name):
    assert slug(name) == name


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("a/b", "a-b-"), ("../../etc/passwd", "etc-passwd-"), ("a b\tc", "a-b-c-"), ("x" * 49, f"{'x' * 48}-"),
        ("-a", "a-"), (".hidden", "hidden-"), ("a.", "a-"), ("", "x-"), ("///", "x-"), ("CON", "x-"), ("nul.txt", "x-"),
        ("Lpt9", "x-"), ("com0.tar.gz", "x-"), ("模型", "x-"), ("modèle", "mod-le-"), ("\ud800", "x-"),
        ("a" * 47 + "-b", f"{'a' * 47}-"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_gets_its_digest(name, begin):
    made = slug(name)
    assert re.fullmatch(re.escape(begin) + "[0-9a-f]{12}", made)
    assert slug(name) == made and slug(name + " ") != made


def test_a_slug_has_room_for_what_it_is_given():
    assert slug("abc/def", limit=3).startswith("abc-") and len(slug("abc/def", limit=3)) == 3 + 13
    # What is cut off must not leave a dot or hyphen that another program would read as something else.
    assert slug("ab-cd-ef", limit=3).startswith("ab-") and "--" not in slug("ab-cd-ef", limit=3)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"), ("\x1b]0;title\x07x", "x"), ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x9b2Jx", "x"), ("\x90dcs\x9cx", "x"), ("a\x1bcb", "ab"), ("half\x1b", "half"), ("half\x1b[", "half"),
        ("a\r\nb", "a\nb"), ("a\rb", "ab"), ("tab\tkept\n", "tab\tkept\n"), ("z\u200bw\ufeff", "zw"),
        ("\u202eabc\u202c", "abc"), ("\u2066x\u2069", "x"), ("bell\x07", "bell"), ("del\x7f", "del"), ("\ud800x", "x"),
        ("عربى עברית 北京 🙂", "عربى עברית 北京 🙂"), ("e\u0301", "e\u0301"), ("\u00a0\u00ad", "\u00a0\u00ad"),
        ("\x1b]" + "x" * 5000 + "\x07end", "x" * 5000 + "end"),
    ],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_taken_out_and_nothing_else(text, left):
    assert plain(text) == left


@given(ANY)
def test_plain_is_done_once(text):
    assert plain(plain(text)) == plain(text) and one_line(one_line(text)) == one_line(text)
    assert "\n" not in one_line(text) and "  " not in one_line(text)


@given(ANY, st.integers(8, 70))
def test_a_quoted_value_is_one_short_line(text, limit):
    shown = quoted(text, limit)
    assert len(shown) <= limit or shown == repr(text) and len(repr(text)) <= limit
    assert shown[0] in "'\"" and shown[-1] in "'\"" and "\n" not in shown
    if len(repr(text)) <= limit:
        assert shown == repr(text)
    else:
        assert shown.endswith("...'") and len(shown) == limit


def test_quoting_is_of_any_value():
    assert (quoted(7), quoted(None), quoted("x" * 58), quoted("x" * 59)) == (
        "'7'", "'None'", f"'{'x' * 58}'", f"'{'x' * 55}...'"
    )  # fmt: skip


def test_suggestions_are_close_then_few_then_none():
    known = ["piqa", "boolq", "arc_easy", "arc_challenge"]
    assert suggest("arc_eazy", known) == "did you mean arc_easy?"
    assert suggest("piqo", known) == "did you mean piqa?"
    assert suggest("zzzzzz", known) == "known: arc_challenge, arc_easy, boolq, piqa"
    assert suggest("zzzzzz", known, limit=2) == "known: arc_challenge, arc_easy, ... (4 in all)"
    assert suggest("zzzzzz", known, limit=4) == "known: arc_challenge, arc_easy, boolq, piqa"
    assert suggest("x", []) == "there are none"
    assert suggest("run1", ["run10", "run11", "run12", "run13"]).count(" or ") == 2  # three at most


def test_columns_of_numbers_are_to_the_right():
    rows = [("a", 1, "1,024"), ("longer", 20, "-"), ("b", "-3", "9.5")]
    assert aligned(("name", "n", "tokens"), rows) == [
        "name     n  tokens",
        "a        1   1,024",
        "longer  20       -",
        "b       -3     9.5",
    ]
    # One text among them, and the column is of texts.
    assert aligned(("n",), [("1",), ("2k",), ("10",)]) == ["n", "1", "2k", "10"]
    assert aligned(("task", "n"), []) == ["task  n"]
    assert aligned(("a", "b"), [("x\ny", "\x1b[2J")]) == ["a    b", "x y"]


@pytest.mark.parametrize("value", ["", " ", "\t\n", "a\0b", "\0"])
def test_what_cannot_be_a_name_is_refused_with_its_option(value):
    with pytest.raises(UserError, match="^--allow-pickle-weights '.*' is not a value$"):
        refuse_unusable({"model": "x", "allow_pickle_weights": value})


def test_what_this_system_cannot_encode_is_refused(monkeypatch):
    lone = "\ud800"  # no undecodable byte of the command line, which would be \udc80 to \udcff
    with pytest.raises(UserError, match="--out .* is not a value"):
        refuse_unusable({"out": lone})
    refuse_unusable({"out": os.fsdecode(b"caf\xe9"), "n": 0, "flag": False, "none": None, "path": "über/北京"})


def test_the_options_of_tasks_are_texts():
    given_ = {"haystack": "essays", "haystack_offset": None, "budget": 64, "model": "x", "seed": 3}
    assert task_options(given_) == {"haystack": "essays", "budget": "64"}
    assert task_options({}) == {} and task_options({"haystack_offset": "0"}) == {"haystack_offset": "0"}
