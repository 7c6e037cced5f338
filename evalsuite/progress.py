"""How far a run is, on standard error: a bar on a terminal, a line every ten seconds elsewhere.

Work is counted in tokens to read, so that the estimate holds where lengths differ by a factor of a thousand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Told by the runner what is planned and what is done."""

    def start(self, samples: int, tokens: int) -> None:
        """Samples and tokens to go; those stored before are not counted."""

    def advance(self, tokens: int, failed: bool) -> None:
        """One more sample is on disk."""

    def close(self) -> None:
        """No more will come."""


class Silent:
    """Says nothing."""

    def start(self, samples: int, tokens: int) -> None: ...

    def advance(self, tokens: int, failed: bool) -> None: ...

    def close(self) -> None: ...


class Lines:
    """A line through `write` every ten seconds."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock

    def start(self, samples: int, tokens: int) -> None:
        self._samples, self._tokens = samples, tokens
        self._answered = self._failed = self._read = 0
        self._began = self._said = self._clock()

    def advance(self, tokens: int, failed: bool) -> None:
        self._answered += 1
        self._failed += failed
        self._read += tokens
        if (now := self._clock()) - self._said >= LINE_EVERY_S:
            self._said = now
            rate = self._read / (now - self._began)
            left = duration((self._tokens - self._read) / rate) if rate else "unknown"
            errors = f", {self._failed} failed" if self._failed else ""
            self._write(f"{self._answered}/{self._samples} samples{errors}, {rate:,.0f} tokens/s, {left} left")

    def close(self) -> None: ...


class Bar:
    """A bar on a terminal, with rate and time left."""

    def start(self, samples: int, tokens: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._samples, self._answered, self._failed = samples, 0, 0
        self._bar = RichProgress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task(f"0/{samples} samples", total=max(tokens, 1))
        self._bar.start()

    def advance(self, tokens: int, failed: bool) -> None:
        self._answered += 1
        self._failed += failed
        rate = self._bar.tasks[0].speed
        self._bar.update(
            self._task,
            advance=tokens,
            description=f"{self._answered}/{self._samples} samples"
            + (f", {self._failed} failed" if self._failed else "")
            + (f", {rate:,.0f} tokens/s" if rate else ""),
        )

    def close(self) -> None:
        self._bar.stop()


class Screen:
    """The whole terminal, as long as the context lasts; what was there before comes back."""

    def __enter__(self) -> Screen:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, screen=True, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @property
    def height(self) -> int:
        """Lines there are."""
        return self._console.height

    def show(self, text: str) -> None:
        """Put `text` there; it is not parsed as markup. Lines too long for the terminal are cut."""
        from rich.text import Text

        self._live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
