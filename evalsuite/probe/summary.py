"""What a probe's samples come to, head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evalsuite.probe.lines import LOSSES
from evalsuite.probe.records import Probe, array

Floats = NDArray[np.float64]
Sample = Mapping[str, Any]

HEADER = (
    "layer", "mixer", "head", "half-life", "erase", "write", "norm", "rank", "hits keep", "misses keep", "hits' own",
    "misses' own", "by decay", "by erase", "asked",
)  # fmt: skip
WORST_HEADER = ("later write", "layer", "head", "times", "damage", "erase", "write", "overlap")
MOST_WRITES = 8  # shown
MOST_ROWS = 32  # of the table; a model with more heads gets a row a layer


class Head(NamedTuple):
    """One head, over all samples of a probe; NaN for what does not exist."""

    layer: str
    mixer: str
    head: int
    half_life: float  # tokens, median over samples and blocks
    erase: float  # mean gate
    write: float
    norm: float  # at the prompt's end, mean over samples
    rank: float
    kept_hits: float  # retention at the prompt's end, mean over the value's tokens and the samples answered right
    kept_misses: float  # and wrong
    left_hits: float  # survival, likewise
    left_misses: float
    decay: float  # change of the survival from the needle to the end, mean over all samples
    erasing: float
    asked: float  # cosine of what the last token reads and what a needle token's key read when written, for the best


def hit(sample: Sample) -> bool:
    """Whether the sample's answer was right, all of it."""
    return bool(sample["score"] == 1)


def value(sample: Sample) -> list[int]:
    """The needle tokens that hold the answer."""
    return [n for n, role in enumerate(sample["needle"]["roles"]) if role == "value"]


def mean_curve(sample: Sample, name: str) -> Floats:
    """`retention` or `survival` at every block's end, mean over the value's tokens [E, G]; NaN before all are there."""
    return np.asarray(array(sample[name])[:, value(sample)].mean(1))


def over(samples: Sequence[Sample], name: str, reduce: Any = np.mean) -> Floats | None:
    """A field [E, G] of all samples, reduced over blocks and samples: [G]. None where no head has it."""
    if not samples or name not in samples[0]:
        return None
    return _reduced(np.concatenate([array(sample[name]) for sample in samples]), reduce)


def at_end(samples: Sequence[Sample], name: str) -> Floats:
    """A field [E, G] at the prompt's end, mean over samples: [G]."""
    return _reduced(np.stack([array(sample[name])[-1] for sample in samples]), np.mean)


def near_curve(sample: Sample, name: str) -> tuple[list[int], Floats]:
    """The same token by token from the value's last one on, as far as the window goes: ages and [tokens, G]."""
    window = sample["window"]
    at = sample["needle"]["stop"] - 1 - window["start"]
    parts = window["change" if name == "retention" else "loss"]
    curve = 1 + np.sum([array(part).cumsum(0) for part in parts.values()], axis=0)[at:]
    return list(range(len(curve))), curve


def left(samples: Sequence[Sample], name: str, heads: int) -> Floats:
    """`retention` or `survival` at the prompt's end, mean over samples: [G], NaN without any."""
    return _reduced(np.stack([np.full(heads, np.nan), *(mean_curve(sample, name)[-1] for sample in samples)]), np.mean)


def _reduced(values: Floats, reduce: Any) -> Floats:
    """`reduce` over the first axis of [n, G], of what is there; NaN where nothing is."""
    there = [column[~np.isnan(column)] for column in values.T]
    return np.array([reduce(column) if len(column) else np.nan for column in there])


def heads(probe: Probe) -> list[Head]:
    """Every head of the probe's model."""
    samples, named = probe.samples, probe.heads
    none = np.full(len(named), np.nan)
    columns = [over(samples, "half_life", np.median), over(samples, "erase"), over(samples, "write")]
    columns += [at_end(samples, "norm"), at_end(samples, "rank")]
    for name in ("retention", "survival"):
        columns += [left([s for s in samples if hit(s) == right], name, len(named)) for right in (True, False)]
    columns += [_reduced(np.stack([array(s["loss"][name]).sum(0) for s in samples]), np.mean) for name in LOSSES]
    columns.append(_reduced(np.stack([array(s["asked"]).max(0) for s in samples]), np.mean))
    table = np.stack([none if column is None else column for column in columns])  # [columns, G]
    return [Head(*name, *map(float, column)) for name, column in zip(named, table.T, strict=True)]


def table(probe: Probe) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """Header and rows of the terminal's table: a row a head, or a row a layer where there are many."""
    found = heads(probe)
    if len(found) > MOST_ROWS:
        layers: dict[tuple[str, str], list[Head]] = {}
        for head in found:
            layers.setdefault(head[:2], []).append(head)
        means = (_reduced(np.array([head[3:] for head in group]), np.mean).tolist() for group in layers.values())
        found = [Head(*named, -1, *mean) for named, mean in zip(layers, means, strict=True)]
    return HEADER, [(h.layer, h.mixer, "all" if h.head < 0 else h.head, *map(_shown, h[3:])) for h in found]


def notes(probe: Probe) -> list[str]:
    """What the table needs said: how many samples, what is missing and why, how exact it is."""
    samples = probe.samples
    right = sum(map(hit, samples))
    lines = [
        f"{right} of {len(samples)} answered right; half-life in tokens (median over key channels, samples and blocks)",
        "keep: what the value's keys read at the end of the prompt, of what they read when written (retention);",
        "own: what is left of these writes themselves (survival); by decay, by erase: what took the rest of them;",
        "asked: cosine of what the last token reads and what the best needle token's key read when written",
    ]
    without = sorted({h.mixer for h in heads(probe) if np.isnan(h.erase)})
    if without:
        lines.append(f"{', '.join(without)}: no erase, and no gate on what is written")
    drift = max(sample["drift"] for sample in samples)
    return [*lines, f"recomputed retention differs from that in the model's own states by at most {drift:.1g}"]


def worst(probe: Probe) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """The later writes that did most damage; means over those of one text in one head."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for sample in probe.samples:
        for write in sample["worst"]:
            groups.setdefault((write["text"], write["layer"], write["head"]), []).append(write)
    found = sorted(groups.items(), key=lambda item: -sum(write["damage"] for write in item[1]))[:MOST_WRITES]
    return WORST_HEADER, [
        (
            repr(text), layer, head, len(writes),
            *(_shown(float(np.mean([write[name] for write in writes]))) for name in WORST_HEADER[4:]),
        )
        for (text, layer, head), writes in found
    ]  # fmt: skip


def _shown(x: float) -> str:
    if np.isnan(x):
        return "-"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" if abs(x) >= 1 else f"{round(x, 2) + 0.0:.2f}"
