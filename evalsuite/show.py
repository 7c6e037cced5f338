"""Reading runs back: which there are, what one holds, and what was asked and answered in one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evalsuite import groups, runfile
from evalsuite.names import quoted, suggest
from evalsuite.plan import Ask, CellSummary, Plan, make_plan
from evalsuite.progress import duration
from evalsuite.reports.measured import corpus, in_order
from evalsuite.runner import Outcome
from evalsuite.schema import Record
from evalsuite.scorers import nats, overall
from evalsuite.store import Warn, in_use, read_records
from evalsuite.types import Adjustable, Backend, Generate, LogLikelihood, Request, Sample, Task
from gdn2.errors import DataError, UserError


class Run(NamedTuple):
    """One line of the list of runs."""

    id: str
    model: str
    status: str
    samples: int
    started: str


class CellScore(NamedTuple):
    """One metric of one cell of a run."""

    task: str
    protocol: str
    length: int | None
    metric: str
    n: int
    failed: int
    mean: float | None  # of the weighted scores, in their own unit, or what is made of all; None without any
    problem: str = ""  # why nothing can be made of all here


def runs(out: Path) -> list[Run]:
    """The runs below `out`, by id; one that cannot be read is listed as such."""
    folder = out / "runs"
    try:
        folder.stat()  # globbing hides, from Python 3.13 on, that a path cannot exist
    except FileNotFoundError:
        return []
    return [_run(path.parent) for path in sorted(folder.glob(f"*/{runfile.NAME}"))]


def find(out: Path, name: str) -> Path:
    """Directory of the run called `name`, or of the only one whose id begins so."""
    known = {run.id: out / "runs" / run.id for run in runs(out)}
    if name in known:
        return known[name]
    found = [run_id for run_id in known if name and run_id.startswith(name)]
    if len(found) > 1:
        raise UserError(f"run {quoted(name)} may be any of {', '.join(found[:5])}: give more of its id")
    if not found:
        raise UserError(f"run {quoted(name)} is not in {out / 'runs'}; {suggest(name, known)}")
    return known[found[0]]


def locate(out: Path, name: str) -> Path:
    """The run `name`: a directory, or an id below `out` as `find` takes it."""
    return Path(name) if (Path(name) / runfile.NAME).is_file() else find(out, name)


def status(directory: Path, content: dict[str, Any]) -> str:
    """The status in `run.json`, told from that of a process which died without a word."""
    said = str(content.get("status", "unknown"))
    return "killed" if said == "running" and not in_use(directory) else said


def settings(directory: Path) -> list[tuple[str, str]]:
    """Name and value of what a run is and of its last invocation."""
    content = runfile.read(directory)
    rows = [("run", content["id"]), ("status", status(directory, content))]
    rows += [(name, str(value)) for name, value in content["identity"].items()]
    model = content["model"]
    rows += [(f"model.{name}", str(model.get(name))) for name in ("mixer", "family", "params", "window")]
    rows += [(f"totals.{name}", str(value)) for name, value in content["totals"].items()]
    rows.append(("invocations", str(len(content["invocations"]))))
    if content["invocations"]:
        last = content["invocations"][-1]
        rows.append(("last.started_at", str(last.get("started_at"))))
        for part in ("passed", "provenance"):
            rows += [(f"last.{part}.{name}", str(value)) for name, value in dict(last.get(part, {})).items()]
    return rows


def cells(records: Iterable[Record]) -> list[CellScore]:
    """Mean and counts of every metric, by task, protocol, length and data, in that order."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        key = (record.task, record.protocol, record.length, record.metric, record.data)
        groups.setdefault(key, []).append(record)
    order = sorted(groups, key=lambda key: tuple(str(part) if i != 2 else part or 0 for i, part in enumerate(key)))
    return [_cell(groups[key]) for key in order]


def averaged(run: Mapping[str, Any], scores: Sequence[CellScore]) -> list[CellScore]:
    """The numbers of the groups of a run.json, from those of its cells."""
    tasks: dict[str, dict[str, list[CellScore]]] = {}
    for score in scores:
        tasks.setdefault(score.task, {}).setdefault(score.metric, []).append(score)
    found = []
    for group in groups.read(run).values():
        if not all(task in tasks for task in group.tasks):
            continue
        for average, metric in group.numbers(tasks):
            several = [tasks[task][metric] for task in group.tasks if metric in tasks[task]]
            parts = [cells[0] for cells in several]
            if any(len(cells) > 1 for cells in several) or any(part.mean is None for part in parts):
                continue
            sizes = [max(cell.n for cells in tasks[part.task].values() for cell in cells) for part in parts]
            values = [overall(metric, part.mean) for part in parts if part.mean is not None]
            value = groups.average(values, sizes if average.by_size else [1] * len(sizes))
            protocols = {part.protocol for part in parts}
            counts = (sum(part.n for part in parts), sum(part.failed for part in parts))
            protocol = protocols.pop() if len(protocols) == 1 else "several"
            found.append(CellScore(group.name, protocol, None, metric, *counts, nats(metric, value)))
    return found


def sample(directory: Path, sample_id: str, warn: Warn) -> list[Record]:
    """Records of one sample, over all tasks and lengths of a run."""
    records = read_records(directory, warn)
    found = [record for record in records if record.sample_id == sample_id]
    if not found:
        known = dict.fromkeys(record.sample_id for record in records)
        raise UserError(f"sample {quoted(sample_id)} is not in {directory.name}; {suggest(sample_id, known)}")
    return found


def passed(directory: Path) -> dict[str, Any]:
    """The user's settings of the last invocation. Raises DataError where there are none."""
    invocations = runfile.read(directory)["invocations"]
    found = invocations[-1].get("passed", {}) if invocations else {}
    if not all(isinstance(found.get(name), str) for name in ("model", "device")):
        raise DataError(f"cannot read {directory / runfile.NAME}: it holds no settings")
    return dict(found)


Table = tuple[Sequence[str], list[tuple[object, ...]]]


def complete(directory: Path) -> dict[str, int]:
    """Samples of the complete set of each task of a run that has one, by task."""
    cells = (cell for started in runfile.read(directory)["invocations"] for cell in started.get("resolved", ()))
    return {str(cell["task"]): int(cell["complete"]) for cell in cells if cell.get("complete")}


def score_table(scores: Sequence[CellScore], sizes: Mapping[str, int] | None = None) -> Table:
    """Header and rows of a run's scores; `sizes` is what `complete` gives."""
    header = ("task", "profile", "length", "metric", "n", "failed", "mean")
    sizes = sizes or {}
    return header, [
        (
            c.task, c.protocol, c.length or "-", c.metric, f"{c.n} of {sizes[c.task]}" if c.task in sizes else c.n,
            c.failed, "-" if c.mean is None else f"{overall(c.metric, c.mean):.4f}",
        )
        for c in scores
    ]  # fmt: skip


def field_table(tasks: Sequence[Task]) -> Table:
    """Header and rows of the fields that the tasks' protocols have."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for task in tasks:
        if isinstance(task, Adjustable):
            for name, one in task.fields.items():
                found.setdefault((name, one.default, one.meaning), []).append(task.name)
    return ("field", "default", "what it takes", "tasks"), [(*key, ", ".join(names)) for key, names in found.items()]


def plan_table(rows: Sequence[CellSummary]) -> Table:
    """Header and rows of what a run would ask."""
    header = ("task", "profile", "length", "samples", "done", "requests", "tokens")
    return header, [(r.task, r.protocol, r.length or "-", r.samples, r.done, r.requests, f"{r.tokens:,}") for r in rows]


def estimate(rows: Sequence[CellSummary], rate: float | None) -> str:
    """What a run would cost, in one line; `rate` in tokens a second, where one was measured."""
    tokens = sum(row.tokens for row in rows)
    time = f"about {duration(tokens / rate)} at {rate:,.0f} tokens/s" if rate else "unknown until the first answers"
    return f"{sum(row.requests for row in rows)} requests, {tokens:,} tokens to read; time: {time}"


def too_long(plan: Plan) -> str:
    """A warning where a length is beyond the model's window, else nothing."""
    window = plan.info.window
    longest = max((cell.setting.length or 0 for cell in plan.cells), default=0)
    if window is None or longest <= window:
        return ""
    return f"length {longest} is beyond the {window} tokens that {plan.info.name} can see: longer prompts are cut"


def outcome_line(outcome: Outcome) -> str:
    """What an invocation did, and what to do about what it could not, in one line."""
    text = f"{outcome.answered} samples answered in {duration(outcome.seconds)}, {outcome.before} were there before"
    if outcome.failed:
        text += f"; {outcome.failed} failed: the results are partial, the same command asks them again"
    if outcome.signal is not None:
        left = outcome.planned - outcome.before - outcome.answered
        text += f"; interrupted with {left} to go: the same command goes on"
    if outcome.lost:
        gone = ", ".join(map(str, outcome.lost))
        text += f"; processes {gone} were lost: what they answered is kept, the same command asks the rest"
    if asked := outcome.report.get("tokens_asked"):
        read, shared = outcome.report["tokens_read"], outcome.report["tokens_shared"]
        text += f"; {asked:,} prompt tokens asked, {read:,} read, {shared:,} shared"
    if events := outcome.report.get("events"):
        text += f"; memory was exhausted {len(events)} times"  # type: ignore[arg-type]
    return text


def abridged(text: str, limit: int = 2000) -> str:
    """`text`, without its middle where it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[...]\n{text[-limit // 2 :]}"


def prompts(
    record: Record, backend: Backend, resolve: Callable[[str], Sequence[Task]], options: dict[str, str]
) -> list[str] | None:
    """The prompts of a record's sample, made again; None where the same sample cannot be made any more."""
    ask = Ask((record.length,) if record.length else (), None, record.protocol, record.seed, options)
    for count in (_least(record), None):
        plan = make_plan(backend, resolve(record.task), Ask(ask.lengths, count, ask.profile, ask.seed, options))
        for key, made in _samples(plan):
            if key == record.key:
                return [prompt_text(request) for request in made.requests]
    return None


def _least(record: Record) -> int:
    """Samples to make so that a numbered one is among them."""
    numbered = record.sample_id.isascii() and record.sample_id.isdigit() and len(record.sample_id) < 10
    return int(record.sample_id) + 1 if numbered else 1


def _samples(plan: Plan) -> Iterator[tuple[str, Sample]]:
    for cell in plan.cells:
        for entry, made in zip(cell.entries, cell.samples(), strict=True):
            yield entry.key, made


def prompt_text(request: Request) -> str:
    """What a model reads for `request`, as text."""
    match request:
        case Generate(prompt):
            return prompt.text
        case LogLikelihood(context, continuation):
            return f"{context.text} | {continuation.text}"
        case _:
            return request.document.text


def _run(directory: Path) -> Run:
    try:
        content = runfile.read(directory)
    except DataError:
        return Run(directory.name, "?", "unreadable", 0, "")
    invocations = content["invocations"]
    started = str(invocations[-1].get("started_at", ""))[:19] if invocations else ""
    model = str(content["identity"].get("model", "?"))
    return Run(directory.name, model, status(directory, content), int(content["totals"].get("samples", 0)), started)


def _cell(group: list[Record]) -> CellScore:
    first, problem = group[0], ""
    scored = [(record.score, record.weight) for record in group if record.score is not None]
    kept = [record for record in group if record.item is not None]
    weight = sum(w for _, w in scored)
    mean = sum(score * w for score, w in scored) / weight if weight else None
    if kept:
        try:
            mean = corpus(str(kept[0].aggregation), in_order(kept)).mean
        except DataError as error:
            problem = str(error)
    n = len(scored) + len(kept)
    return CellScore(first.task, first.protocol, first.length, first.metric, n, len(group) - n, mean, problem)
