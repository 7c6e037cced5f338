"""SIGINT and SIGTERM while a run goes on: stop soon and keep everything; at the second one, stop at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an Exception: no library's handler may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Raises `Interrupted` in the main thread at the first signal and ends the process at the second.

    A context manager; outside the main thread it does nothing, since Python handles signals there only.
    """

    def __init__(self) -> None:
        self._arrived: int | None = None
        self._held = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put a first signal off until the block, which should be short, is through."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._arrived is not None:
            raise Interrupted(self._arrived)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._arrived is not None:
            os._exit(128 + number)
        self._arrived = number
        if not self._held:
            raise Interrupted(number)
