"""Decoding on a GPU: one captured step over a pool of states of fixed size, finished rows make room for waiting ones.

The step takes its tokens from where it left them, so the next one is sent off before the last one's tokens are looked
at: text is decoded and stop strings are searched while the device works. A row that turns out to have ended has then
made one step too many, which nobody reads.

Axes: P slots of the pool, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from evalsuite.backends.decoding import Decoding, Generation
from evalsuite.backends.memory import cache_bytes_per_token, taken
from evalsuite.backends.reading import Coming
from evalsuite.backends.sampling import Form, drawn, draws, form, greedy
from evalsuite.types import Response, Tokenizer
from gdn2.models import Decoder, State

WARM_UPS = 2  # calls before a step is captured, in which kernels are compiled and libraries make their plans


class _Sent(NamedTuple):
    """A step on its way: whose token each slot's is, and the tokens."""

    slots: list[Generation | None]
    tokens: Coming


class Pool:
    """States of P sequences, their last tokens, and the step that moves both on, for the model as it is now.

    The step takes the most likely tokens. Where any is drawn, a second step follows that replaces them, captured when
    it is first needed: whoever samples nothing pays nothing.
    """

    def __init__(self, model: Decoder, size: int, note: Callable[[str], None]) -> None:
        self.model, self.size, self._note = model, size, note
        self._made_for = _fingerprint(model)
        device = model.embed.weight.device
        self.state = model.new_state(size)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.best = torch.zeros_like(self.tokens)
        self.draws = draws([None] * size, [0] * size, model.config.vocab_size, device)
        self._logits = torch.empty(0)
        self._draw_steps: dict[Form, Callable[[], object]] = {}
        self.step: Callable[[], object] = self._captured() if device.type == "cuda" else self._step

    def serves(self, model: Decoder) -> bool:
        """Whether `model` is still what the step was made for."""
        return self._made_for == _fingerprint(model)

    def _step(self) -> None:
        self._logits = self.model.logits(self.model.step(self.tokens, self.state), stepped=True)
        self._take(greedy(self._logits))

    def _take(self, found: Tensor) -> None:
        self.best.copy_(found)
        self.tokens.copy_(self.best.clamp_min(0))

    def draw(self, kind: Form) -> None:
        """Replace the tokens of a step by drawn ones, where any is."""
        if kind != "greedy":
            if kind not in self._draw_steps:
                self._draw_steps[kind] = self._drawing(kind)
            self._draw_steps[kind]()

    def _drawing(self, kind: Form) -> Callable[[], object]:
        def tried() -> Tensor:
            return drawn(self._logits, self.draws, kind)

        def step() -> None:
            self._take(tried())
            self.draws.advance()

        # Only a captured step leaves its logits where they were.
        return step if self.step == self._step else self._graph(step, warm_up=tried)

    def _captured(self) -> Callable[[], object]:
        """The step as a CUDA graph. What the warm-up leaves in the states is overwritten by whoever enters."""
        return self._graph(self._step, warm_up=self._step)

    def _graph(self, step: Callable[[], None], warm_up: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what waits for the device: slower, but no less right
            self._note(f"a step could not be captured: {' '.join(str(error).split())[:200]}")
            return step
        return graph.replay


def pooled(model: Decoder) -> bool:
    """Whether `model` decodes in a pool: on a GPU, unless it has caches that grow."""
    return model.embed.weight.is_cuda and not cache_bytes_per_token(model)


def _fingerprint(model: Decoder) -> tuple[object, ...]:
    """What a captured step depends on: where the parameters lie, and how products are made."""
    return model.fast, *(parameter.data_ptr() for parameter in model.parameters())


class PooledDecoding(Decoding):
    """Generations under way in a pool that doubles until it has all slots. See `Decoding`.

    Args:
        pools: of earlier calls, and then that of this one: a capture takes as long as many steps.
        note: told what a user should know.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, slots: int, answer: Callable[[int, Response], None],
        pools: list[Pool], note: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, slots, answer)
        self._pools, self._note = pools, note
        self._pool: Pool | None = None
        self._places: list[Generation | None] = []  # whose each slot is
        self._sent: _Sent | None = None

    @property
    def _living(self) -> list[Generation]:
        return [item for item in self._places if item is not None]

    def restart(self) -> list[Generation]:
        self._live = self._living
        self._pool, self._places, self._sent = None, [], None
        self._pools.clear()
        return super().restart()

    def step(self) -> None:
        """Send off one more token of every live generation, and look at those sent before."""
        self._enter()
        sent = None
        if self._living:
            assert self._pool is not None
            self._pool.step()
            self._pool.draw(form(item.request.sampling for item in self._living))
            sent = _Sent(list(self._places), Coming([self._pool.best]))
        ready, self._sent = self._sent, sent
        if ready is not None:
            self._look(ready)
        self._live = self._living

    def __bool__(self) -> bool:
        return super().__bool__() or self._sent is not None

    def _look(self, sent: _Sent) -> None:
        for slot, (item, token) in enumerate(zip(sent.slots, sent.tokens.numbers(), strict=True)):
            if item is None or self._places[slot] is not item:
                continue  # it had ended when this step was sent off
            item.token = token
            if not self._goes_on(item):
                self._places[slot] = None

    def _enter(self) -> None:
        """Fill free slots from the waiting; states are copied in."""
        room = self.slots - len(self._living)
        entering = self._waiting[:room]
        if not entering:
            return
        self._grow(len(self._living) + len(entering))
        assert self._pool is not None
        free = [slot for slot, item in enumerate(self._places) if item is None][: len(entering)]
        states = [taken(item.held.state, [item.held.row], self._device) for item in entering]
        self._pool.state.write(free, State.concat(states))
        at = torch.tensor(free, device=self._device)
        self._pool.tokens[at] = torch.tensor([item.token for item in entering], device=self._device)
        asked, positions = [item.request.sampling for item in entering], [len(item.ids) for item in entering]
        self._pool.draws.put(at, draws(asked, positions, self.model.config.vocab_size, self._device))
        for slot, item in zip(free, entering, strict=True):
            self._places[slot] = item
        del self._waiting[: len(entering)]
        self._live = self._living

    def _grow(self, rows: int) -> None:
        """Make the pool hold `rows`."""
        old = self._pool
        if old is not None and old.size >= rows:
            return
        pool = next((x for x in self._pools if rows <= x.size <= self.slots and x.serves(self.model)), None)
        if pool is None:
            self._pools.clear()
            pool = Pool(self.model, min(self.slots, 1 << (rows - 1).bit_length()), self._note)
            self._pools.append(pool)
        if old is not None:
            here = list(range(old.size))
            pool.state.write(here, old.state)
            pool.tokens[: old.size] = old.tokens
            pool.draws.put(torch.arange(old.size, device=self._device), old.draws)
        self._pool = pool
        self._places += [None] * (pool.size - len(self._places))
