"""`gdn2-eval bench training`: whole training steps of presets, in tokens a second, as the paper's Figure 2 shows them.

A step is forward, backward, clipping and AdamW on random tokens, in the trainer's own precision; every shape holds its
sequences packed. Weights are random: only speed and memory are looked at.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evalsuite import provenance
from evalsuite.backends.describing import kind
from evalsuite.bench.timing import Timing, machine, summary
from evalsuite.names import quoted, suggest
from evalsuite.store import now
from gdn2.errors import UserError

if TYPE_CHECKING:
    import torch

    from gdn2.models import Decoder

MODELS = tuple(
    f"{name}-1.3b"
    for name in (
        "transformer", "mamba2-hybrid", "mamba3-siso-hybrid", "mamba3-mimo-hybrid", "gdn-hybrid", "kda-hybrid",
        "gdn2-hybrid",
    )
)  # fmt: skip
HEADER = ("model", "shape", "tokens/s", "ms a step", "spread", "peak GiB")
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure: presets, shapes as (tokens, sequences) of a step, and timed steps of each."""

    models: tuple[str, ...] = MODELS
    shapes: tuple[tuple[int, int], ...] = ()
    rounds: int = 10
    device: str = "cuda"
    kernels: str | None = None  # None chooses from the device
    recompute: bool = False  # as a training configuration's [run] has it


@dataclass(frozen=True, slots=True)
class Row:
    """One preset at one shape; the fields are those `evalsuite.reports.throughput` reads."""

    model: str
    mixer: str
    family: str
    mixers: dict[str, dict[str, Any]]
    params: int
    length: int
    batch: int
    tokens_per_s: float
    peak_bytes: int | None
    milliseconds: Timing

    def cells(self) -> list[str]:
        """As text, in the order of `HEADER`."""
        m = self.milliseconds
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f}"
        return [
            self.model, f"{self.length}x{self.batch}", f"{self.tokens_per_s:,.0f}", f"{m.median:.1f}",
            f"{m.low:.1f}-{m.high:.1f}", peak,
        ]  # fmt: skip


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Shapes LENGTHxSEQUENCES, separated by commas. Raises UserError."""
    found = []
    for part in (part.strip() for part in text.split(",")):
        said = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", part)
        length, batch = map(int, said.groups()) if said else (0, 0)
        if not (2 <= length <= 2**24 and 1 <= batch <= 2**16):
            raise UserError(f"shape {quoted(part)} is not LENGTHxSEQUENCES, such as 4096x4")
        found.append((length, batch))
    return tuple(found)


def check(asked: Asked) -> None:
    """Raise UserError for what cannot be measured."""
    import torch

    from gdn2.kernels.dispatch import choose
    from gdn2.models.presets import PRESETS

    for name in asked.models:
        if name not in PRESETS:
            raise UserError(f"preset {quoted(name)} is unknown; {suggest(name, PRESETS)}")
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {asked.device} is not here: torch sees no GPU; choose cpu")
    try:
        choose(torch.device(asked.device), asked.kernels)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--kernels: {error}") from None


def run(asked: Asked, tell: Callable[[Row], None], refuse: Callable[[str], None]) -> dict[str, Any]:
    """Measure, telling each row as it is known, and what did not fit; the result as plain JSON types."""
    import torch

    device = torch.device(asked.device)
    before = machine(device)
    rows, refused = [], []
    for name in asked.models:
        model = _model(name, device, asked.kernels)
        model.recompute = asked.recompute
        for length, batch in asked.shapes:
            try:
                rows.append(measure(name, model, (length, batch), asked.rounds, device))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                refused.append(f"{name} at {length}x{batch}: out of memory")
                refuse(refused[-1])
            else:
                tell(rows[-1])
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "kind": "training", "created_at": now(), "asked": asdict(asked), "provenance": provenance.collect(),
        "device": {"before": before, "after": machine(device)}, "refused": refused,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def _model(name: str, device: torch.device, kernels: str | None) -> Decoder:
    from gdn2.models import Decoder
    from gdn2.models.presets import preset

    with device:
        model = Decoder(preset(name))
    model.reset_parameters(0)  # on the device too: a CPU would draw a billion numbers for half a minute
    return model.use(kernels)  # type: ignore[arg-type]


def measure(name: str, model: Decoder, shape: tuple[int, int], rounds: int, device: torch.device) -> Row:
    """Time `rounds` steps of `model` at one shape, after some to warm up."""
    import torch

    from gdn2.ragged import Ragged
    from gdn2.train.config import Optimizer
    from gdn2.train.loss import Placed, weighted_loss
    from gdn2.train.optimizer import make_optimizer

    length, batch = shape
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (length * batch,), generator=draw)
    predicted = torch.arange(length * batch).view(batch, length)[:, 1:].reshape(-1)
    weights = torch.ones(len(predicted))
    ids, targets, rows, weights = (t.to(device) for t in (ids, ids[predicted], predicted - 1, weights))
    placed = Placed(ids, targets, rows, weights, Ragged([length] * batch, device))
    settings = Optimizer(lr=1e-4)
    optimizer = make_optimizer(model, settings)

    def step() -> None:
        loss, _ = weighted_loss(model, placed)
        (loss / len(predicted)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for turn in range(WARM_UP + rounds):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        if turn >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - begin))
    timing = summary(times)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    mixer, family = kind(model)
    mixers = {layer: dict(options) for layer, options in model.config.to_dict()["mixers"].items()}
    rate = 1e3 * length * batch / timing.median
    return Row(name, mixer, family, mixers, model.n_params(), length, batch, rate, peak, timing)
