"""Tasks by name and by suite."""

from dataclasses import replace
from types import ModuleType

import pytest

import tasks
from gdn2.errors import UserError
from tasks.ruler.niah import TASKS


def module(name: str, **table: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(table)
    return made


def test_ruler_is_there() -> None:
    assert {task.name for task in TASKS} <= set(tasks.names())
    assert [task.name for task in tasks.suite("niah-paper")] == [
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
    ]
    assert len(tasks.suite("ruler")) == 8
    assert "niah-paper" in tasks.suites()


def test_resolve_keeps_the_order_and_repeats_nothing() -> None:
    found = [task.name for task in tasks.resolve("niah_multikey_1, niah-paper,niah_single_1")]
    assert found == ["niah_multikey_1", "niah_single_1", "niah_single_2", "niah_single_3"]


@pytest.mark.parametrize("text", ["niah_singel_1", "rular", "", "ruler,", "ruler;niah_single_1", "NIAH_SINGLE_1"])
def test_unknown_names_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="no task or suite") as caught:
        tasks.resolve(text)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_close_names_are_offered() -> None:
    with pytest.raises(UserError, match="niah_single_1"):
        tasks.get("niah_singel_1")
    with pytest.raises(UserError, match="ruler"):
        tasks.suite("rular")


def test_a_name_used_twice_raises() -> None:
    one = module("one", TASKS=TASKS[:2])
    with pytest.raises(ValueError, match="niah_single_1.*two"):
        tasks.collect([one, module("two", TASKS=TASKS[:1])])
    with pytest.raises(ValueError, match="suite 'a'.*two"):
        tasks.collect([module("one", SUITES={"a": ()}), module("two", SUITES={"a": ()})])
    with pytest.raises(ValueError, match="nothing"):
        tasks.collect([module("one", SUITES={"a": ("nothing",)})])


def test_a_new_module_needs_no_other_edit() -> None:
    class Other:
        name, suite = "mine", "my-suite"

    found, suites = tasks.collect([module("empty"), module("new", TASKS=[Other(), replace(TASKS[0], version=2)])])
    assert set(found) == {"mine", "niah_single_1"}
    assert suites == {"my-suite": ("mine",), "ruler": ("niah_single_1",)}
