"""`gdn2-eval bench engine`: whole requests through our engine, transformers and lm-eval, on the same weights.

Four kinds of work: `choices` (four endings of one context), `prefill` (one token scored behind a long context),
`generate`, and `needles` (generation from one haystack with a needle at as many depths as there are prompts, so that
beginnings are shared as in RULER). Contenders take turns in one process; the first turn warms up and is compared, the
others are timed. One whose memory is exhausted leaves that work, and the result says so.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evalsuite import provenance
from evalsuite.bench import peers
from evalsuite.bench.peers import Answer, Contender
from evalsuite.bench.timing import Timing, machine, summary
from evalsuite.store import now, write_file
from evalsuite.types import Generate, LogLikelihood, Prompt, Request
from gdn2.errors import UserError

if TYPE_CHECKING:
    import torch

    from evalsuite.backends.native import NativeBackend

AGAINST = ("fast", "hf", "lm-eval")
HEADER = ("work", "contender", "batch", "seconds", "spread", "samples/s", "tokens/s", "peak MiB", "x ours", "agree")
NEEDLE = 20  # tokens
CONTEXT, ENDING, ENDINGS = 80, 25, 4  # tokens of a HellaSwag question, of its endings, and their number
QUESTIONS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure.

    Args:
        model: checkpoint directory that both sides open; random:KIND-SIZE such as random:mamba2-tiny, a model of
            transformers at the sizes of our preset; or fla:PRESET, which fla opens.
        prompts: of each length.
        new_tokens: of each generation.
        batches: of the contenders; the first is their default.
        only: texts of which the name of a work must contain one; none leaves out nothing.
    """

    model: str
    lengths: tuple[int, ...]
    against: tuple[str, ...]
    prompts: int = 4
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """Requests of one kind; `tokens` is all that the model must take in or put out when nothing is shared."""

    name: str
    requests: tuple[Request, ...]
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one work. `difference` is the largest of two log-probabilities."""

    work: str
    contender: str
    batch: int
    samples_per_s: float
    tokens_per_s: float
    peak_bytes: int | None
    slower_than_ours: float
    agreement: float
    difference: float
    milliseconds: Timing

    def cells(self) -> list[str]:
        """As text, in the order of `HEADER`."""
        spread = f"{self.milliseconds.low / 1e3:.3f}-{self.milliseconds.high / 1e3:.3f}"
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.0f}"
        return [
            self.work, self.contender, str(self.batch or "own"), f"{self.milliseconds.median / 1e3:.3f}", spread,
            f"{self.samples_per_s:.2f}", f"{self.tokens_per_s:,.0f}", peak, f"{self.slower_than_ours:.2f}",
            f"{self.agreement:.3f}",
        ]  # fmt: skip


def check(asked: Asked) -> None:
    """Raise UserError for what cannot be measured."""
    import torch

    if unknown := [name for name in asked.against if name not in AGAINST]:
        raise UserError(f"contender {unknown[0]!r} is unknown; choose from {', '.join(AGAINST)}")
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {asked.device} is not here: torch sees no GPU; choose cpu")
    if not asked.model.startswith(("random:", "fla:")) and not Path(asked.model).is_dir():
        raise UserError(
            f"model {asked.model!r} is neither a directory nor random:gdn-SIZE, random:mamba2-SIZE or fla:PRESET"
        )


def run(asked: Asked, tell: Callable[[Row], None]) -> dict[str, Any]:
    """Measure, telling each row as it is known; the result as plain JSON types."""
    import torch

    device = torch.device(asked.device)
    before = machine(device)
    with tempfile.TemporaryDirectory() as folder:
        path = _checkpoint(asked, Path(folder))
        backend = _open_ours(path, asked)
        contenders = [peers.ours(backend)]
        if "fast" in asked.against:
            contenders.append(peers.ours(backend, fast=True))
        contenders += _peers(path, asked)
        rows: list[Row] = []
        exhausted: list[str] = []
        for work in works(asked, backend.model.config.vocab_size):
            if asked.only and not any(text in work.name for text in asked.only):
                continue
            for row in measure(work, contenders, asked.rounds, device, exhausted.append):
                rows.append(row)
                tell(row)
    rates = {f"{a.contender} {a.batch}": _steps(rows, a, asked) for a in rows if a.work.startswith("generate")}
    return {
        "kind": "engine", "created_at": now(), "asked": asdict(asked), "provenance": provenance.collect(),
        "device": {"before": before, "after": machine(device)}, "decode_steps_per_s": rates,
        "out_of_memory": exhausted, "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write the result under a name that tells kind, device and time."""
    device = "-".join(result["device"]["before"]["name"].lower().split())
    stamp = result["created_at"].replace(":", "").replace("+0000", "Z")
    path = folder / f"{result['kind']}_{device}_{stamp}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return path


def works(asked: Asked, vocab_size: int, seed: int = 0) -> Iterator[Work]:
    """The same requests for everybody: random ids, so no text is favoured."""
    rng = random.Random(seed)

    def prompt(n: int) -> Prompt:
        ids = [rng.randrange(1, vocab_size) for _ in range(n)]
        return Prompt(np.array(ids, np.int32), " ".join(map(str, ids)))

    contexts = [prompt(CONTEXT) for _ in range(QUESTIONS)]
    endings = tuple(LogLikelihood(c, prompt(ENDING)) for c in contexts for _ in range(ENDINGS))
    yield Work("choices", endings, QUESTIONS, len(endings) * (CONTEXT + ENDING))
    for length in asked.lengths:
        prompts = [prompt(length) for _ in range(asked.prompts)]
        scored = tuple(LogLikelihood(p, prompt(1)) for p in prompts)
        yield Work(f"prefill {length}", scored, len(prompts), len(prompts) * length)
        generated = tuple(Generate(p, asked.new_tokens) for p in prompts)
        yield Work(f"generate {length}", generated, len(prompts), len(prompts) * (length + asked.new_tokens))
        hay, end = prompt(length - 2 * NEEDLE).ids, prompt(NEEDLE).ids
        needles = []
        for i in range(asked.prompts):
            at = len(hay) * (i + 1) // (asked.prompts + 1)
            ids = np.concatenate([hay[:at], prompt(NEEDLE).ids, hay[at:], end])
            needles.append(Generate(Prompt(ids, " ".join(map(str, ids.tolist()))), asked.new_tokens))
        yield Work(f"needles {length}", tuple(needles), len(needles), len(needles) * (length + asked.new_tokens))


def measure(
    work: Work, contenders: Sequence[Contender], rounds: int, device: torch.device,
    exhausted: Callable[[str], None] = lambda text: None,
) -> list[Row]:  # fmt: skip
    """Let the contenders answer in turn, once to compare and `rounds` times to be timed. The first one is ours."""
    import torch

    first = {}
    for contender in contenders:
        try:
            first[contender] = _watched(contender, work, device)
        except torch.OutOfMemoryError:
            exhausted(f"{work.name}: {contender.name} {contender.batch}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    contenders = list(first)
    times: dict[Contender, list[float]] = {c: [] for c in contenders}
    for turn in range(rounds):
        for contender in contenders if turn % 2 == 0 else contenders[::-1]:
            times[contender].append(_timed(contender, work, device))
    reference, rows = contenders[0], []
    for contender in contenders:
        answers, peak = first[contender]
        timing = summary(times[contender])
        seconds = timing.median / 1e3
        agreement, difference = compare(first[reference][0], answers)
        rows.append(
            Row(
                work.name,
                contender.name,
                contender.batch,
                work.samples / seconds,
                work.tokens / seconds,
                peak,
                timing.median / summary(times[reference]).median,
                agreement,
                difference,
                timing,
            )  # fmt: skip
        )
    return rows


def compare(expected: Sequence[Answer], found: Sequence[Answer]) -> tuple[float, float]:
    """Share of generated tokens before the first difference (of likelihoods, share whose greediness is the same), and
    the largest difference of two log-probabilities."""
    shares = []
    for a, b in zip(expected, found, strict=True):
        if a.ids or b.ids:
            pairs = list(zip(a.ids, b.ids, strict=False))
            same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
            shares.append(same / max(len(a.ids), len(b.ids)))
        else:
            shares.append(float(a.greedy == b.greedy))
    difference = max(abs(a.logprob - b.logprob) for a, b in zip(expected, found, strict=True))
    return sum(shares) / len(shares), difference


def _watched(contender: Contender, work: Work, device: torch.device) -> tuple[list[Answer], int | None]:
    """The answers, and the most memory a GPU held meanwhile."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    answers = contender.answer(work.requests)
    return answers, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _timed(contender: Contender, work: Work, device: torch.device) -> float:
    """Milliseconds from requests to answers."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    contender.answer(work.requests)
    return 1e3 * (time.perf_counter() - begin)


def _checkpoint(asked: Asked, folder: Path) -> Path:
    before, colon, name = asked.model.partition(":")
    if not colon or before not in ("random", "fla"):
        return Path(asked.model)
    from gdn2.models import PRESETS

    if name not in PRESETS:
        raise UserError(f"model {asked.model!r} is not {before}: and a preset such as mamba2-tiny")
    if before == "fla":
        return peers.write_fla(name, folder / "model", asked.device, asked.dtype)
    kind, _, size = name.partition("-")
    return peers.write_random(kind, size, folder / "model")


def _open_ours(path: Path, asked: Asked) -> NativeBackend:
    import torch

    from evalsuite.backends.native import BATCH_TOKENS, NativeBackend, describe
    from gdn2.checkpoints import open_model

    loaded = open_model(str(path), device=torch.device(asked.device), dtype=getattr(torch, asked.dtype))
    tokenizer = peers.Numbers(loaded.model.config.vocab_size)
    info = describe(loaded.model, loaded.name, loaded.digest, tokenizer)
    return NativeBackend(loaded.model, tokenizer, info, BATCH_TOKENS[torch.device(asked.device).type])


def _peers(path: Path, asked: Asked) -> list[Contender]:
    if not {"hf", "lm-eval"} & set(asked.against):
        return []
    model = peers.open_peer(path, asked.device, asked.dtype)
    window = max([*asked.lengths, CONTEXT + ENDING]) + asked.new_tokens
    out = []
    for batch in asked.batches:
        if "hf" in asked.against:
            out.append(peers.transformers_alone(model, batch))
        if "lm-eval" in asked.against:
            out.append(peers.lm_eval_hflm(model, batch, window))
    return out


def _steps(rows: Sequence[Row], generated: Row, asked: Asked) -> dict[str, float]:
    """Decode steps a second by length: what generating took beyond reading the same prompts."""
    out = {}
    for row in rows:
        if row.work.startswith("generate") and (row.contender, row.batch) == (generated.contender, generated.batch):
            length = row.work.split()[1]
            read = [
                r.milliseconds.median for r in rows
                if r.work == f"prefill {length}" and (r.contender, r.batch) == (row.contender, row.batch)
            ]  # fmt: skip
            took = (row.milliseconds.median - sum(read)) / 1e3
            steps = (asked.new_tokens - 1) * -(-asked.prompts // (row.batch or asked.prompts))
            if read and took > 0:
                out[length] = round(steps / took, 2)
    return out
