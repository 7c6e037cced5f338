"""Batches of packed documents, made ahead by worker processes, the same ones in the same order however many there are.

A batch is a pure function of (source, number): it takes the documents numbered batch * 2**20 + j until they are enough.
This module imports no torch, so that a worker starts at once.

Axes: T tokens of all documents of a batch.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gdn2.errors import DataError, UserError

STRIDE = 1 << 20
AHEAD = 8  # batches each worker keeps ready


class Source(Protocol):
    """Documents by number."""

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids [T] and the loss weight of each token as a target [T], 0 at the first."""


Split = Literal["train", "eval"]
# (tokenizer.json, fields of the mixture, seed, split) -> documents. Workers import it by name: a module-level function.
SourceFactory = Callable[[Path, Mapping[str, Any], int, Split], Source]


@dataclass(frozen=True)
class Batch:
    """Packed documents."""

    ids: NDArray[np.int32]  # [T]
    weights: NDArray[np.float32]  # [T], of each token as a target; 0 where a document starts
    lengths: tuple[int, ...]


class TextRows:
    """Rows of text files: the files' tokens end to end, cut at random places. The last tenth is the eval split."""

    def __init__(
        self, tokenizer: Path, files: tuple[Path, ...], mixture: Mapping[str, Any], seed: int, split: Split
    ) -> None:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
        encoder.encode_special_tokens = True
        ids: list[int] = []
        for file in files:
            try:
                ids += encoder.encode(file.read_text(encoding="utf-8"), add_special_tokens=False).ids
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {file} as UTF-8 text: {error}") from error
        cut = len(ids) * 9 // 10
        self._ids = np.array(ids[:cut] if split == "train" else ids[cut:], dtype=np.int32)
        self._length, self._weight, self._seed = mixture["length"], mixture["text_weight"], seed
        if len(self._ids) < self._length[1]:
            raise DataError(
                f"the {split} part of the text has {len(self._ids)} tokens, fewer than length {self._length[1]}"
            )

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        rng = random.Random(f"{self._seed}/{index}")
        length = rng.randint(*self._length)
        start = rng.randrange(len(self._ids) - length + 1)
        weights = np.full(length, self._weight, dtype=np.float32)
        weights[0] = 0
        return self._ids[start : start + length], weights


@dataclass(frozen=True)
class Opening:
    """How to open a source, in this process or in a worker."""

    factory: SourceFactory | None  # None: text rows
    tokenizer: Path
    files: tuple[Path, ...]
    mixture: Mapping[str, Any]
    seed: int
    split: Split = "train"

    def open(self) -> Source:
        if self.factory is None:
            return TextRows(self.tokenizer, self.files, self.mixture, self.seed, self.split)
        return self.factory(self.tokenizer, self.mixture, self.seed, self.split)


def make_batch(source: Source, number: int, tokens: int, fill: int = 0) -> Batch:
    """Documents of batch `number` up to `tokens` tokens, one at least, each filled up to `fill` tokens of no weight."""

    def document_of(index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        ids, weights = source.document(index)
        missing = max(fill - len(ids), 0)
        return np.pad(ids, (0, missing), mode="edge"), np.pad(weights, (0, missing))

    documents = [document_of(number * STRIDE)]
    total = len(documents[0][0])
    while len(documents) < STRIDE:
        document = document_of(number * STRIDE + len(documents))
        total += len(document[0])
        if total > tokens:
            break
        documents.append(document)
    ids, weights = zip(*documents, strict=True)
    return Batch(np.concatenate(ids), np.concatenate(weights), tuple(map(len, ids)))


class Batches:
    """Batches `first`, `first` + 1, ... of one source, made by `workers` processes (0: by this one, when asked)."""

    def __init__(self, opening: Opening, tokens: int, first: int, workers: int, fill: int = 0) -> None:
        self._tokens, self._first, self._next, self._fill = tokens, first, first, fill
        self._source = None if workers else opening.open()
        self._processes: list[Any] = []
        self._queues: list[Any] = []
        context = multiprocessing.get_context("spawn")
        for w in range(workers):
            ready = context.Queue(AHEAD)
            arguments = (opening, tokens, first + w, workers, ready, fill)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._queues.append(ready)
            self._processes.append(process)

    def take(self) -> Batch:
        """The next batch."""
        number, self._next = self._next, self._next + 1
        if self._source is not None:
            return make_batch(self._source, number, self._tokens, self._fill)
        return self._receive((number - self._first) % len(self._queues))

    def _receive(self, w: int) -> Batch:
        while True:
            try:
                got = self._queues[w].get(timeout=1.0)
            except queue.Empty:
                if not self._processes[w].is_alive():
                    code = self._processes[w].exitcode
                    raise RuntimeError(f"a process that makes batches died with exit code {code}") from None
                continue
            if isinstance(got, UserError):
                raise got
            return got

    def close(self) -> None:
        """End the worker processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for ready in self._queues:
            ready.close()


def _work(opening: Opening, tokens: int, first: int, step: int, ready: Any, fill: int) -> None:
    """A worker: batches `first`, `first` + `step`, ... until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        source = opening.open()
        number = first
        while parent.is_alive():
            batch = make_batch(source, number, tokens, fill)
            number += step
            while parent.is_alive():
                try:
                    ready.put(batch, timeout=1.0)
                    break
                except queue.Full:
                    continue
        ready.cancel_join_thread()  # nobody reads any more
    except UserError as error:
        ready.put(error)
