"""Runs a plan: asks the backend for what the store lacks and writes every sample as soon as it is answered.

A request that fails becomes records with an error and the rest goes on. An interruption leaves everything answered so
far on disk. An error of the backend itself (a lost device, a bug) ends the run: it may have poisoned what follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from evalsuite import provenance, runfile
from evalsuite.interrupt import Interrupted, Signals
from evalsuite.plan import Cell, Entry, Plan
from evalsuite.progress import Progress, Silent
from evalsuite.ranks import Ranks, merged
from evalsuite.schema import PLAIN, SCHEMA_VERSION, Record
from evalsuite.store import RunStore, now
from evalsuite.types import Accountable, Backend, Generate, LogLikelihood, ModelInfo, Request, Response, Sample, Score
from gdn2.errors import StorageError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one invocation did, in samples."""

    planned: int
    before: int  # stored already when it started
    answered: int  # stored by it, failed ones included
    failed: int
    tokens: int  # read for the answered ones
    seconds: float
    signal: int | None = None  # what stopped it
    lost: tuple[int, ...] = ()  # processes that never came back
    report: Mapping[str, object] = field(default_factory=dict)  # of the backend; see `evalsuite.types.Accountable`

    @property
    def status(self) -> str:
        if self.signal is not None:
            return "interrupted"
        return "incomplete" if self.failed or self.lost else "complete"

    @property
    def exit_code(self) -> int:
        if self.signal is not None:
            return 128 + self.signal
        return 5 if self.failed or self.lost else 0


@dataclass(slots=True)
class _Asked:
    """A sample on its way."""

    cell: Cell
    entry: Entry
    sample: Sample
    responses: list[Response | None]
    missing: int


class _Tally:
    def __init__(self, plan: Plan, store: RunStore) -> None:
        self.started = time.monotonic()
        self.planned = sum(len(cell.entries) for cell in plan.cells)
        self.before = sum(store.index.done(entry.key) for cell in plan.cells for entry in cell.entries)
        self.answered = self.failed = self.tokens = 0

    def outcome(self, signal: int | None) -> Outcome:
        seconds = time.monotonic() - self.started
        return Outcome(self.planned, self.before, self.answered, self.failed, self.tokens, seconds, signal)


def run(
    plan: Plan,
    backend: Backend,
    directory: Path,
    passed: Mapping[str, object],
    warn: Callable[[str], None],
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Outcome:
    """Answer what the run at `directory` lacks of `plan`, under its lock, and keep its `run.json`.

    Args:
        passed: the user's settings, for `run.json`.
        warn: told of repairs and damaged records.
        ranks: the other processes of the run; rank 0 speaks for all.

    A run that lacks nothing is left as it is. Raises SelfCheckError where the backend refutes itself: nothing is asked.
    """
    info, ranks = plan.info, ranks or Ranks()
    shared = {"run_id": plan.run_id, "model": info.name, "checkpoint": info.checkpoint}
    with RunStore(directory, shared, warn, ranks.rank) as store:
        ranks.meet()  # none writes before all have read
        tally = _Tally(plan, store)
        if tally.before == tally.planned and (directory / runfile.NAME).exists():
            return tally.outcome(None)
        began = time.perf_counter()
        check = backend.self_check() if isinstance(backend, Accountable) else None
        checked = {"self_check": check, "self_check_s": round(time.perf_counter() - began, 3)}
        if ranks.rank == 0:
            runfile.start(directory, plan, passed, checked | provenance.collect())
        try:
            outcome = _joined(execute(plan, backend, store, progress, ranks), backend, ranks)
        except BaseException:
            # The disk may be what failed: the first error is the one to report.
            with suppress(StorageError):
                store.sync()
                if ranks.rank == 0:
                    runfile.finish(directory, Outcome(0, 0, 0, 0, 0, 0.0), "failed")
            raise
        if ranks.rank == 0:
            runfile.finish(directory, outcome, outcome.status)
        return outcome


def _joined(outcome: Outcome, backend: Backend, ranks: Ranks) -> Outcome:
    """What all processes did, on rank 0; what this one did, elsewhere."""
    report = backend.report() if isinstance(backend, Accountable) else {}
    counts = {"answered": outcome.answered, "failed": outcome.failed, "tokens": outcome.tokens}
    number = outcome.signal
    with Signals():
        try:
            accounts = ranks.gather({"counts": counts, "report": dict(report)})
        except Interrupted as interrupted:
            accounts, number = [{"counts": counts, "report": dict(report)}], interrupted.number
    sums = merged(account and account["counts"] for account in accounts)
    report = merged(account and account["report"] for account in accounts)
    lost = tuple(rank for rank, account in enumerate(accounts) if account is None)
    return replace(outcome, **sums, signal=number, lost=lost, report=report)


def execute(
    plan: Plan, backend: Backend, store: RunStore, progress: Progress | None = None, ranks: Ranks | None = None
) -> Outcome:
    """Answer what `store`, which must be open, lacks of `plan`, or this process's share of it.

    Raises StorageError when the disk refuses a record, and whatever the backend raises; what was answered is kept.
    """
    progress, ranks = progress or Silent(), ranks or Ranks()
    tally = _Tally(plan, store)
    lacking = [entry for cell in plan.cells for entry in cell.entries if not store.index.done(entry.key)]
    mine = ranks.share(lacking)
    todo = [entry for entry in lacking if entry.key in mine]
    number: int | None = None
    with Signals() as signals:
        try:
            progress.start(len(todo), sum(entry.tokens for entry in todo))
            try:
                for group in plan.groups():
                    _answer(_pending(group, mine), backend, _Writer(plan, store, progress, tally, signals))
            finally:
                progress.close()
        except Interrupted as interrupted:
            number = interrupted.number
    store.sync()
    return tally.outcome(number)


class _Writer:
    """Stores one finished sample and counts it."""

    def __init__(self, plan: Plan, store: RunStore, progress: Progress, tally: _Tally, signals: Signals) -> None:
        self._plan, self._store, self._progress, self._tally, self._signals = plan, store, progress, tally, signals

    def write(self, asked: _Asked) -> None:
        responses = [r or Response(ended="error", error="no answer came back") for r in asked.responses]
        scores = score(asked.cell, asked.sample, responses)
        records = to_records(self._plan, asked.cell, (asked.entry, asked.sample), scores, responses)
        failed = any(record.error is not None for record in records)
        with self._signals.held():
            self._store.append(records)
            self._tally.answered += 1
            self._tally.failed += failed
            self._tally.tokens += asked.entry.tokens
        self._progress.advance(asked.entry.tokens, failed)


def _pending(group: Sequence[Cell], keys: frozenset[str]) -> list[_Asked]:
    out = []
    for cell in group:
        if not any(entry.key in keys for entry in cell.entries):
            continue
        for entry, sample in zip(cell.entries, cell.samples(), strict=True):
            if entry.key in keys:
                n = len(sample.requests)
                out.append(_Asked(cell, entry, sample, [None] * n, n))
    return out


def _answer(pending: list[_Asked], backend: Backend, writer: _Writer) -> None:
    requests: list[Request] = []
    places: list[tuple[_Asked, int]] = []
    for asked in pending:
        requests += asked.sample.requests
        places += [(asked, number) for number in range(len(asked.sample.requests))]
        if not asked.missing:
            writer.write(asked)
    if not requests:
        return
    answers = backend.answer(requests)
    try:
        for index, response in answers:
            asked, number = places[index]
            if asked.responses[number] is not None:
                raise ValueError(f"the backend answered request {index} twice")
            asked.responses[number] = response
            asked.missing -= 1
            if not asked.missing:
                writer.write(asked)
    finally:
        if isinstance(answers, Generator):
            answers.close()
    for asked in pending:
        if asked.missing:
            writer.write(asked)


def score(cell: Cell, sample: Sample, responses: Sequence[Response]) -> list[Score]:
    """The task's scores; where a request failed or a score is not a number, scores that say so instead."""
    error = next((r.error for r in responses if r.error is not None), None)
    if error is None and any(r.logprob is not None and not math.isfinite(r.logprob) for r in responses):
        error = "the model's log-probability is not a finite number"
    if error is not None:
        return _failed(cell, sample, responses, error)
    # The one boundary: a score that fails on one output must not cost the run.
    try:
        scores = list(cell.task.score(sample, responses))
    except Exception as problem:
        return _failed(cell, sample, responses, f"scoring failed: {type(problem).__name__}: {problem}")
    if not scores:
        return _failed(cell, sample, responses, "the task gave no score")
    return [_finite(s) for s in scores]


def _finite(s: Score) -> Score:
    if s.item is not None or (s.value is not None and math.isfinite(s.value) and math.isfinite(s.weight)):
        return s
    error = s.error or "the task gave neither score nor error"
    if s.value is not None:
        error = f"score is {s.value}, weight {s.weight}"
    return Score(s.metric, None, s.target, s.output, s.outcome, 1.0, error)


def _failed(cell: Cell, sample: Sample, responses: Sequence[Response], error: str) -> list[Score]:
    output = "\n".join(r.text for r in responses if r.text)
    # The task scores an empty answer and only its names are kept, so that an error counts against each of its metrics.
    empty = [Response(logprob=0.0, greedy=False) for _ in sample.requests]
    try:
        metrics = [s.metric for s in cell.task.score(sample, empty)]
    except Exception:
        metrics = []
    target = ", ".join(sample.target)
    return [Score(metric, None, target, output, "error", 1.0, error) for metric in metrics or ["error"]]


def to_records(
    plan: Plan, cell: Cell, asked: tuple[Entry, Sample], scores: Sequence[Score], responses: Sequence[Response]
) -> list[Record]:
    """One record for each score of one sample."""
    entry, sample = asked
    created = now()
    metrics = len({s.metric for s in scores})
    if metrics != len(scores):
        raise ValueError(f"task {cell.task.name} gives one metric twice: {[s.metric for s in scores]}")
    alone = responses[0] if len(responses) == 1 and scores[0].error is None else None
    info: ModelInfo = plan.info
    return [
        Record(
            schema_version=PLAIN if s.item is None else SCHEMA_VERSION,
            run_id=plan.run_id,
            key=entry.key,
            model=info.name,
            mixer=info.mixer,
            family=info.family,
            params=int(info.params),
            checkpoint=info.checkpoint,
            task=cell.task.name,
            task_version=cell.task.version,
            protocol=cell.setting.protocol,
            length=cell.setting.length,
            sample_id=entry.sample_id,
            seed=cell.setting.seed,
            metric=s.metric,
            score=None if s.value is None else float(s.value),
            prompt_tokens=max(map(_prompt_tokens, sample.requests), default=0),
            truncated_tokens=max((int(r.truncated) for r in responses), default=0),
            depth=None if sample.depth is None else float(sample.depth),
            target=s.target,
            output=s.output,
            output_tokens=sum(int(r.tokens) for r in responses),
            outcome=s.outcome,
            logprob=None if alone is None or alone.logprob is None else float(alone.logprob),
            decided_early=any(r.ended == "decided" for r in responses),
            error=s.error if s.value is None and s.item is None else None,
            latency_s=max((float(r.latency_s) for r in responses), default=0.0),
            created_at=created,
            data=cell.data,
            weight=float(s.weight),
            metric_count=metrics,
            aggregation=s.aggregation,
            item=s.item,
        )
        for s in scores
    ]


def _prompt_tokens(request: Request) -> int:
    match request:
        case Generate(prompt):
            return len(prompt.ids)
        case LogLikelihood(context):
            return len(context.ids)
        case _:
            return len(request.document.ids)
