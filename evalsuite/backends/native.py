"""Our own models behind the three verbs.

Rows are packed, never padded. A prompt is read in pieces cut at multiples of the chunk length from its own first token,
what several prompts have in common is read once, and matrix products run in blocks of fixed size: an answer is the
same, bit for bit, alone or in any batch, shared or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import torch

from evalsuite.backends.decoding import Decoding, Generation
from evalsuite.backends.describing import describe
from evalsuite.backends.memory import Shelf, held_budget, longest, raise_if_lost, too_large
from evalsuite.backends.pool import Pool, PooledDecoding, pooled
from evalsuite.backends.reading import CHUNK, Held, Job, Reader, Result, ends
from evalsuite.backends.selfcheck import first_bad_part, self_check
from evalsuite.backends.turns import Turn, Turns
from evalsuite.batching import share, windows
from evalsuite.types import (
    EXACT,
    Generate,
    Ids,
    LogLikelihood,
    ModelInfo,
    Numbers,
    Request,
    Response,
    Rolling,
    Tokenizer,
)
from gdn2.checkpoints import Options, open_model
from gdn2.errors import SelfCheckError, UserError
from gdn2.models import Decoder

# On a CPU, activations that stay in its caches: reading 16,384 tokens with Mamba-2 and Gated DeltaNet of one million
# parameters took 1.19 and 2.00 s at 8192 tokens, 0.93 and 1.74 s at 2048, 1.20 and 2.78 s at 128, on one thread.
# On a GPU, enough work for the host to keep ahead: Gated DeltaNet of 1.3 billion read 166,000 tokens a second at 8192,
# 190,000 at 16384, on an H100 whose host took 50 ms to send either off.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


# Continuations of at most so many tokens are read token by token. Measured for 16 and 64 rows of GDN-2 and its hybrid
# at two sizes on one thread: one and two tokens took 0.13 to 0.84 of the chunk form's time, four 0.3 to 2.7, eight 1.1
# and more. Not measured on a GPU. The rule knows the request alone, so an answer does not depend on its neighbours.
STEPPED = {"cpu": 2, "cuda": 0}

# Tokens that the sharing of a stretch must save: a short stretch in a batch of its own leaves a GPU waiting.
SHARING = {"cuda": 512}


class NativeBackend:
    """Answers requests with a `Decoder`.

    Args:
        model: weights on their device, gradients off.
        tokenizer: the model's.
        info: what records say about the model.
        batch_tokens: tokens read at once; bounds memory, never changes an answer.
        slots: sequences read or decoded together; never changes an answer.
        share_prefixes: read what prompts have in common once; off only for comparison.
        rounding: what log-probabilities and their sums are rounded to, as lm-eval does; None is fp32.

    Where the device's memory is exhausted, `batch_tokens` and `slots` halve and the batch is made again.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, info: ModelInfo, batch_tokens: int = 8192, slots: int = 64,
        share_prefixes: bool = True, rounding: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.info = model, tokenizer, info
        self.batch_tokens, self.slots, self.share_prefixes = batch_tokens, slots, share_prefixes
        self.rounding = rounding
        self.device = model.embed.weight.device
        self.shelf = Shelf(held_budget(self.device))
        self.pools: list[Pool] = []  # what the last call decoded in
        self.tokens_asked = self.tokens_read = 0  # by all calls so far
        self.events: list[dict[str, object]] = []  # each time memory was exhausted

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Answer all requests; see `evalsuite.types.Backend`.

        Raises:
            DeviceLostError: the device does not work any more.
        """
        work = _Work(self, requests)
        try:
            yield from work.answered()
            while work.reader or work.decoding:
                with torch.inference_mode():  # never across a yield: the caller may train
                    work.advance()
                yield from work.answered()
        except RuntimeError as error:
            raise_if_lost(error)
            raise
        finally:
            self.tokens_read += work.reader.tokens_read
            self.tokens_asked += work.tokens_asked

    def self_check(self) -> dict[str, float]:
        """Prove on this model that no short cut changes an answer; see `evalsuite.types.Accountable`."""
        try:
            found = self_check(self.model)
            exact = not self.model.fast
        except torch.OutOfMemoryError:
            raise SelfCheckError(f"there is no memory left on {self.device} to check {self.info.name}") from None
        except RuntimeError as error:
            raise_if_lost(error)
            raise
        if failures := found.failures(self.model.embed.weight.dtype, exact):
            raise SelfCheckError(f"the self check of {self.info.name} failed, nothing was asked: {'; '.join(failures)}")
        return found._asdict()

    def report(self) -> dict[str, object]:
        """Tokens and faults so far; see `evalsuite.types.Accountable`."""
        return {
            "tokens_asked": self.tokens_asked,
            "tokens_read": self.tokens_read,
            "tokens_shared": max(0, self.tokens_asked - self.tokens_read),
            "states_moved_bytes": self.shelf.moved_bytes,
            "events": list(self.events),
        }

    def note(self, text: str) -> None:
        """Something a user should know, for the report."""
        self.events.append({"event": text})

    def prefix(self) -> int:
        """What stands before a text that has nothing before it: BOS, else EOS, else token 0."""
        return next((i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None), 0)


class _Work:
    """The jobs of one call: shared segments of all contexts, then continuations and generations from their ends."""

    def __init__(self, backend: NativeBackend, requests: Sequence[Request]) -> None:
        model = backend.model
        self.reader = Reader(model, backend.batch_tokens, backend.slots, backend.shelf, backend.rounding)
        given = (model, backend.tokenizer, backend.slots, self._answer)
        self.decoding = PooledDecoding(*given, backend.pools, backend.note) if pooled(model) else Decoding(*given)
        self._turns = Turns()
        self.tokens_asked = 0
        self._backend, self._requests = backend, requests
        self._out: list[tuple[int, Response]] = []
        self._started = time.monotonic()
        contexts: list[Ids] = []
        self._asking: list[int] = []  # the request of each context
        largest = 0  # tokens of a request that is known to fit
        for index, request in enumerate(requests):
            needed = longest(request)
            if needed > largest and (reason := too_large(backend.model, needed)):
                self._fail(index, reason)
                continue
            largest = max(largest, needed)
            if isinstance(request, Rolling):
                self._roll(index, request)
            else:
                contexts.append(self._context(request))
                self._asking.append(index)
        worth = SHARING.get(backend.device.type, 0)
        self._segments = share(contexts, CHUNK, merge=backend.share_prefixes, worth=worth)
        self.tokens_asked += sum(len(ids) for ids in contexts)
        for number, segment in enumerate(self._segments):
            if segment.parent is None:
                self._push(number, None)

    def answered(self) -> list[tuple[int, Response]]:
        out, self._out = self._out, []
        return out

    def advance(self) -> None:
        """Read one batch or decode one token of every live sequence; where memory runs out, try less next time."""
        turn: Turn = "reading" if self.reader and not self.decoding.full else "decoding"
        if turn == "reading" and self.decoding:
            turn = self._turns.next()
        call = self.reader.run_batch if turn == "reading" else self.decoding.step
        # Not inside a handler: the failed call's frame would hold on to its tensors.
        if not self._turns.take(turn, partial(self._attempt, call)):
            self._less(turn == "reading")

    @staticmethod
    def _attempt(call: Callable[[], None]) -> bool:
        try:
            call()
        except torch.OutOfMemoryError:
            return False
        return True

    def _less(self, reading: bool) -> None:
        """Halve the budgets; at the smallest, one request fails."""
        backend = self._backend
        if backend.device.type == "cuda":
            torch.cuda.empty_cache()
        backend.shelf.shrink()
        if not self.decoding:
            backend.pools.clear()
        tokens = self.reader.batch_tokens
        if not reading:
            self._restart(self.decoding.restart())
        elif not self.reader.shrink():
            if self.decoding:
                self.decoding.pause()
            else:
                self.reader.give_up(f"oom: the device's memory is exhausted at {tokens} tokens a batch")
        backend.batch_tokens = self.reader.batch_tokens
        backend.slots = min(self.reader.rows, self.decoding.slots)
        backend.events.append(
            {"event": "out of memory", "while": "reading" if reading else "decoding"}
            | {"batch_tokens": backend.batch_tokens, "slots": backend.slots}
        )

    def _restart(self, live: list[Generation]) -> None:
        """Read the prompts of interrupted generations again: a step that failed has half changed their states."""
        if len(live) == 1:
            self._fail(live[0].index, "oom: the device's memory is exhausted decoding one sequence")
            return
        for item in live:
            heads, draws, _ = ends([item.request])
            told = partial(self._again, item.index), partial(self._fail, item.index)
            self.reader.push(Job(self._context(item.request), None, *told, heads=heads, draws=draws))

    def _again(self, index: int, result: Result) -> None:
        self._generate(index, result, result.drawn[0] if result.drawn else result.best)

    def _answer(self, index: int, response: Response) -> None:
        self._out.append((index, response))

    def _fail(self, index: int, reason: str) -> None:
        latency = time.monotonic() - self._started
        self._answer(index, Response(ended="error", error=reason, latency_s=latency))

    def _context(self, request: Generate | LogLikelihood) -> Ids:
        ids = request.prompt.ids if isinstance(request, Generate) else request.context.ids
        return ids if len(ids) else np.array([self._backend.prefix()], dtype=np.int32)

    def _push(self, number: int, source: Held | None) -> None:
        segment = self._segments[number]
        heads, draws, ranked = ends([self._requests[self._asking[context]] for context in segment.contexts])
        self.reader.push(
            Job(
                segment.ids,
                source,
                lambda result: self._read(number, result),
                lambda reason: self._lose(number, reason),
                heads=heads,
                draws=draws,
                ranked=ranked,
                want_state=bool(segment.children),
            )
        )

    def _lose(self, number: int, reason: str) -> None:
        """A segment cannot be read: every request behind it fails."""
        lost = [number]
        while lost:
            segment = self._segments[lost.pop()]
            lost += segment.children
            for context in segment.contexts:
                self._fail(self._asking[context], reason)

    def _read(self, number: int, result: Result) -> None:
        """A segment is read: go on with its children and with the requests whose context ends here."""
        segment = self._segments[number]
        for child in segment.children:
            self._push(child, result.held)
        heads, drawn = iter(result.heads), iter(result.drawn)
        for context in segment.contexts:
            index = self._asking[context]
            request = self._requests[index]
            if isinstance(request, Generate):
                self._generate(index, result, result.best if request.sampling is None else next(drawn))
            elif isinstance(request, LogLikelihood):
                head = [next(heads)] if len(request.continuation.ids) else []
                self._continue(index, request, result, head)

    def _generate(self, index: int, result: Result, token: int) -> None:
        request = self._requests[index]
        assert isinstance(request, Generate)
        if result.best < 0:
            self._fail(index, self._blame(self._context(request)))
            return
        self._backend.shelf.put(result.held.state)
        self.decoding.add(Generation(index, request, result.held, token, self._started))

    def _continue(self, index: int, request: LogLikelihood, result: Result, head: list[list[float]]) -> None:
        """Score a continuation: its first token is `head`, from the end of the context; the others are read."""
        rest = request.continuation.ids
        ids = np.concatenate([request.context.ids, rest])
        self.tokens_asked += max(len(rest) - 1, 0)
        logprobs = [logprob for logprob, _, _ in head]
        greedy = all(best for _, best, _ in head)
        rank = max([1, *(int(place) for _, _, place in head)]) if request.ranked else None

        def done(tail: Result) -> None:
            worst = None if rank is None else max(rank, tail.rank)
            self._answer(index, self._scored(ids, [*logprobs, *tail.logprobs], greedy and tail.greedy, worst))

        if len(rest) > 1:
            stepped = len(rest) - 1 <= STEPPED.get(self._backend.device.type, 0)
            job = Job(rest[:-1], result.held, done, partial(self._fail, index), targets=rest[1:], stepped=stepped)
            job.ranked = request.ranked
            self.reader.push(job)
        else:
            self._answer(index, self._scored(ids, logprobs, greedy, rank))

    def _blame(self, ids: Ids) -> str:
        """Where in the model the values of a failed request stop being finite."""
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self._backend.model.embed.weight.device)
        where = first_bad_part(self._backend.model, tokens, self.reader.batch_tokens)
        return f"values that are not finite, first in {where}"

    def _scored(self, ids: Ids, logprobs: list[float], greedy: bool | None, rank: int | None = None) -> Response:
        total = self._sum(logprobs) if all(map(math.isfinite, logprobs)) else math.nan
        latency = time.monotonic() - self._started
        if math.isnan(total):
            return Response(ended="error", error=self._blame(ids), tokens=len(logprobs), latency_s=latency)
        return Response(logprob=total, greedy=greedy, rank=rank, tokens=len(logprobs), latency_s=latency)

    def _sum(self, logprobs: list[float]) -> float:
        rounding = self._backend.rounding
        return math.fsum(logprobs) if rounding is None else float(torch.tensor(logprobs, dtype=rounding).sum())

    def _roll(self, index: int, request: Rolling) -> None:
        """Push the windows of a document."""
        cuts = list(windows(request.document.ids, self._backend.prefix(), request.window))
        if not cuts:
            self._answer(index, Response(logprob=0.0))
        results: list[Result | None] = [None] * len(cuts)
        failed: list[str] = []

        def fail(reason: str) -> None:
            if not failed:
                self._fail(index, reason)
            failed.append(reason)

        def finish(number: int, result: Result) -> None:
            results[number] = result
            if all(results):
                through = [r for r in results if r is not None]
                parts = [r.logprobs[skip:] for r, (_, skip, _) in zip(through, cuts, strict=True)]
                if self._backend.rounding is not None:  # each window's sum is rounded, theirs is not
                    parts = [[self._sum(part)] for part in parts]
                response = self._scored(request.document.ids, list(chain(*parts)), None)
                self._answer(index, replace(response, tokens=len(request.document.ids)))

        for number, (ids, _, targets) in enumerate(cuts):
            self.tokens_asked += len(ids)
            self.reader.push(Job(ids, None, partial(finish, number), fail, targets=targets))


def load(
    source: str, *, device: str = "cpu", dtype: str | None = None, batch_tokens: int | None = None,
    options: Options | None = None, share_prefixes: bool = True, numbers: Numbers = EXACT,
) -> NativeBackend:  # fmt: skip
    """Open a model of ours: any name or path that `gdn2.checkpoints.open_model` takes.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and bfloat16 on a GPU.
        batch_tokens: tokens read at once; None is `BATCH_TOKENS` of the device.
        options: how the checkpoint is opened.
        numbers: what is given up of exactness.

    Raises:
        UserError: an unknown name, a device that is not there, or a model without a tokenizer.
        CheckpointError: the checkpoint was refused.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch sees no GPU")
    if where.index is not None and where.type == "cuda":
        if where.index >= torch.cuda.device_count():
            raise UserError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(where)  # Triton launches on the current one
    kind = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else torch.bfloat16
    loaded = open_model(source, device=where, dtype=kind, options=options)
    if loaded.tokenizer is None:
        raise UserError(f"{source} brings no tokenizer: give --tokenizer")
    loaded.model.fast = numbers.fast
    info = describe(loaded.model, loaded.name, loaded.digest, loaded.tokenizer, numbers)
    tokens = batch_tokens or BATCH_TOKENS[where.type]
    return NativeBackend(
        loaded.model, loaded.tokenizer, info, tokens, share_prefixes=share_prefixes,
        rounding=kind if numbers.lm_eval_rounding else None,
    )  # fmt: skip
