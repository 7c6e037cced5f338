"""`run.json`: what a run is, and one entry for every time it was started.

`status` of the last entry is `running` until the process ends in its own way; a killed one leaves it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from evalsuite import groups
from evalsuite.plan import Plan
from evalsuite.schema import NewerSchemaError
from evalsuite.store import now, read_json, write_json
from gdn2.errors import DataError

VERSION = 1
NAME = "run.json"


def start(directory: Path, plan: Plan, passed: Mapping[str, object], provenance: Mapping[str, object]) -> None:
    """Add an invocation to the run of `plan` at `directory`, making the file where there is none.

    Args:
        passed: the settings as given; the resolved ones are added from `plan`.

    Raises DataError where the directory belongs to a run of another identity.
    """
    path = directory / NAME
    if path.exists():
        content = read(directory)
        _check_identity(path, content["identity"], plan.identity)
    else:
        content = {"version": VERSION, "id": plan.run_id, "identity": dict(plan.identity), "model": asdict(plan.info)}
        content |= {"totals": {"samples": 0, "tokens": 0, "seconds": 0.0}, "invocations": []}
    cells = [
        {"task": cell.task.name, "task_version": cell.task.version, "data": cell.data}
        | {"protocol": cell.setting.protocol, "length": cell.setting.length, "samples": len(cell.entries)}
        | {"seed": cell.setting.seed, "options": dict(cell.setting.options)}
        | {"complete": getattr(cell.task, "examples", None), "lower": list(getattr(cell.task, "lower", ()))}
        for cell in plan.cells
    ]
    invocation: dict[str, object] = {"started_at": now(), "ended_at": None, "status": "running", "passed": dict(passed)}
    invocation |= {"resolved": cells, "groups": groups.content(plan.averaged), "provenance": dict(provenance)}
    write_json(path, content | {"status": "running", "invocations": [*content["invocations"], invocation]})


class Done(Protocol):
    """What one invocation did; see `evalsuite.runner.Outcome`."""

    @property
    def answered(self) -> int:
        """Samples stored."""

    @property
    def tokens(self) -> int:
        """Asked for by those samples."""

    @property
    def seconds(self) -> float:
        """It took."""

    @property
    def lost(self) -> tuple[int, ...]:
        """Processes that never came back."""

    @property
    def report(self) -> Mapping[str, object]:
        """Of the backend."""


def finish(directory: Path, done: Done, status: str) -> None:
    """Close the last invocation: `status`, and what was done."""
    content = read(directory)
    totals = content["totals"]
    content["status"] = status
    content["totals"] = {
        "samples": totals["samples"] + done.answered,
        "tokens": totals["tokens"] + done.tokens,
        "seconds": round(totals["seconds"] + done.seconds, 3),
    }
    content["invocations"][-1] |= {
        "ended_at": now(),
        "status": status,
        "samples": done.answered,
        "tokens": done.tokens,
        "seconds": round(done.seconds, 3),
        "report": dict(done.report),
        "lost_processes": list(done.lost),
    }
    write_json(directory / NAME, content)


def read(directory: Path) -> dict[str, Any]:
    """The content of a run's file. Raises DataError where it is missing, damaged or of a later version."""
    path = directory / NAME
    content: dict[str, Any] = read_json(path)
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise NewerSchemaError(f"{path}: version {version} is newer than {VERSION}: update gdn2-eval to read it")
    for name, kind in {"id": str, "identity": dict, "model": dict, "totals": dict, "invocations": list}.items():
        if not isinstance(content.get(name), kind):
            raise DataError(f"cannot read {path}: {name} is missing or not a {kind.__name__}")
    if odd := _odd_entry(content):
        raise DataError(f"cannot read {path}: {odd} is not what a run writes there")
    _empty_unless_object(content["model"], "details")
    for invocation in content["invocations"]:
        _empty_unless_object(invocation, "passed")
        _empty_unless_object(invocation, "provenance")
    return content


def _empty_unless_object(holder: dict[str, Any], name: str) -> None:
    """What is only there to be shown says nothing where it is no object."""
    if not isinstance(holder.get(name, {}), dict):
        holder[name] = {}


# Of a cell that an invocation asked, and the types of what readers take from it.
_CELL: dict[str, tuple[type, ...]] = {
    "task": (str,), "task_version": (int,), "protocol": (str,), "data": (str,), "length": (int, type(None)),
    "samples": (int,), "complete": (int, type(None)), "lower": (list,),
}  # fmt: skip


def _odd_entry(content: Mapping[str, Any]) -> str:
    """The first entry of another type than a run writes among those that readers count with, "" without one."""
    if odd := [name for name, value in content["totals"].items() if type(value) not in (int, float)]:
        return f"totals.{odd[0]}"
    for number, invocation in enumerate(content["invocations"]):
        where = f"invocations[{number}]"
        if not isinstance(invocation, dict):
            return where
        if not isinstance(invocation.get("resolved", []), list):
            return f"{where}.resolved"
        for place, cell in enumerate(invocation.get("resolved", ())):
            if not isinstance(cell, dict):
                return f"{where}.resolved[{place}]"
            said: dict[str, Any] = {"complete": None, "lower": []} | cell  # which older runs do not say
            if odd := [name for name, kinds in _CELL.items() if name not in said or type(said[name]) not in kinds]:
                return f"{where}.resolved[{place}].{odd[0]}"
    return ""


def rate(directory: Path) -> float | None:
    """Tokens a second of this run so far, None before it answered anything."""
    if not (directory / NAME).exists():
        return None
    totals = read(directory)["totals"]
    return totals["tokens"] / totals["seconds"] if totals["tokens"] and totals["seconds"] else None


def _check_identity(path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise DataError(
                f"{path} belongs to a run whose {name} is {found.get(name)!r:.80}, not {wanted.get(name)!r:.80}: "
                "move it away, runs are never mixed"
            )
