"""Decoding of many sequences in one step each; finished rows leave, waiting ones enter.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from evalsuite.backends.memory import taken
from evalsuite.backends.reading import Held
from evalsuite.backends.sampling import choose
from evalsuite.types import Generate, Response, Tokenizer
from gdn2.models import Decoder, State


@dataclass(eq=False)
class Generation:
    """One request whose prompt has been read."""

    index: int
    request: Generate
    held: Held
    token: int  # the next token, not yet appended; -1 where the logits were not finite
    started: float
    ids: list[int] = field(default_factory=list)


Ended = Literal["eos", "stop", "length", "decided"]


def append(ids: list[int], token: int, request: Generate, tokenizer: Tokenizer) -> tuple[str, Ended | None]:
    """Add a token to the answer `ids`, unless it is EOS: how it ended if it did, and its text then."""
    ended: Ended | None = "eos" if token == tokenizer.eos_id else None
    if ended is None:
        ids.append(token)
    if ended is None and not request.stop and request.decision is None and len(ids) < request.max_tokens:
        return "", None  # nobody looks at the text yet
    text = tokenizer.decode(ids)
    cut = min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=-1)
    if cut >= 0:
        return text[:cut], "stop"
    if ended is None and request.decision is not None and request.decision.settled(text):
        ended = "decided"
    elif ended is None and len(ids) >= request.max_tokens:
        ended = "length"
    return text, ended


class Decoding:
    """Generations under way. `answer` is told (index, response) of each that ends."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, slots: int, answer: Callable[[int, Response], None]
    ) -> None:
        self.model, self.tokenizer, self.slots, self._answer = model, tokenizer, slots, answer
        self._device = model.embed.weight.device
        self._live: list[Generation] = []
        self._waiting: list[Generation] = []
        self._state: State | None = None

    def add(self, generation: Generation) -> None:
        if self._goes_on(generation):
            self._waiting.append(generation)

    @property
    def full(self) -> bool:
        return len(self._live) + len(self._waiting) >= self.slots

    def __bool__(self) -> bool:
        return bool(self._live or self._waiting)

    def pause(self) -> None:
        """Take in no more than there are now, until some have ended."""
        self.slots = max(1, len(self._live) + len(self._waiting))

    def restart(self) -> list[Generation]:
        """Forget the live generations after a step that failed, and go on with half the slots.

        Returns:
            the forgotten ones; where none was live yet, the one that could not enter.
        """
        lost = self._live or [self._waiting.pop(0)]
        self.slots = max(1, len(lost) // 2)
        self._live, self._state = [], None
        return lost

    def step(self) -> None:
        """One more token of every live generation.

        Raises:
            torch.OutOfMemoryError: the device's memory is exhausted; the live generations cannot go on.
        """
        self._enter()
        assert self._state is not None
        tokens = torch.tensor([item.token for item in self._live], device=self._device)
        logits = self.model.logits(self.model.step(tokens, self._state), stepped=True)
        asked, positions = [item.request.sampling for item in self._live], [len(item.ids) for item in self._live]
        for item, token in zip(self._live, choose(logits, asked, positions).tolist(), strict=True):
            item.token = token
        stay = [row for row, item in enumerate(self._live) if self._goes_on(item)]
        if len(stay) < len(self._live):
            self._live = [self._live[row] for row in stay]
            self._state = self._state.select(stay) if stay else None

    def _enter(self) -> None:
        """Fill free slots from the waiting; states are copied in."""
        entering = self._waiting[: self.slots - len(self._live)]
        if not entering:
            return
        parts = [taken(item.held.state, [item.held.row], self._device) for item in entering]
        state = State.concat(parts if self._state is None else [self._state, *parts])
        del self._waiting[: len(entering)]
        self._state = state
        self._live += entering

    def _goes_on(self, item: Generation) -> bool:
        """Append the new token; a generation that ends is answered."""
        if item.token < 0:
            error = f"the model gave logits that are not finite after {len(item.ids)} generated tokens"
            self._end(item, Response(ended="error", error=error, tokens=len(item.ids)))
            return False
        text, ended = append(item.ids, item.token, item.request, self.tokenizer)
        if ended is None:
            return True
        self._end(item, Response(text=text, tokens=len(item.ids), ended=ended))
        return False

    def _end(self, item: Generation, response: Response) -> None:
        latency = time.monotonic() - item.started
        self._answer(
            item.index,
            Response(
                text=response.text,
                tokens=response.tokens,
                ended=response.ended,
                error=response.error,
                latency_s=latency,
            ),
        )
