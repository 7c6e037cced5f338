"""Profiles with fields: what a text stands for, what it is refused for, and that it survives its own spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.types import Chosen, Field, expanded, field_values
from gdn2.errors import UserError

FIELDS = {
    "pairs": Field("8", "[1-9][0-9]{0,3}", "a number of pairs"),
    "order": Field("random", "random|sorted", "random or sorted"),
    "gap": Field("1/2", "[0-9]", "a digit"),
}
NAMES = ("exact", "loose")


def of(profile, brief=False):
    return expanded("toy", NAMES, FIELDS, profile, brief)


def test_every_field_is_spelt_out_in_the_order_of_the_task():
    assert of("exact:gap=3") == ("exact:pairs=8:order=random:gap=3",)
    assert of("loose:order=sorted:gap=0:pairs=4") == ("loose:pairs=4:order=sorted:gap=0",)
    # A default of several values asks for each.
    assert of("exact") == ("exact:pairs=8:order=random:gap=1", "exact:pairs=8:order=random:gap=2")


def test_several_values_are_every_combination_once():
    made = of("exact:pairs=4/8/4:order=sorted/random:gap=1")
    assert made == tuple(f"exact:pairs={n}:order={o}:gap=1" for n in (4, 8) for o in ("sorted", "random"))


def test_brief_leaves_defaults_out():
    plain = {"forced": Field("no", "yes|no", "yes or no")}
    assert (
        expanded("t", NAMES, plain, "exact", True) == expanded("t", NAMES, plain, "exact:forced=no", True) == ("exact",)
    )
    assert expanded("t", NAMES, plain, "exact:forced=yes", True) == ("exact:forced=yes",)
    assert expanded("t", NAMES, {}, "loose", True) == expanded("t", NAMES, {}, "loose") == ("loose",)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("exakt", "task toy has no profile 'exakt'; it has exact, loose"),
        ("", "has no profile ''"),
        (":pairs=3", "has no profile ''"),
        ("exact:", "profile exact of toy has no field ''"),
        ("exact:pairs", "has no field 'pairs'"),
        ("exact:size=3", "has no field 'size=3', or is given it twice: pairs=8, order=random, gap=1/2"),
        ("exact:pairs=3:pairs=4", "'pairs=4', or is given it twice"),
        ("exact:pairs=", "pairs '' of toy is not a number of pairs"),
        ("exact:pairs=4/", "pairs '' of toy"),
        ("exact:pairs=0", "pairs '0' of toy is not a number of pairs"),
        ("exact:pairs=4\n", r"pairs '4\\n' of toy"),
        ("exact:pairs=12345", "pairs '12345'"),
        ("exact:order=Random", "order 'Random' of toy is not random or sorted"),
        ("exact:gap=１", "gap '１' of toy is not a digit"),
        ("x" * 200, "has no profile '" + "x" * 60 + "'"),
    ],
)
def test_a_wrong_profile_is_named(profile, message):
    with pytest.raises(UserError, match=message) as caught:
        of(profile)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_task_without_fields_says_so():
    with pytest.raises(UserError, match="has no field 'a=1', or is given it twice: none"):
        expanded("toy", NAMES, {}, "exact:a=1")


@given(
    st.sampled_from(NAMES),
    st.fixed_dictionaries(
        {},
        optional={
            "pairs": st.lists(st.integers(1, 9999).map(str), min_size=1, max_size=3),
            "order": st.lists(st.sampled_from(["random", "sorted"]), min_size=1, max_size=3),
            "gap": st.lists(st.integers(0, 9).map(str), min_size=1, max_size=3),
        },
    ),
    st.booleans(),
)
def test_a_protocol_stands_for_itself_and_says_its_fields(name, chosen, brief):
    text = ":".join([name, *(f"{key}={'/'.join(values)}" for key, values in chosen.items())])
    made = of(text, brief)
    wanted = {key: dict.fromkeys(chosen.get(key, one.default.split("/"))) for key, one in FIELDS.items()}
    sizes = [len(values) for values in wanted.values()]
    assert len(made) == len(set(made)) == sizes[0] * sizes[1] * sizes[2]
    for protocol in made:
        found = field_values(FIELDS, protocol)
        assert all(found[key] in wanted[key] for key in FIELDS if brief is False or found[key] != FIELDS[key].default)
        if not brief:
            assert of(protocol) == (protocol,)


@given(st.text(max_size=40))
def test_any_text_is_a_profile_or_refused_in_one_line(text):
    try:
        assert all(one.split(":")[0] in NAMES for one in of(text))
    except UserError as problem:
        assert "\n" not in str(problem)


def test_a_chosen_task_is_the_task_in_all_else():
    class Task:
        name, version, suite = "toy", 3, "toys"

        def samples(self, setting, tokenizer):
            return [setting, tokenizer]

    one = Chosen(Task(), "exact", (1024,), 5)
    assert (one.name, one.version, one.suite, one.protocol, one.samples) == ("toy", 3, "toys", "exact", 5)
    with pytest.raises(AttributeError, match="nothing"):
        _ = one.nothing
