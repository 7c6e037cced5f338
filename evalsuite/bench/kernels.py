"""`gdn2-eval bench kernels`: our kernels against fla, plain torch and the device's ceilings, in one run.

A shape whose correctness check is red has no times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from evalsuite import provenance
from evalsuite.bench import cases, layers
from evalsuite.bench.cases import DECODE_SEQUENCES, MIXERS, OPS, PEER_SHAPES, SHAPES, TINY, Job, Setup, Shape
from evalsuite.bench.timing import Ceilings, Clock, Timing, alternate, ceilings, graphed, kernel_names, machine
from evalsuite.interrupt import Interrupted
from evalsuite.store import write_file
from gdn2.errors import UserError

HEADER = ("op", "mixer", "shape", "ours ms", "spread", "torch ms", "fla ms", "x fla", "floor ms", "% of floor", "error")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. `times` is empty where `refused` says why."""

    op: str
    mixer: str
    shape: str
    error: float
    allowed: float
    floor_ms: float
    nbytes: int
    flops: int
    times: dict[str, Timing]
    kernels: dict[str, list[str]]
    failed: dict[str, str]  # contender -> why it could not run
    refused: str | None = None

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""

        def ms(name: str) -> str:
            return f"{self.times[name].median:.3f}" if name in self.times else self.failed.get(name, "-")[:24]

        ours, fla = self.times.get("ours"), self.times.get("fla")
        if ours is None:
            return [self.op, self.mixer, self.shape, self.refused or ms("ours"), *["-"] * 6, f"{self.error:.1e}"]
        return [
            self.op, self.mixer, self.shape, ms("ours"), f"{ours.low:.3f}-{ours.high:.3f}", ms("torch"), ms("fla"),
            f"{fla.median / ours.median:.2f}" if fla else "-", f"{self.floor_ms:.3f}",
            f"{100 * self.floor_ms / ours.median:.0f}", f"{self.error:.1e}",
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """Which jobs to run."""

    ops: Sequence[str] = OPS
    mixers: Sequence[str] = MIXERS
    only: str = ""  # keeps the jobs whose name contains this text, e.g. "8x4096"
    peer_shapes: bool = False  # adds the shapes of fla's own benchmark


def check(asked: Asked, device_name: str) -> None:
    """Refuse what cannot be run.

    Raises:
        UserError: an unknown operation, mixer or device, or no job left.
    """
    for given, known, what in ((asked.ops, OPS, "operation"), (asked.mixers, MIXERS, "mixer")):
        if unknown := [x for x in given if x not in known]:
            raise UserError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    setup = _setup(device_name)
    if not any(asked.only in name for name, _ in plan(setup, asked)):
        raise UserError(f"no job contains {asked.only!r}; names look like {next(plan(setup, Asked()))[0]!r}")


def _setup(device_name: str) -> Setup:
    import torch

    device = _device(device_name)
    if device.type == "cpu":
        return Setup(device, torch.float32, "torch", None)
    return Setup(device, torch.bfloat16, "triton", cases.find_peer())


def plan(setup: Setup, asked: Asked) -> Iterator[tuple[str, Callable[[], Job]]]:
    """The jobs of a run as (name, maker): inputs of one job only are alive at a time."""
    shapes = (*SHAPES, *(PEER_SHAPES if asked.peer_shapes else ())) if setup.device.type == "cuda" else TINY
    ops, mixers = asked.ops, asked.mixers
    for shape in shapes:
        for op in ops:
            part, _, back = op.partition("-")
            if part in ("convolution", "norm"):
                make = partial(layers.convolution if part == "convolution" else layers.norm, shape, setup, bool(back))
                yield f"{op} {shape.name}", make
            elif op != "decode":
                for mixer in mixers:
                    yield f"{op} {mixer} {shape.name}", _operator(op, mixer, shape, setup)
    if "decode" in ops:
        heads = shapes[0] if setup.device.type == "cpu" else Shape(1, 1)
        for n in DECODE_SEQUENCES if setup.device.type == "cuda" else (2,):
            yield f"decode {n}", lambda n=n: cases.decode(n, heads, setup)  # type: ignore[misc]


def _operator(op: str, mixer: str, shape: Shape, setup: Setup) -> Callable[[], Job]:
    if op == "layer":
        return lambda: layers.layer(mixer, shape, setup)
    if op in ("gates", "gates-backward"):
        return lambda: layers.gates(mixer, shape, setup, op != "gates")
    return lambda: cases.operator(op, mixer, shape, setup)


def measure(job: Job, clock: Clock, limits: Ceilings, rounds: int) -> Row:
    """Check one job, then time its contenders in turn."""
    error, allowed = job.check()
    floor = limits.floor_ms(job.nbytes, job.flops)
    common = (job.op, job.mixer, job.shape.name, error, allowed, floor, job.nbytes, job.flops)
    if not error <= allowed:
        return Row(*common, {}, {}, {}, f"refused: error {error:.1e} > {allowed:.1e}")
    ready: dict[str, Callable[[], object]] = {}
    names: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    for name, call in job.calls.items():
        try:
            call()
            names[name] = kernel_names(call, clock.device)
            ready[name] = graphed(call) if job.graph and name != "torch" else call
        except cases.PEER_ERRORS as problem:
            if name == "ours":
                raise
            failed[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    return Row(*common, alternate(clock, ready, rounds), names, failed)


def run(
    asked: Asked, device_name: str, rounds: int = 20, report: Callable[[Row], None] = lambda row: None
) -> dict[str, Any]:
    """Measure everything asked for and return the result as JSON-ready data; if interrupted, what there is by then.

    Args:
        device_name: "cuda", "cuda:1" or "cpu" (tiny shapes, plain torch: a dry run).
        report: called with each row as it is known.

    Raises:
        UserError: as `check`.
        Interrupted: before there was a row; after, its signal is the result's `interrupted`, else None.
    """
    import torch

    check(asked, device_name)
    setup = _setup(device_name)
    clock = Clock(setup.device)
    before = machine(setup.device)
    limits = ceilings(clock)
    rows: list[Row] = []
    interrupted = None
    try:
        for name, make in plan(setup, asked):
            if asked.only not in name:
                continue
            rows.append(measure(make(), clock, limits, rounds))
            report(rows[-1])
            if clock.cuda:
                torch.cuda.empty_cache()
    except Interrupted as problem:
        if not rows:
            raise
        interrupted = problem.number
    return {
        "kind": "bench kernels",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "provenance": provenance.collect(),
        "fla": getattr(setup.peer, "__version__", None),
        "device": {"before": before, "after": machine(setup.device)},
        "ceilings": asdict(limits) | {"after": asdict(ceilings(clock))},
        "interrupted": interrupted,
        "rows": [asdict(row) | {"error": row.error if math.isfinite(row.error) else None} for row in rows],
    }


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be cuda, cuda:<n> or cpu, got {name!r}") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device must be cuda, cuda:<n> or cpu, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible to torch; use --device cpu for a dry run")
    return device


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write the result under a name that tells kind, device and time; the file appears whole or not at all."""
    device = "-".join(result["device"]["before"]["name"].lower().split())
    stamp = result["created_at"].replace(":", "").replace("+0000", "Z")
    path = folder / f"kernels_{device}_{stamp}.json"
    content = json.dumps(result, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, content.encode())
    return path
