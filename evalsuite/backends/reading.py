"""Reads token stretches with a `Decoder`, many at once: packed rows, each going on from a state of its own.

Work is a stack of jobs. The newest are read first, so few states are held at a time; a stretch longer than the token
budget is read in pieces cut at multiples of the chunk length, so memory does not grow with the context.

Axes: N rows, T tokens of all rows together, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evalsuite.types import Ids
from gdn2.models import Decoder, State
from gdn2.ragged import Ragged

CHUNK = 64  # tokens; a sequence is cut only at multiples of it, where the numbers are those of one pass


class Held(NamedTuple):
    """The state of one sequence: a row of a batch's state."""

    state: State
    row: int


class Result(NamedTuple):
    """What a job found."""

    held: Held  # the state after its last token
    last: Tensor | None  # log-probabilities [V] of the token after it, fp32; only where asked for
    logprobs: list[float]  # of each target
    greedy: bool  # every target was the most likely token


@dataclass(eq=False)
class Job:
    """Read `ids` on from `source`; `done` is told the result and may push more jobs.

    `targets[i]`, where given, is scored after `ids[i]`.
    """

    ids: Ids
    source: Held | None
    done: Callable[[Result], None]
    targets: Ids | None = None
    want_last: bool = False
    want_state: bool = False  # keep a copy of the state alone, not the whole batch it was read in
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True


class Reader:
    """Runs jobs in batches of at most `batch_tokens` tokens and `rows` rows; neither changes a result."""

    def __init__(self, model: Decoder, batch_tokens: int, rows: int) -> None:
        self.model = model
        self.batch_tokens = max(batch_tokens - batch_tokens % CHUNK, CHUNK)
        self.rows = rows
        self.tokens_read = 0
        self._stack: list[Job] = []
        self._device = model.embed.weight.device

    def push(self, job: Job) -> None:
        self._stack.append(job)

    def __bool__(self) -> bool:
        return bool(self._stack)

    def run_batch(self) -> None:
        """Read one batch of jobs and tell each that is through."""
        jobs, pieces = self._take()
        ragged = Ragged([len(piece) for piece in pieces], self._device)
        ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(self._device)
        hidden, state = self.model(ids, ragged, self._sources(jobs))
        self.tokens_read += ragged.n_tokens
        self._score(jobs, pieces, hidden, ragged)
        lasts = self._lasts(jobs, pieces, hidden, ragged)
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            through = len(piece) == len(job.ids)
            held = Held(state.select([row]), 0) if job.want_state or not through else Held(state, row)
            if through:
                job.done(Result(held, lasts.get(row), job.logprobs, job.greedy))
            else:
                job.ids, job.source = job.ids[len(piece) :], held
                job.targets = None if job.targets is None else job.targets[len(piece) :]
                self.push(job)

    def _take(self) -> tuple[list[Job], list[Ids]]:
        """The newest jobs that fit the budget; only a job alone in its batch is cut."""
        jobs: list[Job] = []
        room = self.batch_tokens
        while self._stack and len(jobs) < self.rows and (not jobs or len(self._stack[-1].ids) <= room):
            jobs.append(self._stack.pop())
            room -= len(jobs[-1].ids)
        return jobs, [job.ids[: self.batch_tokens] for job in jobs]

    def _sources(self, jobs: list[Job]) -> State | None:
        """The states the rows go on from; rows of one batch are selected together."""
        if all(job.source is None for job in jobs):
            return None
        parts: list[State] = []
        run: list[int] = []
        for job, following in zip(jobs, [*jobs[1:], None], strict=True):
            state = None if job.source is None else job.source.state
            run.append(0 if job.source is None else job.source.row)
            after = following.source.state if following is not None and following.source is not None else None
            if following is None or after is not state:
                parts.append(self.model.new_state(len(run)) if state is None else state.select(run))
                run = []
        return parts[0] if len(parts) == 1 else State.concat(parts)

    def _score(self, jobs: list[Job], pieces: list[Ids], hidden: Tensor, ragged: Ragged) -> None:
        """Log-probability of every target of every job, and whether it is the most likely token."""
        rows: list[int] = []
        wanted: list[Ids] = []
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            if job.targets is not None:
                rows += range(ragged.starts[row], ragged.starts[row] + len(piece))
                wanted.append(job.targets[: len(piece)])
        if not wanted:
            return
        targets = torch.from_numpy(np.concatenate(wanted).astype(np.int64)).to(self._device)
        values: list[float] = []
        best: list[bool] = []
        for at in range(0, len(rows), self.batch_tokens):
            now = targets[at : at + self.batch_tokens]
            index = torch.tensor(rows[at : at + self.batch_tokens], device=self._device)
            table = self.model.logits(hidden[index]).log_softmax(-1)
            values += table.gather(1, now[:, None])[:, 0].tolist()
            best += (table.argmax(-1) == now).tolist()
        begin = 0
        for job, piece in zip(jobs, pieces, strict=True):
            if job.targets is not None:
                job.logprobs += values[begin : begin + len(piece)]
                job.greedy &= all(best[begin : begin + len(piece)])
                begin += len(piece)

    def _lasts(self, jobs: list[Job], pieces: list[Ids], hidden: Tensor, ragged: Ragged) -> dict[int, Tensor]:
        """Log-probabilities of the next token for the rows that are through and asked for them."""
        rows = [
            row
            for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True))
            if job.want_last and len(piece) == len(job.ids)
        ]
        if not rows:
            return {}
        ends = torch.tensor([ragged.starts[row + 1] - 1 for row in rows], device=self._device)
        table = self.model.logits(hidden[ends]).log_softmax(-1)
        return dict(zip(rows, table.unbind(0), strict=True))
