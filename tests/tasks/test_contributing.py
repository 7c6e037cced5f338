"""The task that CONTRIBUTING shows is whole: it is found, run and scored as it stands."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cli
import tasks
from evalsuite.backends.scripted import ScriptedBackend, nothing
from evalsuite.plan import Ask, make_plan
from evalsuite.runner import run
from evalsuite.store import read_records


@pytest.fixture
def shown(root: Path, tmp_path: Path) -> ModuleType:
    """The example as a module of its own file."""
    (code,) = re.findall(r"```python\n(.*?)```", (root / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    file = tmp_path / "counting.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("counting_example", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def counted(text: str) -> str:
    """The next number after a row of them."""
    return f" {int(text.split()[-1]) + 1} and so on"


def test_it_is_found_without_another_edit(shown: ModuleType) -> None:
    found, suites = tasks.collect([shown])
    assert list(found) == ["counting"] and suites == {"counting": ("counting",)}


def test_it_imports_only_what_tasks_may(shown: ModuleType) -> None:
    tree = ast.parse(Path(shown.__file__).read_text("utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.startswith(("evalsuite", "gdn2", "tasks"))} == {"evalsuite.types"}


@pytest.mark.parametrize(("answer", "score"), [(counted, 1.0), (nothing, 0.0)])
def test_it_runs_and_is_scored(shown: ModuleType, tmp_path: Path, answer: object, score: float) -> None:
    backend = ScriptedBackend(answer)
    plan = make_plan(backend, shown.TASKS, Ask((), 5))
    outcome = run(plan, backend, tmp_path / "run", {}, lambda text: None)
    records = read_records(tmp_path / "run")
    assert outcome.exit_code == 0 and len(records) == 5
    assert {(one.task, one.metric, one.score, one.error) for one in records} == {("counting", "exact", score, None)}
    assert len(make_plan(backend, shown.TASKS, Ask(())).cells[0].entries) == 20


def test_it_is_listed_and_run_by_name(
    shown: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "_registry", lambda: tasks.collect([shown]))
    monkeypatch.setattr(tasks.suitefile, "packaged", lambda: [])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["list", "tasks"]) == 0 and "counting" in capsys.readouterr().out
    assert cli.main(["run", "--model", "scripted:nothing", "--tasks", "counting", "--samples", "2"]) == 0
    assert re.search(r"counting +plain +- +exact +2 +0 +0\.0000", capsys.readouterr().out)
