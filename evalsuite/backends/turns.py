"""Who is next, while there is both something to read and something to decode.

Decoding all rows together at the end would be the fastest, and would keep every answer until then. So decoding gets its
share of a long run: answers are stored early, and an interruption loses little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

GRACE_S = 2.0  # of reading before the first turn: a short run loses nothing
SHARE = 8  # seconds of reading for each of decoding
BURST = 16  # steps of decoding in a row: on a GPU the first one waits for what is being read

Turn = Literal["reading", "decoding"]


class Turns:
    """Seconds that reading and decoding took so far."""

    def __init__(self) -> None:
        self._seconds: dict[Turn, float] = {"reading": 0.0, "decoding": 0.0}
        self._steps = 0  # left of this burst

    def next(self) -> Turn:
        """Whose turn it is, where both have work and room."""
        if self._steps == 0 and SHARE * self._seconds["decoding"] < self._seconds["reading"] - GRACE_S:
            self._steps = BURST
        if self._steps == 0:
            return "reading"
        self._steps -= 1
        return "decoding"

    def take(self, turn: Turn, call: Callable[[], bool]) -> bool:
        """Make `call`, and count the time it takes."""
        began = time.monotonic()
        try:
            return call()
        finally:
            self._seconds[turn] += time.monotonic() - began
