"""Reads token stretches with a `Decoder`, many at once: packed rows, each going on from a state of its own.

Work is a stack of jobs. The newest are read first, so few states are held at a time; a stretch longer than the token
budget is read in pieces cut at multiples of the chunk length, so memory does not grow with the context. Stretches that
others wait behind are read early, while there is little else to fill a batch with.

Axes: N rows, T tokens of all rows together, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evalsuite.backends.memory import Shelf, taken
from evalsuite.backends.sampling import choose, greedy
from evalsuite.types import Generate, Ids, LogLikelihood, Request, Sampling
from gdn2.models import Decoder, State
from gdn2.ragged import Ragged

CHUNK = 64  # tokens; a sequence is cut only at multiples of it, where the numbers are those of one pass

# Long sequences that are read side by side: a GPU runs the chunks of one sequence one after the other, and one alone
# leaves most of it idle meanwhile.
TOGETHER = {"cuda": 4}

# Log-probabilities that are made at once. On a CPU as many as its cache holds: 1,600 rows of 2,048 took 31 ms together,
# 16 ms in parts of 128.
TABLE_VALUES = {"cpu": 1 << 18}


class Held(NamedTuple):
    """The state of one sequence: a row of a batch's state."""

    state: State
    row: int


class Result(NamedTuple):
    """What a job found."""

    held: Held  # the state after its last token
    heads: list[list[float]]  # of each of the job's heads: log-probability, whether it is the most likely, rank
    best: int  # the most likely token after the last one; -1 where values are not finite or nothing was asked
    drawn: list[int]  # a token after the last one for each of the job's draws; -1 likewise
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
    heads: Ids | None = None  # tokens to be scored after the last one; may be none: then the most likely is found
    draws: Sequence[Sampling] = ()  # tokens to be drawn after the last one, each the first of an answer
    want_state: bool = False  # others go on from its end
    stepped: bool = False  # read token by token: for a few tokens whose last state nobody wants
    ranked: bool = False  # find the ranks of targets and heads
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True
    rank: int = 1


def ranks(table: Tensor, targets: Tensor) -> Tensor:
    """Rank int64 [N] of each target [N] among the log-probabilities [N, V]; equal ones rank by number, as in argmax."""
    own = table.gather(1, targets[:, None])
    before = torch.arange(table.shape[1], device=table.device) < targets[:, None]
    return 1 + ((table > own) | ((table == own) & before)).sum(-1)


class _Found(NamedTuple):
    """What one batch found. The tensors may still be on their way from the device."""

    jobs: list[Job]
    pieces: list[Ids]
    held: list[Held]
    scores: Coming  # of all targets: log-probability, whether it was the most likely token, and rank, [n, 3]
    heads: Coming  # the same of all heads
    best: Coming  # the most likely token after each job that is through and asked for it [n]
    drawn: Coming  # the tokens of all draws


class Coming:
    """Numbers on their way to the host. Copied when made, so that work queued later is not waited for."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._parts = [part.to("cpu", non_blocking=True, copy=True) for part in parts]
        if parts and parts[0].is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def numbers(self) -> list[Any]:
        """All of them, once they are here."""
        return [x for part in self._arrived() for x in part.tolist()]

    def columns(self) -> list[Any]:
        """The columns of all rows [n, 3], once they are here."""
        parts = self._arrived()
        return list(torch.cat(parts).numpy().T) if parts else [np.zeros(0)] * 3

    def _arrived(self) -> list[Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._parts


class Reader:
    """Runs jobs in batches of at most `batch_tokens` tokens and `rows` rows; neither changes a result.

    On a GPU the next batch is made and sent off before the results of the last one are looked at.

    Args:
        shelf: where states wait.
        rounding: what log-probabilities are rounded to, as lm-eval's are; None is fp32.
    """

    def __init__(
        self, model: Decoder, batch_tokens: int, rows: int, shelf: Shelf, rounding: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.batch_tokens = max(batch_tokens - batch_tokens % CHUNK, CHUNK)
        self.rows = rows
        self.tokens_read = 0
        self._shelf = shelf
        self._whole: list[Job] = []
        self._awaited: list[Job] = []  # others wait behind them
        self._stepped: list[Job] = []
        self._device = model.embed.weight.device
        self._rounding = rounding
        self._table_values = TABLE_VALUES.get(self._device.type, 1 << 30)
        self._together = TOGETHER.get(self._device.type, 1)
        self._ahead = self._device.type == "cuda"
        self._sent: _Found | None = None

    def push(self, job: Job) -> None:
        self._stack_of(job).append(job)
        if job.source is not None:
            self._shelf.put(job.source.state)

    def _stack_of(self, job: Job) -> list[Job]:
        return self._stepped if job.stepped else self._awaited if job.want_state else self._whole

    def __bool__(self) -> bool:
        return bool(self._stepped or self._whole or self._awaited) or self._sent is not None

    def _stacks(self) -> list[list[Job]]:
        """Where to take the next batch from: token by token first, since they are many and short and free their states.

        What others wait behind goes before the rest only while the rest does not fill two batches, so that a chain of
        such stretches takes along what would else be left over, and not all of its states are held at once.
        """
        if self._stepped:
            return [self._stepped]
        room = 2 * self.batch_tokens
        for job in reversed(self._whole):
            room -= len(job.ids)
            if room <= 0:
                return [self._whole, self._awaited]
        return [self._awaited, self._whole]

    def run_batch(self) -> None:
        """Read one batch of jobs and tell each job of this one, or of the one before, that is through.

        Raises:
            torch.OutOfMemoryError: the device's memory is exhausted; the jobs wait as before.
        """
        found = None
        jobs, pieces = self._take()
        if jobs:
            try:
                found = self._read(jobs, pieces)
            except torch.OutOfMemoryError:
                for job in reversed(jobs):
                    self._stack_of(job).append(job)
                raise
            self.tokens_read += sum(map(len, pieces))
        ready, self._sent = (self._sent, found) if self._ahead else (found, None)
        if ready is not None:
            self._tell(ready)
            self._shelf.settle()

    def _tell(self, found: _Found) -> None:
        """Hand a batch's results to its jobs; those that are not through wait for their next piece."""
        logprobs, best_ones, places = found.scores.columns()
        heads, bests, drawn = (iter(x.numbers()) for x in (found.heads, found.best, found.drawn))
        at, going_on = 0, []
        for row, (job, piece) in enumerate(zip(found.jobs, found.pieces, strict=True)):
            if job.targets is not None:
                part = slice(at, at := at + len(piece))
                job.logprobs += logprobs[part].tolist()
                job.greedy &= bool(best_ones[part].all())
                job.rank = max(job.rank, int(places[part].max(initial=1)))
            if len(piece) == len(job.ids):
                asked = [] if job.heads is None else list(islice(heads, len(job.heads)))
                best = -1 if job.heads is None else next(bests)
                first = list(islice(drawn, len(job.draws)))
                job.done(Result(found.held[row], asked, best, first, job.logprobs, job.greedy, job.rank))
            else:
                job.ids, job.source = job.ids[len(piece) :], found.held[row]
                job.targets = None if job.targets is None else job.targets[len(piece) :]
                going_on.append(job)
        for job in reversed(going_on):  # the first one is taken first again
            self.push(job)

    def shrink(self) -> bool:
        """Halve the budgets after memory was exhausted; False where they are the smallest already."""
        if self.batch_tokens == CHUNK and self.rows == 1:
            return False
        self.batch_tokens = max(self.batch_tokens // 2 // CHUNK * CHUNK, CHUNK)
        self.rows = max(self.rows // 2, 1)
        return True

    def give_up(self, reason: str) -> None:
        """Let the job that would be read next fail."""
        next(stack for stack in self._stacks() if stack).pop().failed(reason)

    def _take(self) -> tuple[list[Job], list[Ids]]:
        """The newest jobs of one form, and as much of each as fits the budget."""
        jobs: list[Job] = []
        pieces: list[Ids] = []
        stacks = self._stacks()
        room = self.batch_tokens
        most = max(room // min(self._together, max(sum(map(len, stacks)), 1)), CHUNK)
        for stack in stacks:
            while stack and len(jobs) < self.rows:
                piece = stack[-1].ids
                if len(piece) > min(room, most):
                    piece = piece[: min(room, most) // CHUNK * CHUNK]
                    if jobs and len(piece) < min(most, self.batch_tokens // 4):
                        break  # not worth a state of its own
                jobs.append(stack.pop())
                pieces.append(piece)
                room -= len(piece)
        return jobs, pieces

    def _read(self, jobs: list[Job], pieces: list[Ids]) -> _Found:
        """Run the model on the jobs' next pieces; changes nothing."""
        ragged = Ragged([len(piece) for piece in pieces], self._device)
        if jobs[0].stepped:
            hidden, state = self._step(jobs, ragged)
            held = [Held(state, 0)] * len(jobs)
        else:
            ids = self._sent_over(np.concatenate(pieces))
            hidden, state = self.model(ids, ragged, self._sources(jobs))
            kept = [job.want_state or len(piece) < len(job.ids) for job, piece in zip(jobs, pieces, strict=True)]
            few = 2 * sum(kept) < len(jobs)  # they would hold on to the states of all
            held = [Held(state.select([row]), 0) if few and keep else Held(state, row) for row, keep in enumerate(kept)]
        scores = Coming(self._scores(jobs, pieces, hidden, ragged))
        return _Found(jobs, pieces, held, scores, *map(Coming, self._ends(jobs, pieces, hidden, ragged)))

    def _sent_over(self, numbers: Ids) -> Tensor:
        """Integers as int64 on the device, without waiting for it."""
        here = torch.from_numpy(numbers.astype(np.int64))
        return here.pin_memory().to(self._device, non_blocking=True) if self._ahead else here.to(self._device)

    def _step(self, jobs: Sequence[Job], ragged: Ragged) -> tuple[Tensor, State]:
        """Read the jobs token by token: hidden [T, D] in packed order, and the state of those read last."""
        state = self._sources(jobs, copied=True) or self.model.new_state(len(jobs))
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

    def _selected(self, state: State, rows: list[int], copied: bool) -> State:
        whole = rows == list(range(state.n_sequences)) and state.seen.device == self._device
        return state if whole and not copied else taken(state, rows, self._device)

    def _sources(self, jobs: Sequence[Job], copied: bool = False) -> State | None:
        """The states the rows go on from, which may be those that were held unless they must be `copied`."""
        if all(job.source is None for job in jobs):
            return None
        parts: list[State] = []
        run: list[int] = []
        for job, following in zip(jobs, [*jobs[1:], None], strict=True):
            state = None if job.source is None else job.source.state
            run.append(0 if job.source is None else job.source.row)
            after = following.source.state if following is not None and following.source is not None else None
            if following is None or after is not state:
                parts.append(self.model.new_state(len(run)) if state is None else self._selected(state, run, copied))
                run = []
        return parts[0] if len(parts) == 1 else State.concat(parts)

    def _table(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and log-probabilities [n, V] after hidden [n, D], the latter rounded if so asked."""
        logits = self.model.logits(hidden)
        return logits, logits.log_softmax(-1) if self._rounding is None else logits.to(self._rounding).log_softmax(-1)

    def _scores(self, jobs: Sequence[Job], pieces: Sequence[Ids], hidden: Tensor, ragged: Ragged) -> list[Tensor]:
        """What `_picked` says of every target of every job: [n, 3] together."""
        rows: list[int] = []
        wanted: list[Ids] = []
        for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            if job.targets is not None:
                rows += range(ragged.starts[row], ragged.starts[row] + len(piece))
                wanted.append(job.targets[: len(piece)])
        if not wanted:
            return []
        targets = self._sent_over(np.concatenate(wanted))
        places = self._sent_over(np.array(rows))
        parts = []
        size = min(self.batch_tokens, max(self._table_values // self.model.config.vocab_size, CHUNK))
        for at in range(0, len(rows), size):
            now = targets[at : at + size]
            _, table = self._table(hidden[places[at : at + size]])
            parts.append(self._picked(table, torch.arange(len(now), device=self._device), now, jobs))
        return parts

    @staticmethod
    def _picked(table: Tensor, rows: Tensor, tokens: Tensor, jobs: Sequence[Job]) -> Tensor:
        """Of `tokens` [n] in `rows` [n] of a table of log-probabilities: that, whether it is the most likely, rank."""
        own = table[rows, tokens].float()
        rank = ranks(table[rows], tokens).float() if any(job.ranked for job in jobs) else torch.ones_like(own)
        return torch.stack([own, (table.argmax(-1)[rows] == tokens).float(), rank], 1)

    def _ends(
        self, jobs: Sequence[Job], pieces: Sequence[Ids], hidden: Tensor, ragged: Ragged
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the jobs that are through: what `_picked` says of the heads, the most likely tokens, and those drawn."""
        rows = [
            (row, job.heads)
            for row, (job, piece) in enumerate(zip(jobs, pieces, strict=True))
            if job.heads is not None and len(piece) == len(job.ids)
        ]
        if not rows:
            return [], [], []
        ends = self._sent_over(np.array([ragged.starts[row + 1] - 1 for row, _ in rows]))
        logits, table = self._table(hidden[ends])
        of = self._sent_over(np.repeat(np.arange(len(rows)), [len(heads) for _, heads in rows]))
        heads = self._sent_over(np.concatenate([heads for _, heads in rows]))
        asked = [(at, one) for at, (row, _) in enumerate(rows) for one in jobs[row].draws]
        drawn: list[Tensor] = []
        if asked:
            places = self._sent_over(np.array([at for at, _ in asked]))
            drawn = [choose(logits, [one for _, one in asked], [0] * len(asked), places)]
        return [self._picked(table, of, heads, jobs)], [greedy(logits)], drawn


def ends(ending: Sequence[Request]) -> tuple[Ids | None, list[Sampling], bool]:
    """Heads (None where none ends), draws and `ranked` of a job, for the requests whose contexts end with it."""
    scored = [request for request in ending if isinstance(request, LogLikelihood)]
    firsts = [request.continuation.ids[:1] for request in scored]
    drawn = [request.sampling for request in ending if isinstance(request, Generate) and request.sampling is not None]
    heads = np.concatenate(firsts) if firsts else np.zeros(0, np.int32)
    return heads if ending else None, drawn, any(request.ranked for request in scored)
