"""Plots of probes: retention curves, a map of the heads, the needle's surroundings, and probes against each other.

Functions of the files alone, in the style of the other plots (`evalsuite.reports`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evalsuite.probe import summary
from evalsuite.probe.lines import LOSSES
from evalsuite.probe.measures import CHANGES
from evalsuite.probe.records import Probe, array
from evalsuite.probe.summary import Floats, Sample
from evalsuite.reports import escape
from evalsuite.reports.cells import length_label
from evalsuite.reports.drawing import DASHES, MARKERS, PANEL, save, style
from evalsuite.stats.intervals import bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LAYERS = 5  # drawn one by one; of more, so many spread evenly
COLOURS = {"decay": "C1", "erase": "C6", "write": "C2"}  # of what changes the retention
CURVES = {"retention": "retention", "survival": "survival"}  # field and label of a curve
FEW_HEADS = 8  # whose numbers still fit the cells of a map


class Curve(NamedTuple):
    """Mean retention by age, with the ends of its 95 % interval (bootstrap over samples; NaN for one sample)."""

    ages: list[int]  # tokens since the value's last one; from a block on, whole blocks
    mean: list[float]
    low: list[float]
    high: list[float]


def draw(probe: Probe, kinds: Sequence[str]) -> list[Path]:
    """Write retention, heads and needle beside the probe's samples, in each of `kinds` (png, svg, pdf)."""
    written = []
    for name, figure in (("retention", _retention), ("heads", _heads), ("needle", _needle)):
        files = [probe.directory / f"{name}.{kind}" for kind in kinds]
        with style():
            save(figure(probe), files)
        written += files
    return written


def compare(probes: Sequence[Probe], kinds: Sequence[str]) -> list[Path]:
    """Write several probes against each other into the directory that holds them; nothing for a single one."""
    if len(probes) < 2:
        return []
    files = [probes[0].directory.parent / f"probes.{kind}" for kind in kinds]
    with style():
        save(_compared(probes), files)
    return files


def curve(samples: Sequence[Sample], name: str, heads: Sequence[int], block: int) -> Curve:
    """How retention or survival, mean over `heads`, falls with age: at powers of two near the needle, then at blocks.

    A sample whose prompt ends sooner is in none of the later ages.
    """
    found: dict[int, list[float]] = {}
    for sample in samples:
        ages, near = summary.near_curve(sample, name)
        for age, kept in zip(ages, near[:, list(heads)].mean(1).tolist(), strict=True):
            if age < block and age.bit_count() == 1 and not math.isnan(kept):
                found.setdefault(age, []).append(kept)
        blocks = summary.mean_curve(sample, name)[:, list(heads)].mean(1)
        for end, kept in zip(sample["ends"], blocks.tolist(), strict=True):
            if (age := (end - sample["needle"]["stop"]) // block * block) > 0 and not math.isnan(kept):
                found.setdefault(age, []).append(kept)
    ages = sorted(found)
    bands = [bootstrap(found[age]) for age in ages]
    means = [float(np.mean(found[age])) for age in ages]
    return Curve(ages, means, [low for low, _ in bands], [high for _, high in bands])


def _layers(probe: Probe) -> dict[tuple[str, str], list[int]]:
    """Heads of each layer."""
    layers: dict[tuple[str, str], list[int]] = {}
    for g, (layer, mixer, _) in enumerate(probe.heads):
        layers.setdefault((layer, mixer), []).append(g)
    return layers


def _title(probe: Probe) -> str:
    task = escape.figure(f"{probe.model}, {probe.settings['task']}")
    return f"{task} at {length_label(probe.settings['length'])}"


def _parts(samples: Sequence[Sample]) -> list[tuple[str, str, str, list[Sample]]]:
    """Name, colour, marker and samples of hits and misses, of those that there are."""
    parts = [("hits", "C0", "o", True), ("misses", "C6", "s", False)]
    found = [(name, c, m, [s for s in samples if summary.hit(s) == right]) for name, c, m, right in parts]
    return [part for part in found if part[3]]


def _line(ax: Axes, found: Curve, look: dict[str, Any]) -> None:
    ax.fill_between(found.ages, found.low, found.high, color=look["color"], alpha=0.16, linewidth=0)
    marked = [i for i, age in enumerate(found.ages) if age.bit_count() == 1]
    ax.plot(found.ages, found.mean, markevery=marked, mec="white", mew=0.25, **look)


def _log_ages(ax: Axes, longest: int) -> None:
    """A scale of ages by powers of four."""
    ticks = [4**i for i in range(12) if 4**i <= longest]
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [length_label(tick) if tick >= 1024 else str(tick) for tick in ticks])
    ax.minorticks_off()


def _oldest(probe: Probe) -> int:
    return max((s["tokens"] - s["needle"]["stop"] for s in probe.samples), default=1)


def _retention(probe: Probe) -> Figure:
    """Retention above, survival below, a column a layer; hits against misses."""
    from matplotlib.figure import Figure

    layers = list(_layers(probe).items())
    chosen = [layers[i] for i in sorted({round(x) for x in np.linspace(0, len(layers) - 1, LAYERS)})]
    figure = Figure(figsize=(max(1.45 * len(chosen), 2 * PANEL[0]), 2 * PANEL[1] + 0.5))
    grid = figure.subplots(2, len(chosen), sharex=True, sharey="row", squeeze=False)
    for row, (name, label) in zip(grid, CURVES.items(), strict=True):
        row[0].set_ylabel(label)
        for ax, ((layer, mixer), heads) in zip(row, chosen, strict=True):
            for part, colour, marker, samples in _parts(probe.samples):
                look = {"color": colour, "marker": marker, "linestyle": DASHES[part == "misses"]}
                look["label"] = f"{part} (n = {len(samples)})"
                _line(ax, curve(samples, name, heads, probe.settings["identity"]["block"]), look)
            ax.axhline(0, color="0.5", linewidth=0.5)
            _log_ages(ax, _oldest(probe))
            if name == "retention":
                ax.set_title(f"layer {layer} ({escape.figure(mixer)})")
    figure.supxlabel("tokens since the needle")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, title=_title(probe), title_fontsize=8)
    return figure


def _heads(probe: Probe) -> Figure:
    """Layers by heads: half-life, what the prompt's end has left of the needle, and whether it asks for it."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    found = summary.heads(probe)
    panels: list[tuple[str, Floats, Any]] = []
    lives = np.array([head.half_life for head in found])
    if not np.isnan(lives).all():
        low = max(float(np.nanmin(lives)), 1e-2)
        panels.append(("half-life (tokens)", lives, LogNorm(low, max(float(np.nanmax(lives)), 2 * low))))
    for name, label in (("kept", "retention"), ("left", "survival")):
        for part, *_ in _parts(probe.samples):
            values = np.array([getattr(head, f"{name}_{part}") for head in found])
            panels.append((f"{label}, {part}", values, Normalize(0, 1)))
    panels.append(("asked", np.array([head.asked for head in found]), Normalize(0, 1)))
    layers = list(_layers(probe).items())
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    height = max(0.8, 0.16 * len(layers)) + 0.45
    figure = Figure(figsize=(max(across, 2) * PANEL[0], down * height + 0.45))
    axes = [figure.add_subplot(down, across, i + 1) for i in range(len(panels))]
    for ax, (name, values, norm) in zip(axes, panels, strict=True):
        image = _map(ax, layers, values, norm)
        ax.set_title(name)
        bar = figure.colorbar(image, ax=ax, aspect=15)
        if isinstance(norm, LogNorm):
            bar.set_ticks(ticks := [10**i for i in range(-2, 12) if norm.vmin <= 10**i <= norm.vmax])
            bar.set_ticklabels([_brief(tick) for tick in ticks])
            bar.minorticks_off()
    for ax in axes[::across]:
        ax.set_ylabel("layer")
    figure.supxlabel("head")
    figure.suptitle(_title(probe), fontsize=8)
    return figure


def _map(ax: Axes, layers: Sequence[tuple[tuple[str, str], list[int]]], values: Floats, norm: Any) -> AxesImage:
    wide = max(len(heads) for _, heads in layers)
    grid = np.full((len(layers), wide), np.nan)
    for y, (_, heads) in enumerate(layers):
        grid[y, : len(heads)] = values[heads]
    image = ax.imshow(grid, norm=norm, aspect="auto", interpolation="nearest")
    if wide <= FEW_HEADS and len(layers) <= 2 * FEW_HEADS:
        for (y, x), shown in np.ndenumerate(grid):
            if not np.isnan(shown):
                ink = "white" if norm(shown) < 0.5 else "black"
                ax.text(x, y, _brief(shown), ha="center", va="center", fontsize=6, color=ink)
    ax.grid(False)
    every = math.ceil(len(layers) / 12)
    ax.set_yticks(range(0, len(layers), every), [layer for (layer, _), _ in layers[::every]])
    ax.set_xticks(range(0, wide, math.ceil(wide / 8)))
    return image


def _brief(x: float) -> str:
    """A number in at most five letters."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if x >= size:
            return f"{x / size:.3g}{unit}" if x < 10 * size else f"{x / size:.0f}{unit}"
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{round(x, 2) + 0.0:.2f}"


def _needle(probe: Probe) -> Figure:
    """The surroundings of one hit's and one miss's needle, in the head that keeps most."""
    from matplotlib.figure import Figure

    best = int(np.nan_to_num(summary.left(probe.samples, "survival", len(probe.heads)), nan=-np.inf).argmax())
    shown = [(part, samples[0]) for part, *_, samples in _parts(probe.samples)]
    figure = Figure(figsize=(2 * PANEL[0] if len(shown) == 1 else 3.2 * PANEL[0], 3.6 * PANEL[1]))
    grid = figure.subplots(4, len(shown), sharex="col", sharey="row", squeeze=False)
    for column, (part, sample) in zip(grid.T, shown, strict=True):
        _surroundings(column, sample, best)
        column[0].set_title(f"{'hit' if part == 'hits' else 'miss'}: sample {escape.figure(sample['sample_id'], 12)}")
    for ax, label in zip(grid[:, 0], ("|S|", "gates", "overlap", "kept"), strict=True):
        ax.set_ylabel(label)
    for ax in grid[1::2, -1]:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.6)
    layer, mixer, head = probe.heads[best]
    figure.suptitle(f"{_title(probe)}\nlayer {layer} ({escape.figure(mixer)}), head {head}", fontsize=8)
    figure.supxlabel("tokens from the needle's start")
    return figure


def _surroundings(axes: Sequence[Axes], sample: Sample, head: int) -> None:
    """Norm, gates and retention around the needle of one sample, in one head."""
    window, needle = sample["window"], sample["needle"]
    x = np.arange(len(window["norm"])) + window["start"] - needle["start"]
    values = summary.value(sample)
    for ax in axes:
        ax.axvspan(-0.5, needle["stop"] - needle["start"] - 0.5, color="0.92", linewidth=0)
        ax.axvspan(values[0] - 0.5, values[-1] + 0.5, color="0.82", linewidth=0)
    axes[0].plot(x, array(window["norm"])[:, head], color="C4")
    axes[2].bar(x, array(window["overlap"])[:, head], width=1, color="0.3")
    for i, (name, label) in enumerate((("erase", "erase"), ("write", "write"), ("kept", "exp(g)"))):
        if name in window:
            colour = COLOURS["decay" if name == "kept" else name]
            axes[1].plot(x, array(window[name])[:, head], color=colour, linestyle=DASHES[i], label=label, linewidth=1)
    axes[1].set_ylim(0, None)
    after = x >= values[-1]
    losses = {name: array(window["loss"][name])[:, head].cumsum() for name in LOSSES}
    changes = [array(window["change"][name])[:, head].cumsum() for name in CHANGES]
    axes[3].plot(x[after], 1 + np.sum(changes, axis=0)[after], color="C4", label="retention")
    axes[3].plot(
        x[after], 1 + np.sum(list(losses.values()), axis=0)[after], color="C0", linestyle=DASHES[1], label="survival"
    )
    for i, (name, total) in enumerate(losses.items()):
        if total.any():
            look: dict[str, Any] = {"color": COLOURS[name], "linestyle": DASHES[i + 2], "linewidth": 1}
            axes[3].plot(x[after], total[after], label=f"lost by {name}", **look)
    axes[3].axhline(0, color="0.5", linewidth=0.5)


def _compared(probes: Sequence[Probe]) -> Figure:
    """Retention and survival by age over all heads, a line a probe; and what took the survival, a bar a probe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * PANEL[0], 1.3 * PANEL[1] + 0.25 * len(probes)))
    *curves, bars = figure.subplots(1, 3)
    for i, probe in enumerate(probes):
        hits = sum(map(summary.hit, probe.samples))
        look = {"color": f"C{i % 7}", "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        look["label"] = f"{i + 1}: {_title(probe)}, {hits} of {len(probe.samples)} right"
        for ax, (name, label) in zip(curves, CURVES.items(), strict=True):
            found = curve(probe.samples, name, range(len(probe.heads)), probe.settings["identity"]["block"])
            _line(ax, found, look)
            ax.set_ylabel(f"{label}, mean over heads")
        heads = summary.heads(probe)
        begin = 0.0
        for name, lost in (("decay", [-h.decay for h in heads]), ("erase", [-h.erasing for h in heads])):
            bars.barh(i + 1, np.mean(lost), 0.7, begin, color=COLOURS[name], label=f"by {name}" if i == 0 else None)
            begin += float(np.mean(lost))
    for ax in curves:
        _log_ages(ax, max(map(_oldest, probes)))
        ax.set_xlabel("tokens since the needle")
        ax.set_ylim(min(0, ax.get_ylim()[0]), None)
    bars.set_yticks(range(1, len(probes) + 1))
    bars.invert_yaxis()
    bars.set_xlabel("survival lost by the end")
    bars.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1, handlelength=1)
    figure.legend(*curves[0].get_legend_handles_labels(), loc="outside upper center", ncols=1)
    return figure
