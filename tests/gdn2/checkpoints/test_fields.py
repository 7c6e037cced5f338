"""What a stranger's configuration may say, value by value, and what a user must say by name."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.checkpoints.fields import LARGEST, Fields, Values
from gdn2.checkpoints.safe import parse_json, shown
from gdn2.errors import CheckpointError, UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def fields(**data: Any) -> Fields:
    return Fields(data, "config.json")


@pytest.mark.parametrize(("value", "want"), [(1, 1), (LARGEST, LARGEST), (4.0, 4), (float(LARGEST), LARGEST)])
def test_integers_in_range(value: float, want: int) -> None:
    got = fields(n=value).integer("n")
    assert got == want and type(got) is int


@pytest.mark.parametrize(
    "value", [0, -1, LARGEST + 1, 4.5, "4", True, [4], {}, None, math.inf, -math.inf, math.nan, 2.0**60]
)
def test_everything_else_is_no_integer(value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: n must be an integer from 1 to {LARGEST}, got "):
        fields(n=value).integer("n")


def test_a_lower_bound_and_a_default_of_ones_own() -> None:
    assert (
        fields(n=0).integer("n", low=0) == 0 and fields().integer("n", 7) == 7 and fields(n=None).integer("n", 7) == 7
    )
    assert fields(n=-1).integer("n", low=-1) == -1
    with pytest.raises(CheckpointError, match="n must be an integer from 0"):
        fields(n=-1).integer("n", 7, low=0)
    with pytest.raises(CheckpointError, match="n must be an integer from 1 .* got None"):
        fields().integer("n")
    assert fields().integer("n", 0) == 0  # a default is ours and needs no check


def test_numbers_and_flags() -> None:
    assert fields(x=3).number("x") == 3.0 and type(fields(x=3).number("x")) is float
    assert fields(x=math.inf).number("x") == math.inf  # published Mamba-2 configurations hold it
    assert fields(x=None).number("x", 0.5) == fields().number("x", 0.5) == 0.5
    assert (
        fields(x=False).flag("x", True) is False and fields(x=None).flag("x", True) is fields().flag("x", True) is True
    )
    for value in ("1", True, None, [], math.nan):
        with pytest.raises(CheckpointError, match="x must be a number, got"):
            fields(x=value).number("x")
    for value in (0, 1, "true", None, []):
        with pytest.raises(CheckpointError, match="x must be true or false, got"):
            fields(x=value).flag("x")


def test_lists_and_tables() -> None:
    assert fields(x=[0, LARGEST]).integers("x") == [0, LARGEST] and fields().integers("x", [3]) == [3]
    assert fields(x=[]).integers("x") == [] and fields(x=None).integers("x", (1, 2)) == [1, 2]
    for value in ([-1], [LARGEST + 1], [1.0], [True], "12", {"a": 1}, 3, [[1]]):
        with pytest.raises(CheckpointError, match="x must be a list of integers"):
            fields(x=value).integers("x")
    assert fields(x=[1, 2.5]).numbers("x", 2, (0, 0)) == [1.0, 2.5] and fields().numbers("x", 2, (0, 9)) == [0.0, 9.0]
    for value in ([1], [1, 2, 3], [1, "2"], [1, True], [1, math.nan], "ab"):
        with pytest.raises(CheckpointError, match="x must be a list of 2 numbers"):
            fields(x=value).numbers("x", 2, (0, 0))
    assert fields(x=["a", "b", "a"]).choices("x", ("a", "b"), 3) == ["a", "b", "a"]
    for value in (["a"], ["a", "c", "a"], "aba", None, [["a"], "a", "b"]):
        with pytest.raises(CheckpointError, match="x must be a list of 3 out of a, b"):
            fields(x=value).choices("x", ("a", "b"), 3)
    inner = fields(x={"n": "y"}).table("x")
    with pytest.raises(CheckpointError, match="^config.json: x: n must be an integer"):
        inner.integer("n")
    assert fields().table("x").data == fields(x=None).table("x").data == {}
    with pytest.raises(CheckpointError, match="x must be an object"):
        fields(x=[1]).table("x")


def test_only_what_is_served() -> None:
    served = {"act": ("silu", "swish"), "bias": (False, None)}
    fields(act="swish", other=3).only(**served)
    fields(bias=None).only(**served)
    with pytest.raises(
        CheckpointError, match="act must be 'silu' or 'swish' .use the hf backend otherwise., got 'gelu'"
    ):
        fields(act="gelu").only(**served)
    with pytest.raises(CheckpointError, match="bias must be False or None"):
        fields(bias=True).only(**served)


@settings(deadline=None)
@given(JSON, st.sampled_from(["integer", "number", "flag", "table", "integers"]))
def test_any_json_is_a_value_or_one_line(value: object, kind: str) -> None:
    try:
        got = getattr(fields(x=value), kind)("x")
    except CheckpointError as problem:
        assert "\n" not in str(problem) and len(str(problem)) < 400
        return
    if kind == "integer":
        assert type(got) is int and 1 <= got <= LARGEST and got == value
    elif kind == "number":
        assert type(got) is float and got == value
    elif kind == "flag":
        assert got is value
    elif kind == "table":
        assert got.data == (value or {})
    else:
        assert got == list(value) and all(type(v) is int for v in got)  # type: ignore[call-overload]


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_json_is_read_as_the_standard_reads_it_but_for_nan(data: dict) -> None:
    raw = json.dumps(data).encode()
    try:
        got = parse_json(raw, "x.json")
    except CheckpointError as problem:
        assert b"NaN" in raw and "NaN is not a number" in str(problem)
        return
    assert got == json.loads(raw)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(CheckpointError) as caught:
        fields(n="x" * 10_000).integer("n")
    assert len(str(caught.value)) < 300
    assert "\n" not in shown("a\nb\x1b[2J") and len(shown("y" * 10_000)) < 200


def values(**given_: str) -> Values:
    return Values(given_)


def test_what_the_user_says_by_name() -> None:
    said = values(window="2048", rope_base="1e4", order="b")
    assert said.number("window", int) == 2048 and said.number("rope_base", float) == 10000.0
    assert said.text("order", ("a", "b")) == "b" and said.text("other", ("a", "b"), "a") == "a"
    assert said.number("more", int, 5) == 5
    said.refuse_unused("x")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1e3", "many", "", "nan", "inf", "0x10", "²"])
def test_a_size_is_a_positive_whole_number(text: str) -> None:
    with pytest.raises(UserError, match="^window must be a positive number, got "):
        values(window=text).number("window", int)


@pytest.mark.parametrize("text", ["0", "-1e-9", "nan", "inf", "-inf", "1e999", "ten", ""])
def test_a_factor_is_positive_and_finite(text: str) -> None:
    with pytest.raises(UserError, match="^norm_eps must be a positive number, got "):
        values(norm_eps=text).number("norm_eps", float)


def test_what_is_missing_is_asked_for_with_its_reason() -> None:
    with pytest.raises(
        UserError, match="^window cannot be read from the checkpoint: no config.json: give window=NUMBER$"
    ):
        values().number("window", int, why=": no config.json")
    with pytest.raises(UserError, match="^order cannot be read from the checkpoint: give order=a|b$"):
        values().text("order", ("a", "b"))
    with pytest.raises(UserError, match="^order must be a or b, got 'c'$"):
        values(order="c").text("order", ("a", "b"))


def test_what_is_not_used_is_refused_with_what_would_be() -> None:
    said = values(window="3", windw="4")
    said.number("window", int)
    said.number("heads", int, 2)
    with pytest.raises(UserError, match="^here has no use for windw=4; it takes: heads, window$"):
        said.refuse_unused("here")
    with pytest.raises(UserError, match="it takes: none$"):
        values(a="1").refuse_unused("here")
