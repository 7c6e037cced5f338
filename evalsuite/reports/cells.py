"""Cells: the records of one model on one question set at one length, summed up.

A question set is a task with its version, data, protocol and metric. Scores of different sets are never averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from evalsuite import groups
from evalsuite.reports.frame import Records
from evalsuite.reports.measured import COUNTS, PART, measure
from evalsuite.scorers import PERPLEXITIES, perplexity
from evalsuite.stats import Interval
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MODEL = ["family", "model", "checkpoint", "mixer", "params"]
QUESTIONS = ["task", "task_version", "protocol", "data", "metric"]
CELL = [*MODEL, *QUESTIONS, "length"]
MEMBER = [*MODEL, "run", *QUESTIONS, "length"]
TASK = MEMBER.index("task")

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

# Aggregates of all samples that are read in percent, as shares are.
PERCENT = frozenset({"lm_eval:f1", "lm_eval:matthews_corrcoef"})
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
    """The records of each cell, by the values of `MODEL`, `run` (see `separated`), `QUESTIONS` and length.

    A group's (see `evalsuite.groups`) are those of its tasks, made ready for `evalsuite.reports.measured`.
    """
    frame, _ = separated(records)
    found = dict(iter(frame.groupby(MEMBER, observed=True)))
    sizes = {key: len(rows) for key, rows in found.items()}
    of_groups = {f.key: _grouped([found[key] for key in f.keys], f.weights) for f in _formed(records, sizes)}
    return found | of_groups


def _grouped(parts: Sequence[pd.DataFrame], weights: Sequence[int]) -> pd.DataFrame:
    import pandas as pd

    placed = [part.assign(**{PART: i, COUNTS: weights[i]}) for i, part in enumerate(parts)]
    return pd.concat(placed, ignore_index=True)


class _Formed(NamedTuple):
    """A cell of a group: its key, those of the cells it averages, and what each of them counts."""

    key: tuple[Any, ...]
    keys: list[tuple[Any, ...]]
    weights: list[int]


def _formed(records: Records, sizes: Mapping[tuple[Any, ...], int]) -> Iterator[_Formed]:
    """The cells of groups, from the number of samples of each cell of a task, by keys as of `members`.

    A group has one where each of its tasks was asked, in one way.
    """
    models: dict[tuple[Any, ...], dict[str, dict[str, list[tuple[Any, ...]]]]] = {}
    for key in sizes:
        named = dict(zip(MEMBER, key, strict=True))
        metrics = models.setdefault(model_key(named), {}).setdefault(named["task"], {})
        metrics.setdefault(named["metric"], []).append(key)
    known = {name: group for run in records.runs.values() for name, group in groups.read(run).items()}
    for model, tasks in models.items():
        for group in (group for group in known.values() if all(task in tasks for task in group.tasks)):
            for averaged, metric in group.numbers(tasks):
                keys = [tasks[task][metric] for task in group.tasks if metric in tasks[task]]
                one = [several[0] for several in keys]
                if any(len(several) > 1 for several in keys):
                    continue
                counts = [max(sizes[key] for several in tasks[key[TASK]].values() for key in several) for key in one]
                weights = counts if averaged.by_size else [1] * len(one)
                asked = [key for task in group.tasks for several in tasks[task].values() for key in several]
                yield _Formed(_group_key(model, group.name, metric, asked), one, weights)


def _group_key(model: tuple[Any, ...], name: str, metric: str, asked: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Key of a group's cell; its data are those of all cells `asked` of its tasks, and how they were asked."""
    parts = [dict(zip(MEMBER, key, strict=True)) for key in asked]
    protocols = list(dict.fromkeys(part["protocol"] for part in parts))
    told = sorted({tuple(part[name] for name in QUESTIONS[:-1]) for part in parts})
    question = {"task": name, "task_version": 1, "protocol": protocols[0] if len(protocols) == 1 else "several"}
    question |= {"data": sha256(json.dumps(told, default=int).encode()).hexdigest(), "metric": metric}
    return (*model, *(question[name] for name in QUESTIONS), 0)


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
    """One row a cell, those of groups after those of their tasks.

    Columns: those of `CELL` and `run` (see `separated`); mean, low, high (scores as recorded, 95 % interval), method,
    n (samples), asked (samples the runs were to answer, at least n + errors), errors, prompt_min and prompt_mean
    (tokens), shares (read in percent: scores within 0..1), lower (whether less is better), runs (their ids),
    problem (why there is no number, "" where there is one). Scores count by their weights.
    """
    import pandas as pd

    frame, errors_of = separated(records)
    frame["sample"] = frame.groupby(["seed", "sample_id"], observed=True, sort=False).ngroup()
    asked, lower = asked_for(records), _lower(records)
    failed = errors_of.groupby(MEMBER, observed=True).size().to_dict() if len(errors_of) else {}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    found = dict(iter(frame.groupby(MEMBER, observed=True)))
    for key, group in found.items():
        named, errors = dict(zip(MEMBER, key, strict=True)), int(failed.pop(key, 0))
        runs = sorted(group["run_id"].unique())
        rows[key] = named | {"runs": tuple(runs)} | _measure(group, errors, _planned(named, runs, asked))
        plain = named["metric"].partition(",")[0]  # without the filter that lm-eval's answers went through
        rows[key]["lower"] = named["metric"] in PERPLEXITIES or (named["task"], plain) in lower
    # A number whose range is not known may stand beside shares of the same name: then all are shown as they are.
    unknown = [key for key, group in found.items() if not {"", *PERCENT} >= set(group["aggregation"].unique())]
    others = {rows[key]["metric"] for key in unknown}
    for row in rows.values():
        row["shares"] &= row["metric"] not in others
    # Cells in which every sample failed are cells too.
    empty: dict[str, object] = dict.fromkeys(("mean", "low", "high", "prompt_min", "prompt_mean"))
    empty |= {"method": "", "n": 0, "shares": True, "lower": False, "runs": (), "problem": ""}
    for key, errors in failed.items():
        rows[key] = dict(zip(MEMBER, key, strict=True)) | empty | {"asked": errors, "errors": errors}
    for formed in _formed(records, {key: len(group) for key, group in found.items()}):
        rows[formed.key] = _group_row(formed, [rows[key] for key in formed.keys], [found[key] for key in formed.keys])
    floats = ["mean", "low", "high", "prompt_min", "prompt_mean"]
    return pd.DataFrame(list(rows.values())).astype(dict.fromkeys(floats, "float64")) if rows else pd.DataFrame()


def _group_row(formed: _Formed, rows: Sequence[Mapping[str, Any]], parts: Sequence[pd.DataFrame]) -> dict[str, Any]:
    made = _measure(_grouped(parts, formed.weights), 0, 0)
    sums = {name: sum(row[name] for row in rows) for name in ("asked", "errors")}
    sums |= {"n": 0 if any(row["problem"] for row in rows) else made["n"]}
    shared = {name: all(row[name] for row in rows) for name in ("shares", "lower")}
    runs = sorted({run for row in rows for run in row["runs"]})
    return dict(zip(MEMBER, formed.key, strict=True)) | made | sums | shared | {"runs": tuple(runs)}


def _lower(records: Records) -> set[tuple[str, str]]:
    """(task, metric) of which less is better, as the runs say."""
    cells = (cell for run in records.runs.values() for started in run["invocations"] for cell in started["resolved"])
    return {(str(cell["task"]), str(metric)) for cell in cells for metric in cell.get("lower") or ()}


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
    """Of one cell's records. Where their number cannot be made here there is none, and `problem` says why."""
    nothing = float("nan")
    n = len(group) if PART in group else group["sample"].nunique()
    try:
        found, problem = measure(group), ""
    except DataError as error:
        found, problem = Interval(nothing, nothing, nothing, 0, "bootstrap"), str(error)
    percent = group["aggregation"].isin(PERCENT)
    shares = bool((group["score"].between(0, 1) | percent).all()) and group["metric"].iloc[0] not in UNBOUNDED
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "method": found.method,
        "n": found.n,
        "asked": max(planned, n + errors),
        "errors": errors,
        "prompt_min": float(group["prompt_tokens"].min()),
        "prompt_mean": float(group["prompt_tokens"].mean()),
        "shares": shares,
        "problem": problem,
    }
