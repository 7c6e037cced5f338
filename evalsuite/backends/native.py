"""Our own models behind the three verbs.

Rows are packed, never padded. A prompt is read in pieces cut at multiples of the chunk length from its own first token,
what several prompts have in common is read once, and matrix products run in blocks of fixed size: an answer is the
same, bit for bit, alone or in any batch, shared or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch

from evalsuite.backends.decoding import Decoding, Generation, greedy
from evalsuite.backends.reading import CHUNK, Held, Job, Reader, Result
from evalsuite.backends.selfcheck import first_bad_part
from evalsuite.batching import share
from evalsuite.types import Generate, Ids, LogLikelihood, ModelInfo, Request, Response, Rolling, Tokenizer
from gdn2.checkpoints import Options, open_model
from gdn2.errors import UserError
from gdn2.kernels import choose
from gdn2.models import Decoder


class NativeBackend:
    """Answers requests with a `Decoder`.

    Args:
        model: weights on their device, gradients off.
        tokenizer: the model's.
        info: what records say about the model.
        batch_tokens: tokens read at once; bounds memory, never changes an answer.
        slots: sequences read or decoded together; never changes an answer.
        share_prefixes: read what prompts have in common once; off only for comparison.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, info: ModelInfo, batch_tokens: int = 8192, slots: int = 64,
        share_prefixes: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.info = model, tokenizer, info
        self.batch_tokens, self.slots, self.share_prefixes = batch_tokens, slots, share_prefixes
        self.tokens_asked = self.tokens_read = 0  # by all calls so far

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Answer all requests; see `evalsuite.types.Backend`."""
        work = _Work(self, requests)
        yield from work.answered()
        while work.reader or work.decoding:
            with torch.inference_mode():  # never across a yield: the caller may train
                if work.reader and not work.decoding.full:
                    work.reader.run_batch()
                else:
                    work.decoding.step()
            yield from work.answered()
        self.tokens_read += work.reader.tokens_read
        self.tokens_asked += work.tokens_asked

    def prefix(self) -> int:
        """What stands before a text that has nothing before it: BOS, else EOS, else token 0."""
        return next((i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None), 0)


class _Work:
    """The jobs of one call: shared segments of all contexts, then continuations and generations from their ends."""

    def __init__(self, backend: NativeBackend, requests: Sequence[Request]) -> None:
        self.reader = Reader(backend.model, backend.batch_tokens, backend.slots)
        self.decoding = Decoding(backend.model, backend.tokenizer, backend.slots, self._answer)
        self.tokens_asked = 0
        self._backend, self._requests = backend, requests
        self._out: list[tuple[int, Response]] = []
        self._started = time.monotonic()
        self._open: dict[int, list[Result | None]] = {}  # rolling requests: their windows so far
        contexts: list[Ids] = []
        self._asking: list[int] = []  # the request of each context
        for index, request in enumerate(requests):
            if isinstance(request, Rolling):
                self._roll(index, request)
            else:
                prompt = request.prompt if isinstance(request, Generate) else request.context
                contexts.append(prompt.ids if len(prompt.ids) else np.array([backend.prefix()], dtype=np.int32))
                self._asking.append(index)
        self._segments = share(contexts, CHUNK, merge=backend.share_prefixes)
        self.tokens_asked += sum(len(ids) for ids in contexts)
        for number, segment in enumerate(self._segments):
            if segment.parent is None:
                self._push(number, None)

    def answered(self) -> list[tuple[int, Response]]:
        out, self._out = self._out, []
        return out

    def _answer(self, index: int, response: Response) -> None:
        self._out.append((index, response))

    def _push(self, number: int, source: Held | None) -> None:
        segment = self._segments[number]
        self.reader.push(
            Job(
                segment.ids,
                source,
                lambda result: self._read(number, result),
                want_last=bool(segment.contexts),
                want_state=bool(segment.children),
            )
        )

    def _read(self, number: int, result: Result) -> None:
        """A segment is read: go on with its children and with the requests whose context ends here."""
        segment = self._segments[number]
        for child in segment.children:
            self._push(child, result.held)
        if not segment.contexts:
            return
        assert result.last is not None
        (first,) = greedy(result.last[None])
        for context in segment.contexts:
            index = self._asking[context]
            request = self._requests[index]
            if isinstance(request, Generate):
                if first < 0:
                    self._answer(index, Response(ended="error", error=self._blame(request.prompt.ids)))
                    continue
                self.decoding.add(Generation(index, request, result.held, first, self._started))
            elif isinstance(request, LogLikelihood):
                self._continue(index, request, result, first)

    def _continue(self, index: int, request: LogLikelihood, result: Result, first: int) -> None:
        """Score a continuation: its first token from the end of the context, the others by reading it."""
        assert result.last is not None
        rest = request.continuation.ids
        ids = np.concatenate([request.context.ids, rest])
        self.tokens_asked += max(len(rest) - 1, 0)
        head = [result.last[int(rest[0])].item()] if len(rest) else []
        head_greedy = not len(rest) or first == int(rest[0])

        def done(tail: Result) -> None:
            self._answer(index, self._scored(ids, [*head, *tail.logprobs], head_greedy and tail.greedy))

        if len(rest) > 1:
            self.reader.push(Job(rest[:-1], result.held, done, targets=rest[1:]))
        else:
            self._answer(index, self._scored(ids, head, head_greedy))

    def _blame(self, ids: Ids) -> str:
        """Where in the model the values of a failed request stop being finite."""
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self._backend.model.embed.weight.device)
        return f"values that are not finite, first in {first_bad_part(self._backend.model, tokens)}"

    def _scored(self, ids: Ids, logprobs: list[float], all_greedy: bool | None) -> Response:
        total = math.fsum(logprobs) if all(map(math.isfinite, logprobs)) else math.nan
        latency = time.monotonic() - self._started
        if math.isnan(total):
            return Response(ended="error", error=self._blame(ids), tokens=len(logprobs), latency_s=latency)
        return Response(logprob=total, greedy=all_greedy, tokens=len(logprobs), latency_s=latency)

    def _roll(self, index: int, request: Rolling) -> None:
        """Push the windows of a document."""
        cuts = list(windows(request.document.ids, self._backend.prefix(), request.window))
        if not cuts:
            self._answer(index, Response(logprob=0.0))
        results: list[Result | None] = [None] * len(cuts)

        def finish(number: int, result: Result) -> None:
            results[number] = result
            if all(results):
                through = [r for r in results if r is not None]
                logprobs = [x for r, (_, skip, _) in zip(through, cuts, strict=True) for x in r.logprobs[skip:]]
                self._answer(index, self._scored(request.document.ids, logprobs, None))

        for number, (ids, _, targets) in enumerate(cuts):
            self.tokens_asked += len(ids)
            self.reader.push(Job(ids, None, partial(finish, number), targets=targets))


def windows(ids: Ids, prefix: int, size: int | None) -> Iterator[tuple[Ids, int, Ids]]:
    """Disjoint windows of a document of at most `size` tokens, each with one token of context (lm-eval's rule).

    The last window is filled up with earlier tokens, which are read but not scored.

    Yields:
        tokens to read, how many of their predictions are not scored, the token after each.
    """
    stream = np.concatenate([np.array([prefix], dtype=np.int32), ids])
    size = size or max(len(ids), 1)
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        context = begin if end - begin == size else max(end - size, 0)
        yield stream[context:end], begin - context, stream[context + 1 : end + 1]


def load(
    source: str, *, device: str = "cpu", dtype: str | None = None, batch_tokens: int = 8192,
    options: Options | None = None,
) -> NativeBackend:  # fmt: skip
    """Open a model of ours: any name or path that `gdn2.checkpoints.open_model` takes.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and bfloat16 on a GPU.
        options: how the checkpoint is opened.

    Raises:
        UserError: an unknown name, a device that is not there, or a model without a tokenizer.
        CheckpointError: the checkpoint was refused.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch sees no GPU")
    kind = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else torch.bfloat16
    loaded = open_model(source, device=where, dtype=kind, options=options)
    if loaded.tokenizer is None:
        raise UserError(f"{source} brings no tokenizer: give --tokenizer")
    info = describe(loaded.model, loaded.name, loaded.digest, loaded.tokenizer)
    return NativeBackend(loaded.model, loaded.tokenizer, info, batch_tokens)


def describe(model: Decoder, name: str, checkpoint: str, tokenizer: Tokenizer) -> ModelInfo:
    """What records say about a model."""
    config = model.config
    used = [config.mixers[layer]["mixer"] for layer in config.pattern]
    kinds = {layer.mixer.kind for layer in model.blocks()}
    family: Literal["recurrent", "hybrid", "transformer"] = (
        "hybrid" if len(kinds) > 1 or "hybrid" in kinds else "recurrent" if kinds == {"recurrent"} else "transformer"
    )
    recurrent = [mixer for mixer, layer in zip(used, model.blocks(), strict=True) if layer.mixer.kind != "attention"]
    weight = model.embed.weight
    identity = {
        "device": weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "kernels": choose(weight.device, model.blocks()[0].mixer.implementation),
    }
    details = {"identity": identity, "train_length": config.train_length, "config": config.to_dict()}
    mixer = "+".join(sorted(set(recurrent or used)))
    return ModelInfo(name, mixer, family, model.n_params(), checkpoint, tokenizer.digest, None, details)
