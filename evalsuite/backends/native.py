"""Our own models behind the three verbs.

Rows are packed, never padded. A prompt is read in pieces cut at multiples of the chunk length from its own first token,
and matrix products run in blocks of fixed size, so an answer is the same, bit for bit, alone or in any batch.

Axes: N sequences, T tokens of all sequences together, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from evalsuite.types import Generate, LogLikelihood, ModelInfo, Request, Response, Rolling, Tokenizer
from gdn2 import zoo
from gdn2.checkpoints import native
from gdn2.errors import CheckpointError, UserError
from gdn2.kernels import choose
from gdn2.models import Decoder, State
from gdn2.ragged import Ragged
from gdn2.tokenizer import load_tokenizer

Item = TypeVar("Item")

CHUNK = 64  # tokens; prompts are cut only at multiples of it, where the numbers are those of one pass


@dataclass
class _Live:
    """One generation under way."""

    index: int
    request: Generate
    started: float
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Scored:
    """One sequence of a likelihood request: the logits after `ids[first:]` are scored against `targets`."""

    index: int
    ids: list[int]
    targets: list[int]


class NativeBackend:
    """Answers requests with a `Decoder`.

    Args:
        model: weights on their device, gradients off.
        tokenizer: the model's.
        info: what records say about the model.
        batch_tokens: prompt tokens read at once; bounds memory, never changes an answer.
        slots: sequences decoded together; never changes an answer.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, info: ModelInfo, batch_tokens: int = 8192, slots: int = 64
    ) -> None:
        self.model, self.tokenizer, self.info = model, tokenizer, info
        self.batch_tokens = max(batch_tokens - batch_tokens % CHUNK, CHUNK)
        self.slots = slots
        self.device = model.embed.weight.device

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Answer all requests; see `evalsuite.types.Backend`."""
        scored: list[_Scored] = []
        generate: list[tuple[int, Generate]] = []
        for index, request in enumerate(requests):
            match request:
                case Generate():
                    generate.append((index, request))
                case LogLikelihood():
                    context, rest = request.context.ids.tolist(), request.continuation.ids.tolist()
                    scored.append(_Scored(index, (context + rest)[:-1], rest))
                case Rolling():
                    scored += [_Scored(index, ids, targets) for ids, targets in self._windows(request)]
        with torch.inference_mode():
            yield from self._likelihoods(scored)
            yield from self._generations(generate)

    # Likelihoods -----------------------------------------------------------------------------------------------------

    def _windows(self, request: Rolling) -> Iterator[tuple[list[int], list[int]]]:
        """Disjoint windows of a document, each scored after one token of context; the last one sees a full window."""
        ids = request.document.ids.tolist()
        stream = [self._prefix(), *ids]
        size = request.window or len(ids)
        for begin in range(0, len(ids), size):
            end = min(begin + size, len(ids))
            context = begin if end - begin == size else max(end - size, 0)
            yield stream[context:end], stream[begin + 1 : end + 1]

    def _prefix(self) -> int:
        """What stands before a text that has nothing before it: BOS, else EOS, else token 0."""
        return next((i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None), 0)

    def _likelihoods(self, scored: list[_Scored]) -> Iterator[tuple[int, Response]]:
        parts = {item.index: 0 for item in scored}
        for item in scored:
            parts[item.index] += 1
        sums: dict[int, list[tuple[float, bool, int, str | None]]] = {index: [] for index in parts}
        started = time.monotonic()
        order = sorted(scored, key=lambda item: -len(item.ids))
        for batch in self._batches(order, [len(item.ids) for item in order]):
            for item, (logprob, greedy, error) in zip(batch, self._score(batch), strict=True):
                sums[item.index].append((logprob, greedy, len(item.targets), error))
                if len(sums[item.index]) == parts[item.index]:
                    yield item.index, _summed(sums.pop(item.index), time.monotonic() - started)

    def _score(self, batch: list[_Scored]) -> list[tuple[float, bool, str | None]]:
        """Summed log-probability of each item's targets, whether they are the argmax, and what went wrong."""
        hidden, _, starts = self._read([item.ids for item in batch], keep_all=True)
        wanted: list[int] = []
        for item, start in zip(batch, starts, strict=True):
            end = start + len(item.ids)
            wanted += range(end - len(item.targets), end)
        out: list[tuple[float, bool, str | None]] = []
        targets = torch.tensor([t for item in batch for t in item.targets], device=self.device)
        chosen, best = self._chosen(hidden[torch.tensor(wanted, device=self.device)], targets)
        begin = 0
        for item in batch:
            n = len(item.targets)
            values, top = chosen[begin : begin + n], best[begin : begin + n]
            begin += n
            total = math.fsum(values)
            error = None if math.isfinite(total) else "the model gave log-probabilities that are not finite"
            out.append((total, all(top), error))
        return out

    def _chosen(self, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Log-probability of each target [n] after hidden [n, D], and whether it is the argmax; fp32 log-softmax."""
        values: list[float] = []
        best: list[bool] = []
        for at in range(0, len(targets), self.batch_tokens):
            logits = self.model.logits(hidden[at : at + self.batch_tokens])
            now = targets[at : at + self.batch_tokens]
            values += logits.log_softmax(-1).gather(1, now[:, None])[:, 0].tolist()
            best += (logits.argmax(-1) == now).tolist()
        return values, best

    # Generation ------------------------------------------------------------------------------------------------------

    def _generations(self, requests: list[tuple[int, Generate]]) -> Iterator[tuple[int, Response]]:
        """Read prompts until the slots are full, decode until half are free, and so on."""
        order = sorted(requests, key=lambda pair: -len(pair[1].prompt.ids))
        waiting = deque(self._batches(order, [len(request.prompt.ids) for _, request in order]))
        live: list[_Live] = []
        state: State | None = None
        last: list[int] = []
        while waiting or live:
            while waiting and len(live) < self.slots:
                batch = waiting.popleft()
                started = time.monotonic()
                new = [_Live(index, request, started) for index, request in batch]
                hidden, read, _ = self._read([item.request.prompt.ids.tolist() for item in new], keep_all=False)
                new, first, kept, done = self._settle(new, self._greedy(hidden), read)
                yield from done
                if kept is not None:
                    state = kept if state is None else State.concat([state, kept])
                live += new
                last += first
            while live and (not waiting or len(live) > self.slots // 2):
                assert state is not None
                last = self._greedy(self.model.step(torch.tensor(last, device=self.device), state))
                live, last, state, done = self._settle(live, last, state)
                yield from done

    def _greedy(self, hidden: Tensor) -> list[int]:
        """The most likely next token of each row of hidden [n, D]; -1 where the logits are not finite."""
        logits = self.model.logits(hidden)
        best = torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1)
        return best.tolist()

    def _settle(
        self, live: list[_Live], tokens: list[int], state: State | None
    ) -> tuple[list[_Live], list[int], State | None, list[tuple[int, Response]]]:
        """Append the new token of each generation; those that end leave with their answer."""
        done: list[tuple[int, Response]] = []
        stay: list[int] = []
        for row, (item, token) in enumerate(zip(live, tokens, strict=True)):
            response = self._advance(item, token)
            if response is None:
                stay.append(row)
            else:
                done.append((item.index, response))
        if done and state is not None:
            state = state.select(stay) if stay else None
        return [live[row] for row in stay], [tokens[row] for row in stay], state, done

    def _advance(self, item: _Live, token: int) -> Response | None:
        request = item.request
        ended: Literal["eos", "stop", "length", "decided"] | None = None
        latency = time.monotonic() - item.started
        if token < 0:
            error = f"the model gave logits that are not finite after {len(item.ids)} generated tokens"
            return Response(ended="error", error=error, tokens=len(item.ids), latency_s=latency)
        if token == self.tokenizer.eos_id:
            ended = "eos"
        else:
            item.ids.append(token)
        text = self.tokenizer.decode(item.ids)
        cut = min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text, ended = text[:cut], "stop"
        elif ended is None and request.decision is not None and request.decision.settled(text):
            ended = "decided"
        elif ended is None and len(item.ids) >= request.max_tokens:
            ended = "length"
        if ended is None:
            return None
        return Response(text=text, tokens=len(item.ids), ended=ended, latency_s=latency)

    # Reading ---------------------------------------------------------------------------------------------------------

    def _batches(self, items: list[Item], lengths: list[int]) -> list[list[Item]]:
        """Consecutive items whose tokens fit the budget together; an item beyond it is alone."""
        batches: list[list[Item]] = []
        room = 0
        for item, length in zip(items, lengths, strict=True):
            if not batches or length > room or len(batches[-1]) >= self.slots:
                batches.append([])
                room = self.batch_tokens
            batches[-1].append(item)
            room -= length
        return batches

    def _read(self, rows: list[list[int]], *, keep_all: bool) -> tuple[Tensor, State, list[int]]:
        """Read packed rows: hidden states (all of them, or of each row's last token), state, first row of each."""
        rows = [row or [self._prefix()] for row in rows]
        if len(rows) > 1 or len(rows[0]) <= self.batch_tokens:
            ragged = Ragged([len(row) for row in rows], self.device)
            ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=self.device)
            hidden, state = self.model(ids, ragged)
            return (hidden if keep_all else hidden[ragged.last]), state, list(ragged.starts[:-1])
        kept: list[Tensor] = []
        state_or_none: State | None = None
        for at in range(0, len(rows[0]), self.batch_tokens):
            piece = torch.tensor(rows[0][at : at + self.batch_tokens], dtype=torch.int64, device=self.device)
            hidden, state_or_none = self.model(piece, Ragged([len(piece)], self.device), state_or_none)
            kept = [*kept, hidden] if keep_all else [hidden[-1:]]
        assert state_or_none is not None
        return torch.cat(kept), state_or_none, [0]


def _summed(parts: list[tuple[float, bool, int, str | None]], latency: float) -> Response:
    tokens = sum(n for _, _, n, _ in parts)
    errors = [error for *_, error in parts if error]
    if errors:
        return Response(ended="error", error=errors[0], tokens=tokens, latency_s=latency)
    total = math.fsum(logprob for logprob, *_ in parts)
    return Response(logprob=total, greedy=all(greedy for _, greedy, *_ in parts), tokens=tokens, latency_s=latency)


def load(source: str, *, device: str = "cpu", dtype: str | None = None, batch_tokens: int = 8192) -> NativeBackend:
    """Open a model of ours: a zoo name or the directory of a checkpoint.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and bfloat16 on a GPU.

    Raises:
        UserError: an unknown name or a device that is not there.
        CheckpointError: the checkpoint was refused.
    """
    directory = zoo.path(source) or Path(source)
    if not directory.is_dir():
        raise UserError(f"no model {source!r}: not in the zoo ({', '.join(zoo.names())}) and not a directory")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch sees no GPU")
    kind = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else torch.bfloat16
    model, header = native.load(directory, where, kind)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has ids up to {tokenizer.vocab_size - 1}, "
            f"the embedding only {model.config.vocab_size} rows"
        )
    name = source if zoo.path(source) else directory.resolve().name
    return NativeBackend(model, tokenizer, describe(model, name, header.digest, tokenizer), batch_tokens)


def describe(model: Decoder, name: str, checkpoint: str, tokenizer: Tokenizer) -> ModelInfo:
    """What records say about a model."""
    config = model.config
    used = [config.mixers[layer]["mixer"] for layer in config.pattern]
    kinds = {layer.mixer.kind for layer in model.blocks()}
    family: Literal["recurrent", "hybrid", "transformer"] = (
        "hybrid" if len(kinds) == 2 else "recurrent" if kinds == {"recurrent"} else "transformer"
    )
    recurrent = [mixer for mixer, layer in zip(used, model.blocks(), strict=True) if layer.mixer.kind == "recurrent"]
    weight = model.embed.weight
    identity = {
        "device": weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "kernels": choose(weight.device, model.blocks()[0].mixer.implementation),
    }
    details = {"identity": identity, "train_length": config.train_length, "config": config.to_dict()}
    mixer = "+".join(sorted(set(recurrent or used)))
    return ModelInfo(name, mixer, family, model.n_params(), checkpoint, tokenizer.digest, None, details)
