"""A run as it goes: progress of each cell, scores so far with intervals, rate and time left, from its files alone.

Records are only ever appended, so each look reads what is new. Nothing is locked or written: a run may be watched by
anybody, from any host that sees its directory, and a finished one looks the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evalsuite import runfile
from evalsuite.interrupt import Interrupted
from evalsuite.names import aligned, one_line
from evalsuite.progress import Screen, duration
from evalsuite.reports.measured import corpus, in_order
from evalsuite.schema import NewerSchemaError, Record, from_line
from evalsuite.scorers import overall
from evalsuite.show import CellScore, averaged, status
from evalsuite.stats import Interval, interval
from evalsuite.store import record_files
from gdn2.errors import DataError

RECENT_S = 120.0  # over which the rate is taken
BAR = 10  # characters
SIGINT = 2

Cell = tuple[str, str, int]  # task, profile, length (0 without)


@dataclass(slots=True)
class Tally:
    """One metric of one cell so far."""

    scores: dict[str, float] = field(default_factory=dict)  # by key of the sample
    weights: dict[str, float] = field(default_factory=dict)
    kept: list[Record] = field(default_factory=list)  # of a number made from all samples together
    failed: set[str] = field(default_factory=set)
    tokens: int = 0

    def add(self, record: Record) -> bool:
        """Count `record`; whether it is the first answer of its sample."""
        if record.key in self.scores:
            return False
        if record.error is not None:
            self.failed.add(record.key)
            return False
        self.failed.discard(record.key)
        self.scores[record.key], self.weights[record.key] = record.score or 0.0, record.weight
        if record.item is not None:
            self.kept.append(record)
        self.tokens += record.prompt_tokens
        return True

    def measured(self) -> Interval:
        """The number so far. Raises DataError where it is one of all samples together that these do not give."""
        if self.kept:
            return corpus(str(self.kept[0].aggregation), in_order(self.kept))
        return interval(list(self.scores.values()), weights=list(self.weights.values()))


class Watch:
    """What is known of the run at `directory`; `look` reads on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damaged = 0
        self._offsets: dict[Path, int] = {}
        self._cells: dict[Cell, dict[str, Tally]] = {}
        self._recent: deque[tuple[float, int]] = deque()  # (time, tokens) of answers, each sample once
        self._content: Mapping[str, Any] = {}

    def look(self) -> bool:
        """Read what was added; whether the run is still going. Raises DataError where its files cannot be read."""
        self._content = runfile.read(self.directory)
        going = status(self.directory, dict(self._content)) == "running"
        for record in self._new():
            metrics = self._cells.setdefault((record.task, record.protocol, record.length or 0), {})
            first = not any(record.key in tally.scores for tally in metrics.values())
            if metrics.setdefault(record.metric, Tally()).add(record) and first:
                self._recent.append((_seconds(record.created_at), record.prompt_tokens))
        newest = max((at for at, _ in self._recent), default=0.0)
        self._recent = deque(entry for entry in self._recent if entry[0] > newest - RECENT_S)
        return going

    def _new(self) -> Iterator[Record]:
        for path in record_files(self.directory):
            try:
                with open(path, "rb") as file:
                    file.seek(self._offsets.get(path, 0))
                    for line in file:
                        if not line.endswith(b"\n"):
                            break  # being written
                        self._offsets[path] = self._offsets.get(path, 0) + len(line)
                        if (record := self._parse(line)) is not None:
                            yield record
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from None

    def _parse(self, line: bytes) -> Record | None:
        try:
            return from_line(line.decode("utf-8", "replace"))
        except NewerSchemaError:
            raise
        except DataError:
            self.damaged += 1
            return None

    def asked(self) -> dict[Cell, int]:
        """Samples planned for each cell."""
        found: dict[Cell, int] = {}
        for invocation in self._content["invocations"]:
            for cell in invocation.get("resolved", []):
                key = (str(cell["task"]), str(cell["protocol"]), int(cell["length"] or 0))
                found[key] = max(int(cell["samples"]), found.get(key, 0))
        return found

    def rate(self) -> float | None:
        """Prompt tokens a second over the last answers; None before there are enough of them."""
        if len(self._recent) < 2:
            return None
        times = [at for at, _ in self._recent]
        span = max(times) - min(times)
        return sum(tokens for _, tokens in self._recent) / span if span > 0 else None

    def left(self) -> tuple[int, float]:
        """Samples to go, and about how many prompt tokens they hold."""
        samples, tokens = 0, 0.0
        for cell, asked in self.asked().items():
            tallies = list(self._cells.get(cell, {}).values())
            done = max((len(t.scores) for t in tallies), default=0)
            mean = next((t.tokens / len(t.scores) for t in tallies if t.scores), float(cell[2]))
            samples += max(0, asked - done)
            tokens += max(0, asked - done) * mean
        return samples, tokens

    def lines(self, height: int = 10_000) -> list[str]:
        """The run in at most `height` lines; finished cells are left out first."""
        asked = self.asked()
        header = ("task", "profile", "length", "metric", "done", "", "failed", "score", "95 % interval")
        rows, ended = [], []
        for cell in sorted({*asked, *self._cells}):
            for metric, tally in sorted(self._cells.get(cell, {"": Tally()}).items()):
                rows.append(_row(cell, metric, tally, asked.get(cell, 0)))
                ended.append(len(tally.scores) >= asked.get(cell, 0))
        grouped = any(started.get("groups") for started in self._content["invocations"])
        for group in averaged(self._content, self._scores()) if grouped else ():
            value = "-" if group.mean is None else _number(overall(group.metric, group.mean))
            rows.append((group.task, group.protocol, "-", group.metric, group.n, "", group.failed, value, "-"))
            ended.append(True)
        room = max(1, height - 4)
        hidden = 0
        for i in [i for i, done in enumerate(ended) if done] + [i for i, done in enumerate(ended) if not done][::-1]:
            if len(rows) - hidden <= room:
                break
            rows[i] = ()
            hidden += 1
        shown = aligned(header, [row for row in rows if row])
        more = [f"{hidden} more lines do not fit"] if hidden else []
        return [self._title(), "", *shown, *more]

    def _scores(self) -> list[CellScore]:
        """What each metric of each cell says so far."""
        found = []
        for (task, protocol, length), tallies in self._cells.items():
            for metric, tally in tallies.items():
                try:
                    mean = tally.measured().mean if tally.scores else None
                except DataError:
                    mean = None
                counts = (len(tally.scores), len(tally.failed))
                found.append(CellScore(task, protocol, length or None, metric, *counts, mean))
        return found

    def _title(self) -> str:
        samples, tokens = self.left()
        rate = self.rate()
        done = sum(max((len(t.scores) for t in metrics.values()), default=0) for metrics in self._cells.values())
        parts = [one_line(str(self._content["id"])), status(self.directory, dict(self._content))]
        parts.append(f"{done:,}/{done + samples:,} samples")
        if rate:
            parts.append(f"{rate:,.0f} tokens/s")
            if samples:
                parts.append(f"about {duration(tokens / rate)} left")
        if self.damaged:
            parts.append(f"{self.damaged} damaged records")
        return "  ".join(parts)


def _row(cell: Cell, metric: str, tally: Tally, asked: int) -> tuple[object, ...]:
    done = len(tally.scores)
    filled = min(BAR, BAR * done // asked) if asked else BAR
    score = between = "-"
    if done:
        try:
            found = tally.measured()
            mean, low, high = (overall(metric, x) for x in (found.mean, found.low, found.high))
            score, low_text, high_text = map(_number, (mean, low, high))
            between = f"{low_text} to {high_text}"
        except DataError as error:
            between = one_line(str(error))
    bar = "#" * filled + "." * (BAR - filled)
    return (cell[0], cell[1], cell[2] or "-", metric or "-", f"{done}/{asked}", bar, len(tally.failed), score, between)


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 1e5 else f"{value:.3g}"


def _seconds(created_at: str) -> float:
    try:
        return datetime.fromisoformat(created_at).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):  # no date, or one at the end of all years
        return 0.0


def follow(directory: Path, say: Callable[[str], None], every: float, live: bool) -> None:
    """Show the run until it ends or Ctrl-C is pressed, only once where not `live`; the last look stays printed."""
    watch = Watch(directory)
    going = watch.look()
    if live and going:
        try:
            with Screen() as screen:
                while going:
                    screen.show("\n".join(watch.lines(screen.height)))
                    time.sleep(every)
                    going = watch.look()
        except Interrupted as problem:
            if problem.number != SIGINT:
                raise
    for line in watch.lines():
        say(line)
