"""Speed and memory from the files of `gdn2-eval bench`: the paper's Figure 2, and both against context length.

A file `bench/training_*.json` holds {"kind": "training", "device": {"before": {"name": ...}}, "rows": [...]}; a row has
model, mixer, family, mixers (options by layer), length and batch (tokens and sequences of a step), tokens_per_s, and
peak_bytes or null. Files of `bench engine` hold the speed and memory of reading prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evalsuite.reports import escape, paper
from evalsuite.reports.cells import MIXERS, length_label, rank
from evalsuite.reports.drawing import check_files, legend, length_axis, look, panels, save, style
from evalsuite.reports.grid import Figure, Grid, Head, Line, Note, placed
from gdn2.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["training", "reading"]


@dataclass(frozen=True, slots=True)
class Speed:
    """One measurement; `family` and `listed` are the paper's names for its kind of model."""

    kind: Kind
    model: str
    family: str
    listed: str
    length: int  # tokens
    batch: int  # sequences of a step, or prompts
    tokens_per_s: float
    peak_bytes: int | None
    device: str


def load(paths: Sequence[Path]) -> list[Speed]:
    """All measurements in `bench/` below results directories `paths`, later files last. Raises DataError."""
    found = []
    for path in paths:
        for file in sorted((path / "bench").glob("*.json")) if path.is_dir() else []:
            try:
                found += _read(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise DataError(f"cannot read {file}: {error!r:.100}") from None
    return found


def beside_records(paths: Sequence[Path]) -> list[Path]:
    """Those of `paths` that hold more than measurements; all of them where none does."""
    return [path for path in paths if (path / "runs").is_dir() or not (path / "bench").is_dir()] or list(paths)


def _read(content: Mapping[str, Any]) -> list[Speed]:
    device = str(content.get("device", {}).get("before", {}).get("name", "unknown"))
    if content.get("kind") == "training":
        again = ", recomputed" if content.get("asked", {}).get("recompute") else ""
        return [_training(row, device, again) for row in content["rows"]]
    if content.get("kind") != "engine":
        return []
    model = str(content["asked"]["model"])
    rows = [(str(row["work"]).partition(" "), row) for row in content["rows"]]
    return [
        Speed(
            "reading", f"{Path(model).name}, {row['contender']}", "", "", int(length), int(row["batch"] or 0),
            float(row["tokens_per_s"]), row["peak_bytes"], device,
        )
        for (work, _, length), row in rows if work == "prefill"
    ]  # fmt: skip


def _training(row: Mapping[str, Any], device: str, again: str) -> Speed:
    family, listed = paper.alias(str(row["family"]), str(row["mixer"]), row.get("mixers") or {})
    peak = row.get("peak_bytes")
    return Speed(
        "training", f"{row['model']}{again}", family, listed, int(row["length"]), int(row["batch"]),
        float(row["tokens_per_s"]), None if peak is None else int(peak), device,
    )  # fmt: skip


def grid(speeds: Sequence[Speed], published: str) -> Grid:
    """Figure 2 as a table, in thousand tokens a second: the paper's shapes across, what was measured here beside it."""
    source = paper.load("figure2")
    heads: list[Head] = []
    for shape in source.columns:
        length, _, batch = shape.partition("x")
        group = f"{length_label(int(length))} x {batch}"
        heads.append(Head(group, "ours", shape, 2))
        if published != "none":
            heads += [
                Head(group, "paper", f"{shape}_published", 2), Head(group, "diff.", f"{shape}_difference", 2, True)
            ]  # fmt: skip
    ours = _by_model(speeds, source.columns)
    measured = {key: placed_columns(source.columns, [f for k, f in ours.items() if k[:2] == key[:2]]) for key in ours}
    theirs = placed_columns(
        source.columns, [{c: Figure(v) for c, v in row.items()} for row in source.rows["hybrid"].values()]
    )
    lines = []
    listed_first = [("hybrid", listed) for listed in source.rows["hybrid"]]
    others = sorted({key[:2] for key in ours} - set(listed_first), key=lambda k: (k[0], rank(k[1], MIXERS)))
    for place, (family, listed) in enumerate([*listed_first, *others]):
        printed = theirs[place] if place < len(theirs) else {}
        rows = [key for key in ours if key[:2] == (family, listed)]
        for i, key in enumerate(rows):
            lines.append(_line(family, listed, key[2], measured[key][i], printed, published, source.columns))
        if not rows and published == "all":
            lines.append(_line(family, listed, "", {}, printed, published, source.columns))
    devices = tuple(sorted({s.device for s in speeds if s.kind == "training"}))
    notes = [Note("Training throughput in thousand tokens a second, by sequence length x sequences of a step.")]
    notes += [Note("Measured on", devices)] if devices else []
    if published != "none":
        notes.append(Note(f"Paper (published): {source.source} ({source.models}), one H100; not measured here."))
    return Grid(f"{source.title} (Figure 2)", ("model", "measured here"), tuple(heads), tuple(lines), tuple(notes))


def _by_model(speeds: Sequence[Speed], shapes: Sequence[str]) -> dict[tuple[str, str, str], dict[str, Figure]]:
    """Figures in thousand tokens a second by family, listed name and model, on its device where there are several.

    The last file counts.
    """
    found: dict[tuple[str, str, str], dict[str, Figure]] = {}
    wanted = [s for s in speeds if s.kind == "training" and f"{s.length}x{s.batch}" in shapes]
    several = len({s.device for s in wanted}) > 1
    for s in wanted:
        model = f"{s.model}, {s.device}" if several else s.model
        found.setdefault((s.family, s.listed, model), {})[f"{s.length}x{s.batch}"] = Figure(s.tokens_per_s / 1e3)
    return found


def placed_columns(
    shapes: Sequence[str], rows: Sequence[Mapping[str, Figure]]
) -> list[dict[str, Figure | None]]:
    """The rows with the best and the second of each column marked."""
    made: list[dict[str, Figure | None]] = [{} for _ in rows]
    for shape in shapes:
        for row, figure in zip(made, placed([row.get(shape) for row in rows], 2, False), strict=True):
            row[shape] = figure
    return made


def _line(
    family: str, listed: str, model: str, ours: Mapping[str, Figure | None], theirs: Mapping[str, Figure | None],
    published: str, shapes: Sequence[str],
) -> Line:  # fmt: skip
    cells: list[Figure | None] = []
    for shape in shapes:
        own, printed = ours.get(shape), theirs.get(shape)
        cells.append(own)
        if published != "none":
            both = own and printed and own.value is not None and printed.value is not None
            cells += [printed, Figure(own.value - printed.value) if both else None]  # type: ignore[union-attr, operator]
    return Line((listed, model), tuple(cells), family)


def plot(speeds: Sequence[Speed], files: Sequence[Path]) -> None:
    """Figure 2: training throughput by sequence length at a fixed number of tokens; published and measured apart."""
    check_files(files)
    source = paper.load("figure2")
    ours = _by_model(speeds, source.columns)
    with style():
        figure, axes = panels(2 if ours else 1)
        # One kind of model looks the same in both panels.
        looks = {name: i for i, name in enumerate(source.rows["hybrid"])}
        for name, row in source.rows["hybrid"].items():
            _shapes(axes[0], f"{name} (published)", row, source.columns, looks[name])
        axes[0].set_title("published,\none H100")
        if ours:
            device = ", ".join(sorted({s.device for s in speeds if s.kind == "training"}))
            for (_, listed, model), figures in ours.items():
                row = {shape: figure.value or 0.0 for shape, figure in figures.items()}
                _shapes(axes[1], model, row, source.columns, looks.setdefault(listed, len(looks)))
            axes[1].set_title(f"measured,\n{escape.figure(device, 48)}")
        top = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(0, top)
        axes[0].set_ylabel("thousand tokens / s")
        figure.supxlabel("sequence length x sequences of a step")
        legend(figure, axes)
        save(figure, files)


def _shapes(ax: Axes, name: str, row: Mapping[str, float], shapes: Sequence[str], number: int) -> None:
    at = [i for i, shape in enumerate(shapes) if shape in row]
    ax.plot(at, [row[shapes[i]] for i in at], label=escape.figure(name), clip_on=False, **look(number))
    parts = [shape.partition("x") for shape in shapes]
    ax.set_xticks(range(len(shapes)), [f"{length_label(int(n))}x{b}" for n, _, b in parts])


def against_length(speeds: Sequence[Speed], files: Sequence[Path]) -> None:
    """Speed and peak memory against context length, one line a model and kind of work.

    Raises DataError without measurements of speed.
    """
    check_files(files)
    if not speeds:
        raise DataError("there are no measurements in bench/ to plot: see gdn2-eval bench")
    lines: dict[str, dict[int, Speed]] = {}
    for s in speeds:
        batch = f", batch {s.batch}" if s.kind == "reading" and s.batch else ""
        lines.setdefault(f"{s.model} ({s.kind}{batch})", {})[s.length] = s
    with style():
        figure, axes = panels(2)
        for number, (name, points) in enumerate(lines.items()):
            whole = sorted(points.values(), key=lambda s: s.length)
            held = [s for s in whole if s.peak_bytes is not None]
            label = escape.figure(name, 60)
            looks = look(number) | {"clip_on": False}
            axes[0].plot([s.length for s in whole], [s.tokens_per_s / 1e3 for s in whole], label=label, **looks)
            if held:  # an empty line that is not clipped would count as one at the figure's corner
                axes[1].plot([s.length for s in held], [(s.peak_bytes or 0) / 2**30 for s in held], **looks)
        for ax, name in zip(axes, ("thousand tokens / s", "peak memory (GiB)"), strict=True):
            length_axis(ax, [s.length for s in speeds])
            ax.set_ylim(bottom=0)
            ax.set_ylabel(name)
        figure.supxlabel("context length (tokens)")
        legend(figure, axes)
        save(figure, files)
