"""The training loop: a curriculum of stages, a log, held-out scores, saves to go on from.

On a CPU a run that is killed and started again ends with the same bits as one that was not, provided the number of
threads stays the same and `max_seconds` is unset: with it, learning rate and length follow the clock.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gdn2.checkpoints import native
from gdn2.errors import StorageError, UserError
from gdn2.kernels.dispatch import choose
from gdn2.models import Decoder
from gdn2.tokenizer import load_tokenizer
from gdn2.train import saves
from gdn2.train.config import Documents, Evaluation, TrainConfig
from gdn2.train.data import Batch, Batches, Opening, SourceFactory, Split, make_batch
from gdn2.train.loss import evaluate
from gdn2.train.optimizer import learning_rate, make_optimizer, set_rate
from gdn2.train.step import Step, Stepper

LOG, SAVES, MODEL = "log.jsonl", "saves", "model"
EVALUATION_TOKENS = 32768  # of one held-out batch
Say = Callable[[str], None]


@dataclass
class Position:
    """Where a run stands: what a save keeps beside the tensors."""

    step: int = 0
    stage: int = 0
    batch: int = 0  # of the stage, the next one
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `signal` is the number of the signal that stopped it, or None where it is done."""

    position: Position
    model: Path | None
    signal: int | None


def train(
    config: TrainConfig,
    out: Path,
    sources: Mapping[str, SourceFactory],
    device: str = "cpu",
    say: Say = lambda line: None,
) -> Outcome:
    """Train, or go on with, the run of directory `out`, and write the model to `out/model`.

    Args:
        config: the run.
        out: gets `log.jsonl`, `saves/` and, at the end, `model/` (a native checkpoint).
        sources: episode factories by the name stages use; "text" is built in.
        device: cpu, cuda, cuda:N.
        say: is told each line of progress.

    Raises:
        UserError: `out` holds another run, a source is unknown, or its options are refused; tokenizer, vocabulary and
            kernels do not go together with the device and each other.
    """
    run = _Run(config, out, sources, torch.device(device), say)
    try:
        return run.go()
    finally:
        run.close()


class _Run:
    def __init__(
        self, config: TrainConfig, out: Path, sources: Mapping[str, SourceFactory], device: torch.device, say: Say
    ) -> None:
        self.config, self.out, self.sources, self.device, self.say = config, out, sources, device, say
        self.at = Position()
        self.stopped: int | None = None
        self.ahead: dict[int, Batches] = {}
        self.stepper: tuple[int, Stepper] | None = None
        _check(config, device)
        self.held_out = [(entry, self._held_out(entry)) for entry in config.evaluate]
        self.model = Decoder(config.model)
        self.model.reset_parameters(config.run.seed, config.run.mixer_gain)
        self.model.to(device).use(config.run.kernels)  # type: ignore[arg-type]
        self.model.recompute = config.run.recompute
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self._resume()
        self.started = time.monotonic() - self.at.seconds
        self.logged = (self.at.seconds, self.at.tokens)

    def go(self) -> Outcome:
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.stopped is None and self.progress() < 1:
                self._step()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._save()
        if self.stopped is not None:
            return Outcome(self.at, None, self.stopped)
        self._evaluate()
        seed, stored = self.config.run.seed, self.config.run.stored
        facts = {**asdict(self.at), "seed": seed, "digest": self.config.digest, "device": self._hardware()}
        model = copy.deepcopy(self.model).cast(getattr(torch, stored)) if stored else self.model
        native.save(self.out / MODEL, model, self.config.tokenizer, {"training": facts})
        return Outcome(self.at, self.out / MODEL, None)

    def progress(self) -> float:
        """The share of the run that is done, by steps or by time, whichever is more."""
        run = self.config.run
        return max(self.at.step / run.steps, self.at.seconds / run.max_seconds if run.max_seconds else 0.0)

    def _step(self) -> None:
        config, at = self.config, self.at
        rate = learning_rate(config.optimizer, at.step, self.progress())
        set_rate(self.optimizer, rate)
        batches = [self._take() for _ in range(config.optimizer.accumulate)]
        seen = self._stepper()(batches)
        at.tokens += sum(len(batch.ids) for batch in batches)
        at.step += 1
        at.stage_step += 1
        at.batch += len(batches)
        at.seconds = time.monotonic() - self.started
        accuracy = self._log(seen, rate) if at.step % config.run.log_every == 0 else None
        self._next_stage(accuracy)
        if at.step % config.run.evaluate_every == 0:
            self._evaluate()
        if at.step % config.run.checkpoint_every == 0:
            self._save()

    def _stepper(self) -> Stepper:
        """What takes the steps of the present stage: its batches may have one shape."""
        if self.stepper is None or self.stepper[0] != self.at.stage:
            fixed = self.config.stages[self.at.stage].fixed
            self.stepper = None  # a captured step lets go of its memory before the next one takes some
            made = Stepper(self.model, self.optimizer, self.config.optimizer.clip, fixed)
            self.stepper = (self.at.stage, made)
        return self.stepper[1]

    def _next_stage(self, accuracy: float | None) -> None:
        at, stage = self.at, self.config.stages[self.at.stage]
        if at.stage + 1 == len(self.config.stages):
            return
        learnt = stage.until is not None and accuracy is not None and accuracy >= stage.until
        if learnt or (stage.steps is not None and at.stage_step >= stage.steps):
            self.say(f"stage {at.stage + 1} ends at step {at.step}")
            self.ahead.pop(at.stage).close()
            at.stage, at.stage_step, at.batch = at.stage + 1, 0, 0

    def _take(self) -> Batch:
        """The next batch; the processes of the next stage are started with those of this one."""
        workers, here = self.config.run.workers, self.at.stage
        if here not in self.ahead:
            self.ahead[here] = self._batches(here, self.at.batch)
        if workers and here + 1 < len(self.config.stages) and here + 1 not in self.ahead:
            self.ahead[here + 1] = self._batches(here + 1, 0)
        return self.ahead[here].take()

    def _batches(self, stage: int, first: int) -> Batches:
        entry = self.config.stages[stage]
        opening = self._opening(entry, self.config.run.seed * 1000 + stage, "train")
        fill = _longest(entry) if entry.fixed else 0
        return Batches(opening, entry.batch_tokens, first, self.config.run.workers, fill)

    def _opening(self, entry: Documents, seed: int, split: Split) -> Opening:
        if entry.source != "text" and entry.source not in self.sources:
            raise UserError(f"source {entry.source!r} is not one of {', '.join(('text', *self.sources))}")
        files = tuple(self.config.directory / file for file in entry.files)
        return Opening(self.sources.get(entry.source), self.config.tokenizer, files, entry.mixture(), seed, split)

    def _held_out(self, entry: Evaluation) -> list[Batch]:
        source = self._opening(entry, self.config.run.seed, "eval").open()
        documents = [make_batch(source, number, 1) for number in range(entry.documents)]
        size = max(1, EVALUATION_TOKENS // max(len(one.ids) for one in documents))
        groups = [documents[i : i + size] for i in range(0, len(documents), size)]
        return [_joined(group) for group in groups]

    def _evaluate(self) -> None:
        for entry, batches in self.held_out:
            result = evaluate(self.model, batches, self.device)
            self._write({"kind": "held-out", "name": entry.name, **self._where(), **asdict(result)})
            exact = "" if result.exact is None else f", exact {result.exact:.3f}"
            self.say(f"step {self.at.step} {entry.name}: loss {result.loss:.4f}{exact}")

    def _log(self, seen: Step, rate: float) -> float | None:
        accuracy = float(seen.right.float().mean()) if len(seen.right) else None
        if not math.isfinite(loss := seen.loss.item()):
            raise UserError(
                f"the loss is {loss} at step {self.at.step}: lower optimizer.lr ({self.config.optimizer.lr})"
            )
        seconds, tokens = self.at.seconds - self.logged[0], self.at.tokens - self.logged[1]
        self.logged = (self.at.seconds, self.at.tokens)
        speed = tokens / max(seconds, 1e-9)
        measured = {"loss": loss, "answer_tokens": accuracy, "grad_norm": seen.norm.item(), "lr": rate}
        self._write({"kind": "train", **self._where(), **measured, "tokens_per_s": round(speed)})
        right = "" if accuracy is None else f" answers {accuracy:.3f}"
        self.say(f"step {self.at.step} stage {self.at.stage + 1} loss {loss:.4f}{right} {speed:,.0f} tokens/s")
        return accuracy

    def _where(self) -> dict[str, Any]:
        at = self.at
        return {"step": at.step, "stage": at.stage, "tokens": at.tokens, "seconds": round(at.seconds, 3)}

    def _write(self, record: dict[str, Any]) -> None:
        try:
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.out / LOG}: {error.strerror}") from error

    def _save(self) -> None:
        state = {"digest": self.config.digest, "position": asdict(self.at)}
        saves.save(self.out / SAVES, self.at.step, self.model, self.optimizer, state)

    def _resume(self) -> None:
        """Go on from the newest save of the same run, dropping what the log says of later steps."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {self.out}: {error.strerror}") from error
        found = saves.found(self.out / SAVES)
        if found:
            state = saves.load_state(found[-1])
            if state["digest"] != self.config.digest:
                raise UserError(f"{self.out} holds a run of another configuration: choose another directory")
            saves.restore(found[-1], self.model, self.optimizer)
            self.at = replace(self.at, **state["position"])
            self.say(f"going on from step {self.at.step}")
        _truncate(self.out / LOG, self.at.step)

    def _hardware(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{os.cpu_count()} CPU cores"

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number

    def close(self) -> None:
        for batches in self.ahead.values():
            batches.close()


def _check(config: TrainConfig, device: torch.device) -> None:
    """Refuse what only the tokenizer's file and the device can tell."""
    size = load_tokenizer(config.tokenizer, "no").vocab_size
    if size > config.model.vocab_size:
        raise UserError(f"vocab_size {config.model.vocab_size} is less than the {size} of {config.tokenizer}")
    try:
        choose(device, config.run.kernels)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"kernels of [run]: {error}") from error


def _longest(entry: Documents) -> int:
    return entry.length if isinstance(entry.length, int) else entry.length[1]


def _joined(batches: list[Batch]) -> Batch:
    import numpy as np

    ids, weights = (np.concatenate([getattr(b, name) for b in batches]) for name in ("ids", "weights"))
    return Batch(ids, weights, tuple(n for b in batches for n in b.lengths))


def _truncate(log: Path, step: int) -> None:
    """Keep the records up to `step`; a torn last line goes too."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    temporary = log.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(log)
