"""Made-up scores of every task of the paper's tables, and data/paperlike: the tables that follow from them.

They say nothing about any model. Run it after a change of a table's form, and read the difference before committing:

    PYTHONPATH=. python tests/evalsuite/paperlike.py
"""

import dataclasses
import hashlib
import math
import random
from pathlib import Path

from evalsuite.reports import frame, gridformats, paper, papertables, throughput
from evalsuite.schema import Record

HOME = Path(__file__).parent / "data" / "paperlike"
SAMPLES = 24
# name, mixer, family, parameters, skill, options of its mixers
MODELS = [
    ("toy-gdn2", "gdn2", "recurrent", 1_200_000, 0.8, {"gdn2": {"mixer": "gdn2"}}),
    ("toy-kda", "kda", "recurrent", 1_100_000, 0.3, {"kda": {"mixer": "kda"}}),
    ("toy-gdn2-neg", "gdn2", "recurrent", 1_200_000, 0.7, {"gdn2": {"mixer": "gdn2", "erase_max": 2}}),
    ("toy-mamba3-h", "mamba3", "hybrid", 1_300_000, 0.6, {"m": {"mixer": "mamba3", "rank": 4}}),
    ("toy-attention", "attention", "transformer", 1_000_000, 0.5, {"a": {"mixer": "attention"}}),
]
SPEEDS = [
    throughput.Speed("training", "gdn2-hybrid-1.3b", "hybrid", "gdn2", 4096, 4, 41_000.0, 60 << 30, "Toy GPU"),
    throughput.Speed("training", "gdn2-hybrid-1.3b", "hybrid", "gdn2", 16384, 1, 39_000.0, 61 << 30, "Toy GPU"),
    throughput.Speed("training", "kda-hybrid-1.3b", "hybrid", "kda", 4096, 4, 40_500.0, None, "Toy GPU"),
]


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def rows():
    """Records of every model on every task it was asked."""
    for name, mixer, family, params, skill, _ in MODELS:
        rng = random.Random(name)
        for column, source in paper.COLUMNS.items():
            # The attention model was stopped early, and BoolQ was never asked of KDA.
            if not source.task or (name, column) == ("toy-kda", "boolq_acc"):
                continue
            for i in range(SAMPLES if name != "toy-attention" or column != "piqa_acc" else 11):
                nats = math.log(source.lower * 12 or 1) + rng.gauss(-skill, 0.2)
                score = nats if source.lower else float(rng.random() < skill)
                yield Record(
                    schema_version=1, run_id=f"{name}-run", key=digest(name, column, i)[:32], model=name, mixer=mixer,
                    family=family, params=params, checkpoint=digest(name), task=source.task, task_version=1,
                    protocol="exact", length=source.length or None, sample_id=str(i), seed=42, metric=source.metric,
                    score=score, prompt_tokens=100 + i, truncated_tokens=0, depth=None, target=f"answer {i}",
                    output="", output_tokens=3, outcome="", logprob=None, decided_early=False, error=None,
                    latency_s=0.1, created_at=f"2026-01-02T03:04:{i:02d}+00:00", data=digest(source.task),
                    weight=float(50 + i) if source.lower else 1.0, metric_count=1,
                )  # fmt: skip


def records():
    """The records with what a run would say of its model."""
    made = frame.from_rows(map(dataclasses.asdict, rows()), texts=["target"])
    runs = {}
    for name, mixer, family, params, _, mixers in MODELS:
        asked = [
            {"task": c.task, "task_version": 1, "protocol": "exact", "data": digest(c.task), "length": c.length or None}
            | {"samples": SAMPLES}
            for c in paper.COLUMNS.values()
            if c.task
        ]
        model = {"name": name, "mixer": mixer, "family": family, "params": params, "checkpoint": digest(name)}
        model["details"] = {"config": {"mixers": mixers}}
        runs[f"{name}-run"] = {"model": model, "invocations": [{"resolved": asked, "provenance": {}}]}
    return dataclasses.replace(made, runs=runs)


def grids():
    """Every table, by its file's name."""
    every = records()
    made = {item: papertables.build(item, every) for item in papertables.TABLES}
    made["table3-none"] = papertables.build("table3", every, "none")
    return made | {"figure2": throughput.grid(SPEEDS, "all")}


def write(home):
    home.mkdir(parents=True, exist_ok=True)
    for name, grid in grids().items():
        for form, suffix in (("text", ".txt"), ("markdown", ".md"), ("latex", ".tex"), ("csv", ".csv")):
            (home / f"{name}{suffix}").write_text(gridformats.RENDER[form](grid), encoding="utf-8")


if __name__ == "__main__":
    write(HOME)
