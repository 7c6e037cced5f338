"""What the page says, in plain JSON types: runs, models, question sets, cells, and accuracy by depth.

Everything refers to everything else by its place in a list: a cell names its model and its question set, a sample its
cell. Shares of 0 to 1 are given in percent, other scores in their own unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evalsuite.reports import pivot
from evalsuite.reports.cells import (
    CELL,
    FAMILIES,
    MIXERS,
    QUESTIONS,
    TASKS,
    asked_for,
    length_label,
    model_key,
    names,
    rank,
    separated,
    shown,
    size_label,
    summary,
    task_label,
)
from evalsuite.reports.frame import Records
from evalsuite.reports.grid import text
from gdn2.errors import DataError, UserError

KEYS = [*CELL, "run"]
MOST = 100_000  # records whose effective lengths are resampled; a million would take minutes
# What is added to a task's name where the records hold several of its question sets.
_TOLD_APART = {"metric": "", "protocol": "", "task_version": "v", "data": "data "}
FEW = 10  # samples: fewer in a depth bin are drawn smaller


class Cells:
    """The cells of `records` with their models and question sets, each in the order they are shown.

    `rows` holds every record, scored or failed, with a column `cell`: its place in `cells`. Raises DataError where
    there are no records.
    """

    def __init__(self, records: Records) -> None:
        import pandas as pd

        self.records = records
        table = summary(records)
        if not len(table):
            raise DataError("these records hold nothing to report")
        entries: list[dict[str, Any]] = table.to_dict("records")
        others = {entry["metric"] for entry in entries if not entry["shares"]}
        for entry in entries:
            entry["shares"] = entry["metric"] not in others  # read one way in all cells of a metric
        models = _models(entries)
        sets = _sets(entries)
        entries.sort(key=lambda entry: (sets[_set(entry)], models[model_key(entry)], entry["length"]))
        self.entries = entries
        labels = names(entries)
        self.models = [_model_content(key, labels[key]) for key in models]
        self.sets = [_set_content(key, entries, list(sets)) for key in sets]
        self.cells = [_cell_content(entry, models[model_key(entry)], sets[_set(entry)]) for entry in entries]
        parts = [part for part in separated(records) if len(part)]
        self.rows = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0].reset_index(drop=True)
        self.rows["cell"] = self._places()

    def _places(self) -> Any:
        """The cell of each row, as an array [rows]."""
        import numpy as np

        places = {tuple(entry[name] for name in KEYS): i for i, entry in enumerate(self.entries)}
        groups = self.rows.groupby(KEYS, observed=True, sort=False)
        first = groups.head(1)
        numbers = groups.ngroup().to_numpy()
        found = np.empty(len(first), dtype=np.int64)
        keys = first[KEYS].itertuples(index=False, name=None)
        found[numbers[first.index]] = [places[key] for key in keys]
        return found[numbers]

    def depth(self) -> dict[str, Any]:
        """Mean and count by cell and bin of the needle's depth: `rows` of (cell, bin, percent, samples)."""
        shares = {i for i, cell in enumerate(self.cells) if self.sets[cell["set"]]["share"] and cell["length"]}
        rows = self.rows
        deep = rows[rows["depth"].notna() & rows["score"].notna() & rows["cell"].isin(shares)]
        if not len(deep):
            return {"bins": 0, "few": FEW, "rows": []}
        bins = 10 if deep.groupby("cell").size().median() >= 10 * FEW else 5
        place = (deep["depth"] * bins).clip(upper=bins - 1e-9).astype(int)
        groups = deep.groupby([deep["cell"], place.rename("bin")])["score"].agg(["mean", "size"])
        found = [(int(c), int(b), _rounded(100 * mean), int(n)) for (c, b), mean, n in groups.itertuples(name=None)]
        return {"bins": bins, "few": FEW, "rows": found}

    def effective(self) -> dict[str, Any]:
        """Effective context lengths: (model, family, task, a text for each threshold); or why there are none."""
        if len(self.records.frame) > MOST:
            return {"rows": [], "reason": "gdn2-eval tables --effective has them: there are too many records here"}
        try:
            grid = pivot.effective(self.records)
        except DataError:
            return {"rows": [], "reason": ""}
        except UserError as error:
            return {"rows": [], "reason": str(error)}
        heads = grid.heads
        rows = [
            (line.labels[0], line.section, heads[group[0]].group, *(text(line.cells[i], heads[i]) for i in group))
            for group in grid.groups()
            for line in grid.lines
            if any(line.cells[i] for i in group)
        ]
        return {"rows": rows, "reason": ""}

    def runs(self, statuses: Mapping[str, str], part: bool) -> list[dict[str, Any]]:
        """What each run is and how much of it is there.

        `statuses`: of the runs whose directory is known. `part`: the records are a part of what was asked.
        """
        here = {(*(entry[name] for name in QUESTIONS[:-1]), entry["length"]) for entry in self.entries}
        asked: dict[str, int] = {}
        for (run_id, *questions), count in asked_for(self.records).items():
            if not part or tuple(questions) in here:
                asked[str(run_id)] = asked.get(str(run_id), 0) + count
        rows = self.rows
        samples = rows.drop_duplicates("key")
        answered = samples[samples["error"] == ""].groupby("run_id", observed=True).size()
        failed = samples[samples["error"] != ""].groupby("run_id", observed=True).size()
        first = rows.drop_duplicates("run_id").set_index("run_id")
        last = rows.groupby("run_id", observed=True)["created_at"].max()
        found = []
        for run_id in sorted(first.index):
            named = {name: first.loc[run_id, name] for name in ("model", "family", "mixer", "checkpoint")}
            found.append(
                {"id": run_id, **named, "params": int(first.loc[run_id, "params"])}
                | {"answered": int(answered.get(run_id, 0)), "failed": int(failed.get(run_id, 0))}
                | {"asked": asked.get(run_id), "status": statuses.get(run_id, "")}
                | {"until": str(last[run_id])[:19]}
                | _provenance(self.records.runs.get(run_id, {}))
            )
        return found


def train_lengths(records: Records) -> list[int]:
    """Lengths the models were trained at, where their runs say so."""
    found = (_within(run, "model", "details", "train_length") for run in records.runs.values())
    return sorted({value for value in found if isinstance(value, int) and value > 0})


def _within(content: object, *names: str) -> Any:
    """What a run.json says below `names`; None where it does not: another program may have written it."""
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _provenance(run: Mapping[str, Any]) -> dict[str, Any]:
    last = run["invocations"][-1] if run.get("invocations") else {}
    commit = str(_within(last, "provenance", "code", "commit") or "")[:10]
    changes = "+changes" if _within(last, "provenance", "code", "dirty") else ""
    version = str(_within(last, "provenance", "packages", "gdn2-eval") or "")
    compute, options = (_within(run, "identity", name) for name in ("compute", "options"))
    seed = _within(run, "identity", "seed")
    return {
        "software": " ".join(filter(None, [version, commit + changes])),
        "torch": str(_within(last, "provenance", "packages", "torch") or ""),
        "compute": ", ".join(map(str, compute.values())) if isinstance(compute, Mapping) else "",
        "settings": ", ".join(f"{n} {v}" for n, v in sorted(options.items())) if isinstance(options, Mapping) else "",
        "seed": seed if isinstance(seed, int) else None,
    }


def _set(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in QUESTIONS)


def _models(entries: list[dict[str, Any]]) -> dict[tuple[Any, ...], int]:
    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        family, model, checkpoint, mixer, params, run = key
        return rank(family, FAMILIES), rank(mixer, MIXERS), params, model, checkpoint, run

    return {key: i for i, key in enumerate(sorted({model_key(entry) for entry in entries}, key=order))}


def _sets(entries: list[dict[str, Any]]) -> dict[tuple[Any, ...], int]:
    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return rank(key[0], tuple(TASKS)), [_natural(str(part)) for part in key[1:]]

    return {key: i for i, key in enumerate(sorted({_set(entry) for entry in entries}, key=order))}


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which pairs=8 comes before pairs=16."""
    parts = re.findall("([0-9]{1,18})|([^0-9]+)", text)
    return [(0, int(number), "") if number else (1, 0, word) for number, word in parts]


def _model_content(key: tuple[Any, ...], name: str) -> dict[str, Any]:
    family, _, _, mixer, params, _ = key
    return {"name": name, "family": family, "mixer": mixer, "size": size_label(int(params))}


def _set_content(key: tuple[Any, ...], entries: list[dict[str, Any]], sets: list[tuple[Any, ...]]) -> dict[str, Any]:
    named = dict(zip(QUESTIONS, key, strict=True))
    alike = [dict(zip(QUESTIONS, other, strict=True)) for other in sets if other[0] == key[0]]
    told = []
    for name, prefix in _TOLD_APART.items():
        values = {str(other[name]) for other in alike}
        if len(values) > 1:
            # Of profiles with fields, such as lines:pairs=64:gap=0, the fields that differ.
            fields = (value.split(":") for value in values)
            common = set.intersection(*map(set, fields)) if name == "protocol" else set()
            own = [part for part in str(named[name]).split(":") if part not in common] or [str(named[name])]
            told.append(prefix + (own[0][:8] if name == "data" else ":".join(own)))
    label = task_label(named["task"]) + (f" ({', '.join(told)})" if told else "")
    share = next(entry["shares"] for entry in entries if _set(entry) == key)
    shown = {name: named[name] for name in ("task", "protocol", "metric")}
    return {"label": label, "version": int(named["task_version"]), "data": named["data"][:8], "share": share, **shown}


def _cell_content(entry: Mapping[str, Any], model: int, questions: int) -> dict[str, Any]:
    mean, low, high = map(_rounded, shown(entry))
    counts = {name: int(entry[name]) for name in ("n", "asked", "errors")}
    return {
        "model": model,
        "set": questions,
        "length": int(entry["length"]),
        "label": length_label(int(entry["length"])),
        "mean": mean,
        "low": low,
        "high": high,
        "tokens": _rounded(entry["prompt_mean"]),
        **counts,
    }


def _rounded(value: float) -> float | None:
    """Six significant digits; None for NaN."""
    return None if value != value else float(f"{value:.6g}")
