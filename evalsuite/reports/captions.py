"""What a caption says of the records behind a table: how the tasks were asked, of which data, with which software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from evalsuite.reports.cells import TASKS, task_label
from evalsuite.reports.frame import Records
from evalsuite.reports.grid import Note


def described(records: Records, entries: Sequence[Mapping[str, Any]]) -> list[Note]:
    """Notes on the cells `entries` (rows of `cells.summary`): protocols, metrics, versions, seeds, software."""
    notes = []
    if any(entry["task"] in TASKS for entry in entries):
        notes.append(Note("Intervals hold for this haystack, which samples share unless haystack_offset is random."))
    for name, text in (("protocol", "Protocol"), ("metric", "Metric")):
        notes.append(Note(text, tuple(sorted({entry[name] for entry in entries}))))
    versions = sorted({(task_label(e["task"]), e["task_version"], e["data"][:8]) for e in entries})
    notes.append(Note("Task versions and data", tuple(f"{t} v{v} {d}" for t, v, d in versions)))
    if seeds := sorted({int(seed) for seed in records.frame["seed"].unique()}):
        notes.append(Note("Seeds: " + ", ".join(map(str, seeds)) + "."))
    notes += _made_by(records)
    if problems := tuple(dict.fromkeys(entry["problem"] for entry in entries if entry["problem"])):
        notes.append(Note("Without a number here", problems))
    if software := _software(records):
        notes.append(Note("Software", software))
    return notes


def _made_by(records: Records) -> list[Note]:
    """With which lm-eval numbers of all samples together are made, and recorded where that is another one."""
    if not (records.frame["item"] != "").any():
        return []
    started = [each for run in records.runs.values() for each in run["invocations"]]
    packages = [each.get("provenance", {}).get("packages") for each in started]
    recorded = sorted({str(found["lm-eval"]) for found in packages if isinstance(found, dict) and "lm-eval" in found})
    try:
        here = version("lm-eval")
    except PackageNotFoundError:
        return []
    others = tuple(name for name in recorded if name != here)
    text = f"Numbers of all samples together are made by lm-eval {here}"
    return [Note(f"{text}; their records by lm-eval", others) if others else Note(f"{text}.")]


def _software(records: Records) -> tuple[str, ...]:
    found = set()
    for run in records.runs.values():
        for invocation in run["invocations"]:
            provenance = invocation.get("provenance", {})
            parts = (provenance.get(name) for name in ("packages", "code"))
            packages, code = (part if isinstance(part, dict) else {} for part in parts)
            commit = str(code.get("commit", ""))[:10] + ("+changes" if code.get("dirty") else "")
            own = " ".join(filter(None, ["gdn2-eval", str(packages.get("gdn2-eval") or ""), commit]))
            found.add(f"{own}, torch {packages.get('torch', '?')}")
    return tuple(sorted(found))
