"""Writes data/synthetic: made-up runs in the form of real ones, and the tables that follow from them.

The scores are drawn from a curve we chose; they say nothing about any model. Run it after a change of the record's
columns or of a table's form, and read the difference before committing it:

    python tests/evalsuite/synthetic.py
"""

import hashlib
import json
import random
import zlib
from pathlib import Path

from evalsuite.reports import files, formats, frame, tables
from evalsuite.schema import Record, to_line

HOME = Path(__file__).parent / "data" / "synthetic"
SAMPLES = 16
RULER = {"niah_single_1": 9000, "niah_single_2": 5000, "niah_multikey_1": 2500, "niah_multivalue": 4000}
# name, mixer, family, parameters, reach, cells
MODELS = [
    (
        "synthetic-gdn2",
        "gdn2",
        "recurrent",
        1_204_000,
        1.0,
        [(t, n) for t in list(RULER)[:3] for n in (1024, 2048, 4096, 8192)] + [("niah_multivalue", 2048)],
    ),
    ("synthetic-kda", "kda", "recurrent", 1_190_000, 0.7, [("niah_single_2", n) for n in (1024, 2048, 4096, 8192)]),
    (
        "synthetic-gdn2-h",
        "gdn2",
        "hybrid",
        1_310_000,
        1.2,
        [(t, n) for t in ("niah_single_2", "niah_multikey_1") for n in (1024, 4096)],
    ),
]


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def records(model):
    """All records of one model, in the order a run would write them."""
    name, mixer, family, params, reach, cells = model
    rng = random.Random(name)
    for task, length in cells:
        chance = 1 / (1 + (length / (RULER[task] * reach)) ** 3)
        # The hybrid's last cell was interrupted.
        count = 11 if (name, task, length) == ("synthetic-gdn2-h", "niah_multikey_1", 4096) else SAMPLES
        for i in range(count):
            value = str(1_000_000 + 7919 * i)
            needles = 4 if task == "niah_multivalue" else 1
            score = sum(rng.random() < chance for _ in range(needles)) / needles
            failed = (name, task, length, i) == ("synthetic-kda", "niah_single_2", 8192, 3)
            yield Record(
                schema_version=1,
                run_id=name,
                key=digest("sample", name, task, length, i)[:32],
                model=name,
                mixer=mixer,
                family=family,
                params=params,
                checkpoint=digest("weights", name),
                task=task,
                task_version=1,
                protocol="exact",
                length=length,
                sample_id=str(i),
                seed=42,
                metric="string_match_all",
                score=None if failed else score,
                prompt_tokens=length - 128 - rng.randrange(8),
                truncated_tokens=0,
                depth=(i + 0.5) / SAMPLES,
                target=value,
                output="" if failed else value if score == 1 else str(rng.randrange(1_000_000, 9_999_999)),
                output_tokens=7,
                outcome="" if failed else "target" if score == 1 else rng.choice(["distractor", "other", "nothing"]),
                logprob=None,
                decided_early=score == 1,
                error="out of memory" if failed else None,
                latency_s=round(length / 40_000, 3),
                created_at=f"2026-01-02T03:{i:02d}:00+00:00",
                data=digest("essays" if task != "niah_single_1" else "noise"),
                weight=1.0,
                metric_count=1,
            )


def run_json(model):
    name, mixer, family, params, _, cells = model
    resolved = [
        {"task": task, "task_version": 1, "data": digest("essays" if task != "niah_single_1" else "noise")}
        | {"protocol": "exact", "length": length, "samples": SAMPLES, "seed": 42, "options": {}}
        for task, length in cells
    ]
    provenance = {"code": {"commit": "0" * 40, "dirty": False}, "packages": {"gdn2-eval": "0.1.0", "torch": "2.13.0"}}
    return {
        "version": 1,
        "id": name,
        "identity": {},
        "model": {"name": name, "mixer": mixer, "family": family, "params": params, "details": {}},
        "totals": {},
        "status": "done",
        "invocations": [{"resolved": resolved, "provenance": provenance}],
    }


def big(path, n):
    """A file of n different records of this version, made faster than `to_line` makes them."""
    base = dict.fromkeys(Record.__dataclass_fields__)
    base |= {"schema_version": 1, "run_id": "r", "model": "m", "mixer": "gdn2", "family": "recurrent", "params": 1}
    base |= {"checkpoint": "c" * 64, "task": "niah_single_2", "task_version": 1, "protocol": "exact", "seed": 42}
    base |= {"metric": "string_match_all", "score": "SCORE", "prompt_tokens": 900, "truncated_tokens": 0, "target": "1"}
    base |= {"output": "x" * 200, "output_tokens": 7, "outcome": "target", "decided_early": True, "latency_s": 0.1}
    base |= {"created_at": "2026-01-01T00:00:00+00:00", "data": "d" * 64, "weight": 1.0, "metric_count": 1}
    base |= {"key": "KEY", "length": "LENGTH", "sample_id": "SAMPLE", "depth": 0.5}
    text = json.dumps(base)[:-1].replace('"LENGTH"', "LENGTH").replace('"SCORE"', "SCORE")
    with open(path, "w", encoding="ascii") as file:
        for i in range(n):
            body = text.replace("KEY", f"{i * 2654435761 % 2**32:032x}").replace("LENGTH", str(1024 << i % 4))
            body = body.replace("SAMPLE", str(i // 4)).replace("SCORE", "1.0" if i % 3 else "0.0")
            file.write(f'{body}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n')


def write(home):
    for model in MODELS:
        run = home / "runs" / model[0]
        run.mkdir(parents=True, exist_ok=True)
        (run / "records.jsonl").write_text("".join(map(to_line, records(model))), encoding="ascii")
        (run / "run.json").write_text(json.dumps(run_json(model), indent=1) + "\n", encoding="ascii")
    made = frame.load([home], texts=["target"])
    for published, name in (("matched", "table"), ("all", "table-all")):
        table = tables.build(made, published)
        for suffix, form in files.SUFFIXES.items():
            (home / f"{name}{suffix}").write_text(formats.render(table, form), encoding="utf-8")
    (home / "table.txt").write_text(formats.terminal(tables.build(made)), encoding="utf-8")


if __name__ == "__main__":
    write(HOME)
