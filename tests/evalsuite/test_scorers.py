"""RULER's scoring rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.scorers import contains, postprocess, string_match_all, string_match_part


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("  a \n", "a"),
        ("a\tb\x00c\x1f", "a\nb\nc"),
        ("\x01 a", "a"),
        ("a\x7f\x80b", "a\x7f\x80b"),
        ("\x00", ""),
        ("", ""),
    ],
)
def test_postprocess(text: str, want: str) -> None:
    assert postprocess(text) == want


def test_matches() -> None:
    assert contains("The Answer", "answer") and not contains("answ er", "answer")
    assert string_match_all("one and THREE", ["one", "two", "three", "four"]) == 0.5
    assert string_match_part("one and THREE", ["two", "three"]) == 1.0
    assert string_match_part("one", ["two", "three"]) == 0.0


@given(st.text(), st.text(), st.lists(st.text(alphabet="ab1-", min_size=1, max_size=3), min_size=1, max_size=4))
def test_more_text_never_lowers_the_score(text: str, more: str, references: list[str]) -> None:
    """Why generation may stop when every reference has appeared."""
    before, after = (string_match_all(postprocess(one), references) for one in (text, text + more))
    assert before <= after
