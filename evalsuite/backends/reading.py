"""Reads token stretches with a `Decoder`, many at once: packed rows, each going on from a state of its own.

Work is a stack of jobs. The newest are read first, so few states are held at a time; a stretch longer than the token
budget is read in pieces cut at multiples of the chunk length, so memory does not grow with the context.

Axes: N rows, T tokens of all rows together, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evalsuite.backends.memory import Shelf, taken
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
    best: int  # the most likely of them; -1 where they are not finite or not asked for
    logprobs: list[float]  # of each target
    greedy: bool  # every target was the most likely token
    rank: int  # the largest rank of a target, 1 where none was ranked


@dataclass(eq=False)
class Job:
    """Read `ids` on from `source`; `done` is told the result and may push more jobs.

    `targets[i]`, where given, is scored after `ids[i]`.
    """

    ids: Ids
    source: Held | None
    done: Callable[[Result], None]
    failed: Callable[[str], None]  # told why where the smallest budget was too large
    targets: Ids | None = None
    want_last: bool = False
    want_state: bool = False  # keep a copy of the state alone, not the whole batch it was read in
    stepped: bool = False  # read token by token: for a few tokens whose last state nobody wants
    ranked: bool = False  # find the targets' ranks
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True
    rank: int = 1


def greedy(logits: Tensor) -> list[int]:
    """The most likely token of each row of logits (or log-probabilities) [N, V]; -1 where a row is not finite."""
    return torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1).tolist()


def ranks(table: Tensor, targets: Tensor) -> Tensor:
    """Rank int64 [N] of each target [N] among the log-probabilities [N, V]; equal ones rank by number, as in argmax."""
    own = table.gather(1, targets[:, None])
    before = torch.arange(table.shape[1], device=table.device) < targets[:, None]
    return 1 + ((table > own) | ((table == own) & before)).sum(-1)


def first_rank(table: Tensor, ids: Ids) -> int:
    """Rank of the first of `ids` among the log-probabilities [V]; 1 where there is none."""
    return int(ranks(table[None], torch.tensor([int(ids[0])], device=table.device))) if len(ids) else 1


class _Found(NamedTuple):
    """What one batch found, by row."""

    held: list[Held]
    scores: dict[int, tuple[list[float], bool, int]]
    lasts: dict[int, tuple[Tensor, int]]


class Reader:
    """Runs jobs in batches of at most `batch_tokens` tokens and `rows` rows; neither changes a result.

    Args:
        shelf: where states wait.
    """

    def __init__(self, model: Decoder, batch_tokens: int, rows: int, shelf: Shelf) -> None:
        self.model = model
        self.batch_tokens = max(batch_tokens - batch_tokens % CHUNK, CHUNK)
        self.rows = rows
        self.tokens_read = 0
        self._shelf = shelf
        self._whole: list[Job] = []
        self._stepped: list[Job] = []
        self._device = model.embed.weight.device

    def push(self, job: Job) -> None:
        (self._stepped if job.stepped else self._whole).append(job)
        if job.source is not None:
            self._shelf.put(job.source.state)

    def __bool__(self) -> bool:
        return bool(self._stack)

    @property
    def _stack(self) -> list[Job]:
        """The jobs to read next: token by token first, since they are many and short and free their states."""
        return self._stepped or self._whole

    def run_batch(self) -> None:
        """Read one batch of jobs and tell each that is through.

        Raises:
            torch.OutOfMemoryError: the device's memory is exhausted; the jobs wait as before.
        """
        jobs, pieces = self._take()
        try:
            found = self._read(jobs, pieces)
        except torch.OutOfMemoryError:
            (self._stepped if jobs[0].stepped else self._whole).extend(jobs[::-1])
            raise
        self.tokens_read += sum(map(len, pieces))
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            if row in found.scores:
                logprobs, greedy, rank = found.scores[row]
                job.logprobs += logprobs
                job.greedy &= greedy
                job.rank = max(job.rank, rank)
            if len(piece) == len(job.ids):
                last, best = found.lasts.get(row, (None, -1))
                job.done(Result(found.held[row], last, best, job.logprobs, job.greedy, job.rank))
            else:
                job.ids, job.source = job.ids[len(piece) :], found.held[row]
                job.targets = None if job.targets is None else job.targets[len(piece) :]
                self.push(job)
        self._shelf.settle()

    def shrink(self) -> bool:
        """Halve the budgets after memory was exhausted; False where they are the smallest already."""
        if self.batch_tokens == CHUNK and self.rows == 1:
            return False
        self.batch_tokens = max(self.batch_tokens // 2 // CHUNK * CHUNK, CHUNK)
        self.rows = max(self.rows // 2, 1)
        return True

    def give_up(self, reason: str) -> None:
        """Let the newest job fail."""
        self._stack.pop().failed(reason)

    def _take(self) -> tuple[list[Job], list[Ids]]:
        """The newest jobs of one form that fit the budget; only a job alone in its batch is cut."""
        jobs: list[Job] = []
        room = self.batch_tokens
        stack = self._stack
        while stack and len(jobs) < self.rows and (not jobs or len(stack[-1].ids) <= room):
            jobs.append(stack.pop())
            room -= len(jobs[-1].ids)
        return jobs, [job.ids[: self.batch_tokens] for job in jobs]

    def _read(self, jobs: Sequence[Job], pieces: Sequence[Ids]) -> _Found:
        """Run the model on the jobs' next pieces; changes nothing."""
        ragged = Ragged([len(piece) for piece in pieces], self._device)
        if jobs[0].stepped:
            hidden, state = self._step(jobs, ragged)
            held = [Held(state, 0)] * len(jobs)
            return _Found(held, self._scores(jobs, pieces, hidden, ragged), {})
        ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(self._device)
        hidden, state = self.model(ids, ragged, self._sources(jobs))
        alone = [job.want_state or len(piece) < len(job.ids) for job, piece in zip(jobs, pieces, strict=True)]
        held = [Held(state.select([row]), 0) if copy else Held(state, row) for row, copy in enumerate(alone)]
        return _Found(held, self._scores(jobs, pieces, hidden, ragged), self._lasts(jobs, pieces, hidden, ragged))

    def _step(self, jobs: Sequence[Job], ragged: Ragged) -> tuple[Tensor, State]:
        """Read the jobs token by token: hidden [T, D] in packed order, and the state of those read last."""
        state = self._sources(jobs) or self.model.new_state(len(jobs))
        live = list(range(len(jobs)))
        parts: list[Tensor] = []
        places: list[int] = []
        for t in range(max(ragged.lengths)):
            stay = [at for at, row in enumerate(live) if ragged.lengths[row] > t]
            if len(stay) < len(live):
                live, state = [live[at] for at in stay], state.select(stay)
            tokens = torch.tensor([int(jobs[row].ids[t]) for row in live], device=self._device)
            parts.append(self.model.step(tokens, state))
            places += [ragged.starts[row] + t for row in live]
        read = torch.cat(parts)
        hidden = torch.empty_like(read)
        hidden[torch.tensor(places, device=self._device)] = read
        return hidden, state

    def _sources(self, jobs: Sequence[Job]) -> State | None:
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
                parts.append(self.model.new_state(len(run)) if state is None else taken(state, run, self._device))
                run = []
        return parts[0] if len(parts) == 1 else State.concat(parts)

    def _scores(
        self, jobs: Sequence[Job], pieces: Sequence[Ids], hidden: Tensor, ragged: Ragged
    ) -> dict[int, tuple[list[float], bool, int]]:
        """Log-probability of every target of every job, whether all are the most likely tokens, and the worst rank."""
        rows: list[int] = []
        wanted: list[Ids] = []
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            if job.targets is not None:
                rows += range(ragged.starts[row], ragged.starts[row] + len(piece))
                wanted.append(job.targets[: len(piece)])
        if not wanted:
            return {}
        targets = torch.from_numpy(np.concatenate(wanted).astype(np.int64)).to(self._device)
        values: list[float] = []
        best: list[bool] = []
        places: list[int] = []
        for at in range(0, len(rows), self.batch_tokens):
            now = targets[at : at + self.batch_tokens]
            index = torch.tensor(rows[at : at + self.batch_tokens], device=self._device)
            table = self.model.logits(hidden[index]).log_softmax(-1)
            values += table.gather(1, now[:, None])[:, 0].tolist()
            best += (table.argmax(-1) == now).tolist()
            if any(job.ranked for job in jobs):
                places += ranks(table, now).tolist()
        scores: dict[int, tuple[list[float], bool, int]] = {}
        begin = 0
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            if job.targets is not None:
                end = begin + len(piece)
                scores[row] = values[begin:end], all(best[begin:end]), max(places[begin:end], default=1)
                begin = end
        return scores

    def _lasts(
        self, jobs: Sequence[Job], pieces: Sequence[Ids], hidden: Tensor, ragged: Ragged
    ) -> dict[int, tuple[Tensor, int]]:
        """Log-probabilities of the next token, and the best one, for the rows that are through and asked for them."""
        rows = [
            row
            for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True))
            if job.want_last and len(piece) == len(job.ids)
        ]
        if not rows:
            return {}
        ends = torch.tensor([ragged.starts[row + 1] - 1 for row in rows], device=self._device)
        table = self.model.logits(hidden[ends]).log_softmax(-1)
        return dict(zip(rows, zip(table.unbind(0), greedy(table), strict=True), strict=True))
