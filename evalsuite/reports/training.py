"""Training curves from the log of `gdn2-eval train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evalsuite.reports import escape
from evalsuite.reports.drawing import check_files, legend, look, name_axes, panels, save, style
from gdn2.errors import DataError

Curve = list[tuple[float, float]]  # (million tokens, value)


@dataclass(frozen=True, slots=True)
class Log:
    """What one training run logged."""

    name: str
    loss: Curve = field(default_factory=list)
    answers: Curve = field(default_factory=list)  # share of answer tokens that were right in training
    held_out: dict[str, Curve] = field(default_factory=dict)  # exact answers of each evaluation, or its loss


def read(path: Path) -> Log:
    """The log at `path`, named after its directory. Raises DataError where it is none, or holds no steps."""
    log = Log(path.parent.name or path.stem)
    tokens = 0.0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break  # being written
                tokens = _add(log, json.loads(line), tokens)
    except OSError as error:
        raise DataError(f"cannot read {path} as a training log: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"cannot read {path} as a training log: {error!r:.100}") from None
    if not log.loss:
        raise DataError(f"{path} holds no steps of training")
    return log


def _add(log: Log, record: dict[str, Any], tokens: float) -> float:
    """Add one record, and return the million tokens read by now."""
    if record["kind"] == "train":
        tokens = float(record["tokens"]) / 1e6
        log.loss.append((tokens, float(record["loss"])))
        if record.get("answer_tokens") is not None:
            log.answers.append((tokens, 100 * float(record["answer_tokens"])))
    elif record["kind"] == "held-out":
        exact = record.get("exact")
        name = f"{record['name']}, exact (%)" if exact is not None else f"{record['name']}, loss"
        value = 100 * float(exact) if exact is not None else float(record["loss"])
        log.held_out.setdefault(name, []).append((tokens, value))
    return tokens


def plot(logs: Sequence[Log], files: Sequence[Path]) -> None:
    """Write loss, answers in training and every held-out evaluation against tokens read, one line a log."""
    check_files(files)
    names = list(dict.fromkeys(name for log in logs for name in log.held_out))
    shown: dict[str, list[Curve]] = {"training loss": [log.loss for log in logs]}
    if any(log.answers for log in logs):
        shown["answer tokens in training (%)"] = [log.answers for log in logs]
    shown |= {name: [log.held_out.get(name, []) for log in logs] for name in names}
    with style():
        figure, axes = panels(len(shown))
        for ax, (title, curves) in zip(axes, shown.items(), strict=True):
            for number, (log, curve) in enumerate(zip(logs, curves, strict=True)):
                looks = look(number) | {"clip_on": False} | ({} if len(curve) < 12 else {"marker": ""})
                if curve:  # an empty line that is not clipped would count as one at the figure's corner
                    ax.plot([x for x, _ in curve], [y for _, y in curve], label=escape.figure(log.name), **looks)
            ax.set_title(escape.figure(title))
            ax.set_xlim(left=0)
            if title.endswith("(%)"):
                ax.set_ylim(-2, 102)
            else:
                ax.set_ylim(bottom=0)
        name_axes(figure, axes, "", "million tokens")
        legend(figure, axes)
        save(figure, files)
