"""What every task keeps to."""

import re

import pytest

import tasks
from evalsuite.types import Adjustable
from tasks.data import commands


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_keeps_to_the_contract(name: str) -> None:
    task = tasks.get(name)
    assert task.name == name and re.fullmatch(r"[a-z0-9_]+", name)
    assert isinstance(task.version, int) and task.version >= 1
    assert task.suite in tasks.suites()
    assert task.protocols and len(set(task.protocols)) == len(task.protocols)
    assert isinstance(task.has_lengths, bool)
    if isinstance(task, Adjustable):
        assert {protocol.split(":")[0] for protocol in task.expand(task.protocols[0])} == {task.protocols[0]}
    for dataset in getattr(task, "datasets", ()):
        assert commands.known()[dataset.name].columns == dataset.columns
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", dataset.hub) and dataset.licence
