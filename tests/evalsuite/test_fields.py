"""Fields of protocols: what stands for what, and what a record says was asked."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from evalsuite.backends.scripted import ScriptedBackend, nothing
from evalsuite.plan import Ask, check_data, check_profile, make_plan, settings
from evalsuite.show import field_table
from evalsuite.types import Adjustable, Chosen, Field, Generate, Prompt, Sample, expanded, field_values
from gdn2.errors import UserError

FIELDS = {
    "pairs": Field("4", r"[1-9]\d{0,3}", "a whole number from 1 to 9999"),
    "order": Field("as-is", r"as-is|mixed", "as-is or mixed"),
}


@dataclass(frozen=True)
class Adjusted:
    """A task with two fields, and one without."""

    brief: bool = False
    name: str = "adjusted"
    version: int = 1
    suite: str = "toys"
    has_lengths: bool = True
    protocols: tuple[str, ...] = ("plain", "other")
    fields = FIELDS

    def expand(self, profile):
        return expanded(self.name, self.protocols, FIELDS, profile, self.brief)

    def samples(self, setting, tokenizer):
        ids = np.array(tokenizer.encode(setting.protocol), dtype=np.int32)
        return [
            Sample(str(i), (Generate(Prompt(ids, setting.protocol), 3),), ("x",)) for i in range(setting.samples or 4)
        ]

    def data_digest(self, setting):
        return setting.protocol

    def score(self, sample, responses):
        return []


class Plain:
    """A task without fields."""

    name, protocols = "plain", ("exact",)


def test_a_protocol_says_every_field_or_with_brief_those_that_differ():
    assert Adjusted().expand("plain") == ("plain:pairs=4:order=as-is",)
    assert Adjusted().expand("other:order=mixed") == ("other:pairs=4:order=mixed",)
    assert Adjusted(brief=True).expand("plain") == ("plain",)
    assert Adjusted(brief=True).expand("plain:pairs=5:order=as-is") == ("plain:pairs=5",)
    assert isinstance(Adjusted(), Adjustable)


def test_several_values_ask_for_every_combination():
    assert Adjusted(True).expand("plain:pairs=4/8/8:order=mixed/as-is") == (
        "plain:order=mixed",
        "plain",
        "plain:pairs=8:order=mixed",
        "plain:pairs=8",
    )


@given(st.integers(1, 9999), st.sampled_from(["as-is", "mixed"]), st.booleans())
def test_what_was_expanded_expands_to_itself(pairs, order, brief):
    (text,) = Adjusted(brief).expand(f"plain:order={order}:pairs={pairs}")
    assert Adjusted(brief).expand(text) == (text,)
    assert field_values(FIELDS, text) == {"pairs": str(pairs), "order": order}


WRONG = [
    ("mixed", "has no profile 'mixed'; it has plain, other"),
    ("plain:pairs", "has no field 'pairs', or is given it twice: pairs=4, order=as-is"),
    ("plain:pears=3", "has no field 'pears=3'"),
    ("plain:pairs=1:pairs=2", "has no field 'pairs=2', or is given it twice"),
    ("plain:pairs=0", "pairs '0' of adjusted is not a whole number from 1 to 9999"),
    ("plain:pairs=4/x", "pairs 'x' of adjusted is not a whole number"),
    ("plain:pairs=", "pairs '' of adjusted is not"),
    ("plain:order=MIXED", "order 'MIXED' of adjusted is not as-is or mixed"),
    ("plain:", "has no field ''"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_none_is_refused_in_one_line(text, message):
    for task in (Adjusted(), Adjusted(brief=True)):
        with pytest.raises(UserError) as caught:
            check_profile([task], text)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(UserError):
            check_profile([Chosen(task, text)], None)


def test_each_combination_is_a_cell_of_its_own():
    task = Adjusted()
    ask = Ask((256, 512), 2, "plain:pairs=1/2")
    backend = ScriptedBackend(nothing)
    plan = make_plan(backend, [task], ask)
    found = [(cell.setting.protocol, cell.setting.length, len(cell.entries)) for cell in plan.cells]
    assert found == [
        ("plain:pairs=1:order=as-is", 256, 2),
        ("plain:pairs=1:order=as-is", 512, 2),
        ("plain:pairs=2:order=as-is", 256, 2),
        ("plain:pairs=2:order=as-is", 512, 2),
    ]
    assert len({entry.key for cell in plan.cells for entry in cell.entries}) == 8
    check_data([task], ask)


def test_what_a_suite_chose_stands_and_the_command_fills_the_rest():
    task = Adjusted(brief=True)
    chosen = [Chosen(task, "plain:pairs=9", (1024,), 3), Chosen(task), task]
    got = [(one.protocol, one.length, one.samples) for _, one in settings(chosen, Ask((256,), None, "other"))]
    assert got == [("plain:pairs=9", 1024, 3), ("other", 256, None)]
    assert {one.samples for _, one in settings(chosen, Ask((256,), 1))} == {1}
    assert chosen[0].name == "adjusted" and chosen[0].protocols == task.protocols


def test_of_one_cell_asked_for_twice_the_larger_counts():
    task = Adjusted(brief=True)
    for counts, most in (((3, 8), 8), ((8, 3), 8), ((3, None), None), ((None, 3), None)):
        (cell,) = settings([Chosen(task, samples=count) for count in counts], Ask((256,)))
        assert cell[1].samples == most


def test_fields_are_listed_with_the_tasks_that_have_them():
    header, rows = field_table([Adjusted(), Adjusted(True, name="second"), Plain()])
    assert header[:2] == ("field", "default")
    assert rows == [
        ("pairs", "4", "a whole number from 1 to 9999", "adjusted, second"),
        ("order", "as-is", "as-is or mixed", "adjusted, second"),
    ]


def test_every_task_s_fields_are_good():
    """Defaults are values, several where a default holds several, and none of them breaks the syntax."""
    for name in tasks.names():
        task = tasks.get(name)
        if isinstance(task, Adjustable):
            for profile in task.protocols:
                found = task.expand(profile)
                assert len(found) == len(set(found)) >= 1
                assert all(task.expand(protocol) == (protocol,) for protocol in found)
            assert not [one for one in task.fields.values() if set(one.default) & set(":=,")]
