"""Fair timings on one device: cold cache, contenders in turn, medians with spread, and the device's own ceilings."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 << 20  # several times the largest L2 cache
FLUSHES = 16  # about a millisecond of them before each call, in which the host runs ahead
BUDGET_S = 3.0  # of one contender, after which it has been seen often enough
FEWEST = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one contender: median, and the 20th and 80th percentile of its rounds."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reaches in this run: bytes read and written a second by a copy, FLOP/s of a matrix product."""

    bandwidth: float
    rate: float

    def floor_ms(self, nbytes: int, flops: int) -> float:
        """The least time these bytes and operations can take."""
        return 1e3 * max(nbytes / self.bandwidth, flops / self.rate)


class Clock:
    """Times single calls, each with a cold L2 cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 1
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, call: Call) -> float:
        """Milliseconds of one call. On a GPU the flushes also let the host run ahead, so that its time is not seen."""
        import torch

        if not self.cuda:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        for _ in range(FLUSHES):
            self._flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))


def alternate(clock: Clock, calls: Mapping[str, Call], rounds: int) -> dict[str, Timing]:
    """Time all contenders in turn, `rounds` times; a slow one drops out after its share of time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in order:
            seen = times[name]
            if len(seen) < FEWEST or sum(seen) < 1e3 * BUDGET_S:
                seen.append(clock.once(calls[name]))
    return {name: summary(seen) for name, seen in times.items()}


def summary(times: list[float]) -> Timing:
    """Median and spread of some milliseconds."""
    ranked = sorted(times)
    n = len(ranked)
    return Timing(median(ranked), ranked[int(0.2 * (n - 1))], ranked[-1 - int(0.2 * (n - 1))], n)


def ceilings(clock: Clock, rounds: int = 10) -> Ceilings:
    """Measure a large copy and a large matrix product (bf16 on a GPU) on random data."""
    import torch

    size, side = (1 << 29, 8192) if clock.cuda else (1 << 20, 256)
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    source = torch.randn(size, device=clock.device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in "ab")
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seen = alternate(clock, calls, rounds)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(1e3 * moved / seen["copy"].median, 1e3 * 2 * side**3 / seen["product"].median)


def kernel_names(call: Call, device: torch.device) -> list[str]:
    """Kernels one call launches on a GPU, in order of first launch."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        call()
        torch.cuda.synchronize(device)
    on_gpu = [e.name for e in record.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return list(dict.fromkeys(name.removeprefix("void ")[:100] for name in on_gpu))


def graphed(call: Call) -> Call:
    """`call` captured in a CUDA graph: replaying it leaves out the host's launches."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def machine(device: torch.device) -> dict[str, str]:
    """Device name, and its clocks, power and temperature now where nvidia-smi tells them."""
    import torch

    if device.type != "cuda":
        return {"name": "cpu", "threads": str(torch.get_num_threads())}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    facts = {"name": torch.cuda.get_device_name(device)}
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"],
            check=True, capture_output=True, text=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | dict(zip(fields.split(","), (x.strip() for x in out.split(",")), strict=False))
