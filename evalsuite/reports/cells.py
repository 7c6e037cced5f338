"""Cells: the records of one model on one question set at one length, summed up.

A question set is a task with its version, data, protocol and metric. Scores of different sets are never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evalsuite.reports.frame import Records
from evalsuite.scorers import PERPLEXITIES, perplexity
from evalsuite.stats import interval
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MODEL = ["family", "model", "checkpoint", "mixer", "params"]
QUESTIONS = ["task", "task_version", "protocol", "data", "metric"]
CELL = [*MODEL, *QUESTIONS, "length"]

FAMILIES = ("recurrent", "hybrid", "transformer", "other")
MIXERS = ("transformer", "mamba2", "gdn", "kda", "mamba3_siso", "mamba3_mimo", "gdn2")  # the paper's order
TASKS = {
    "niah_single_1": "S-NIAH-1",
    "niah_single_2": "S-NIAH-2",
    "niah_single_3": "S-NIAH-3",
    "niah_multikey_1": "MK-NIAH-1",
    "niah_multikey_2": "MK-NIAH-2",
    "niah_multikey_3": "MK-NIAH-3",
    "niah_multivalue": "MV-NIAH",
    "niah_multiquery": "MQ-NIAH",
    "vt": "VT",
    "cwe": "CWE",
    "fwe": "FWE",
    "qa_1": "QA-1",
    "qa_2": "QA-2",
}

UNBOUNDED = PERPLEXITIES | {"bits_per_byte", "value_logprob", "value_rank"}  # no shares, whatever their values


def task_label(task: str) -> str:
    """The task's name in the literature, else its own."""
    return TASKS.get(task, task)


def length_label(length: int) -> str:
    """Tokens for people: 512, 1K, 1.5K, 128K, 1M; empty for a task without lengths."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length >= size and length * 2 % size == 0:
            return f"{length / size:g}{unit}"
    return str(length) if length else ""


def rank(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """Sort key: names of `order` first, as they stand there, then the others by name."""
    return (order.index(name) if name in order else len(order), name)


def separated(records: Records) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frame and the errors with a column `run`: the run's id where the runs of a model may not be pooled, else "".

    They may not where two runs asked the model the same samples: under settings that no column shows, such as the
    tokenizer or a decoding limit.
    """
    frame, errors = records.frame, records.errors
    repeated = frame.loc[frame.duplicated([*CELL, "seed", "sample_id"], keep=False), MODEL]
    apart = set(repeated.drop_duplicates().itertuples(index=False, name=None))

    def named(rows: pd.DataFrame) -> pd.DataFrame:
        if not apart:
            return rows.assign(run="")
        models = rows[MODEL].itertuples(index=False, name=None)
        pairs = zip(models, rows["run_id"], strict=True)
        return rows.assign(run=[run_id if model in apart else "" for model, run_id in pairs])

    return named(frame), named(errors)


def members(records: Records) -> dict[tuple[Any, ...], pd.DataFrame]:
    """The records of each cell, by the values of `MODEL`, `run` (see `separated`), `QUESTIONS` and length."""
    frame, _ = separated(records)
    keys = [*MODEL, "run", *QUESTIONS, "length"]
    return dict(iter(frame.groupby(keys, observed=True)))


def model_key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row of tables: the model, and its run where runs may not be pooled."""
    return tuple(entry[name] for name in (*MODEL, "run"))


def member_key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a cell among `members`."""
    return (*model_key(entry), *(entry[name] for name in (*QUESTIONS, "length")))


def names(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], str]:
    """A name for each `model_key`: the run's, or the model's with the checkpoint where its name is not enough."""
    keys = {model_key(entry) for entry in entries}
    models = [(family, model) for family, model, *_ in {key[:-1] for key in keys}]
    found = {}
    for key in keys:
        family, model, checkpoint, *_, run = key
        found[key] = run or (f"{model} @{checkpoint[:8]}" if models.count((family, model)) > 1 else model)
    return found


def mixer_options(records: Records) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Options of a model's mixers by layer name, as its runs say them, by checkpoint."""
    found = {}
    for run in records.runs.values():
        config = run["model"].get("details", {}).get("config", {})
        found[str(run["model"].get("checkpoint"))] = config.get("mixers", {}) if isinstance(config, dict) else {}
    return found


def attention_windows(records: Records) -> dict[str, int]:
    """Widest window of attention of the hybrids among the models, by checkpoint."""
    models = [run["model"] for run in records.runs.values()]
    hybrids = {str(model.get("checkpoint")) for model in models if model.get("family") == "hybrid"}
    found = {}
    for checkpoint, mixers in mixer_options(records).items():
        windows = [o["window"] for o in mixers.values() if isinstance(o.get("window"), int)]
        if checkpoint in hybrids and windows:
            found[checkpoint] = max(windows)
    return found


def shown(entry: Mapping[str, Any]) -> tuple[float, float, float]:
    """Mean and interval of a cell as people read them: shares in percent, perplexities, anything else as recorded."""
    ends = (entry["mean"], entry["low"], entry["high"])
    if entry["metric"] in PERPLEXITIES:
        value, low, high = map(perplexity, ends)
    else:
        value, low, high = ((100 if entry["shares"] else 1) * x for x in ends)
    return value, low, high


def size_label(params: int) -> str:
    """Parameters for people: 1.1M, 1.3B; empty where unknown."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if params >= 0.9995 * size:  # what would round to a thousand of the smaller unit
            return f"{params / size:.3g}{unit}"
    return str(params) if params else ""


def summary(records: Records) -> pd.DataFrame:
    """One row a cell.

    Columns: those of `CELL` and `run` (see `separated`); mean, low, high (scores as recorded, 95 % interval), method,
    n (samples), asked (samples the runs were to answer, at least n + errors), errors, prompt_min and prompt_mean
    (tokens), shares (all scores within 0..1), runs (their ids). Scores count by their weights.
    """
    import pandas as pd

    frame, errors_of = separated(records)
    frame["sample"] = frame.groupby(["seed", "sample_id"], observed=True, sort=False).ngroup()
    keys = [*CELL, "run"]
    asked = asked_for(records)
    failed = errors_of.groupby(keys, observed=True).size().to_dict() if len(errors_of) else {}
    rows = []
    for key, group in frame.groupby(keys, observed=True):
        named, errors = dict(zip(keys, key, strict=True)), int(failed.pop(key, 0))
        runs = sorted(group["run_id"].unique())
        rows.append(named | {"runs": tuple(runs)} | _measure(group, errors, _planned(named, runs, asked)))
        rows[-1]["shares"] &= named["metric"] not in UNBOUNDED
    # Cells in which every sample failed are cells too.
    empty: dict[str, object] = dict.fromkeys(("mean", "low", "high", "prompt_min", "prompt_mean"))
    empty |= {"method": "", "n": 0, "shares": True, "runs": ()}
    for key, errors in failed.items():
        rows.append(dict(zip(keys, key, strict=True)) | empty | {"asked": errors, "errors": errors})
    floats = ["mean", "low", "high", "prompt_min", "prompt_mean"]
    return pd.DataFrame(rows).astype(dict.fromkeys(floats, "float64")) if rows else pd.DataFrame()


def asked_for(records: Records) -> dict[tuple[object, ...], int]:
    """Samples each run was to answer, by run id, task, task version, protocol, data and length."""
    asked: dict[tuple[object, ...], int] = {}
    for run_id, run in records.runs.items():
        try:
            for cell in (cell for invocation in run["invocations"] for cell in invocation["resolved"]):
                key = (run_id, *(cell[name] for name in QUESTIONS[:-1]), cell["length"] or 0)
                asked[key] = max(cell["samples"], cell.get("complete") or 0, asked.get(key, 0))
        except (KeyError, TypeError) as error:
            raise DataError(f"run.json of {run_id} does not say what was asked ({error!r:.80})") from None
    return asked


def _planned(cell: dict[str, Any], run_ids: Iterable[str], asked: dict[tuple[object, ...], int]) -> int:
    questions = (*(cell[name] for name in QUESTIONS[:-1]), cell["length"])
    return sum(asked.get((run_id, *questions), 0) for run_id in run_ids)


def _measure(group: pd.DataFrame, errors: int, planned: int) -> dict[str, Any]:
    samples = group["sample"].to_numpy()
    distinct = len(samples) == len(set(samples.tolist()))
    found = interval(group["score"].to_numpy(), None if distinct else samples, group["weight"].to_numpy())
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "method": found.method,
        "n": found.n,
        "asked": max(planned, found.n + errors),
        "errors": errors,
        "prompt_min": float(group["prompt_tokens"].min()),
        "prompt_mean": float(group["prompt_tokens"].mean()),
        "shares": bool(group["score"].between(0, 1).all()),
    }
