"""The word tasks in profile `exact`: cwe and fwe lists that fill the window.

Rules: every sample has a random stream of its own, so the words asked for are the same for every model and tokenizer;
how many others there are is what fills the window. A cwe list ends less than one entry below it (the last word may
come less often than its like); where the word list is used up, all words come more often; where RULER's repeats for
4096 tokens and more leave no room, those for less are used. The rest of an fwe text is filled with dots, which are to
be ignored. Words are encoded once and joined as ids, as in `tasks.ruler.splice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from evalsuite.types import Ids, Tokenizer
from gdn2.errors import UserError
from tasks.ruler import cwe, fwe
from tasks.ruler.haystack import rng_of
from tasks.ruler.splice import ByDigest, Splicer
from tasks.ruler.words import single_words

_TRIES = 32
_CLOSE = 2  # tokens below the window that are not worth another try
_MORE = 128  # tokens a refused length is told to add
_LEAST_OTHERS = 10  # words of a cwe list that are not common ones
Ints = NDArray[np.int64]


def stream_of(*parts: object) -> np.random.RandomState:
    """numpy's stream of `parts`, the legacy one, which no release changes."""
    digest = blake2b("/".join(map(str, parts)).encode("utf-8"), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))


@dataclass(frozen=True, slots=True)
class List:
    """What is asked of one sample, and the text around its list."""

    answers: tuple[str, ...]
    opening: str
    closing: str


class Table:
    """Texts as they come out after a space, end to end."""

    def __init__(self, splicer: Splicer, texts: Sequence[str]) -> None:
        self.texts = texts
        rows = splicer.units(texts)
        self.lengths: Ints = np.array([len(row) for row in rows], dtype=np.int64)
        self.starts: Ints = np.cumsum(self.lengths) - self.lengths
        self.ids: Ids = np.array([i for row in rows for i in row], dtype=np.int32)


def gathered(ids: Ids, starts: Ints, lengths: Ints) -> Ids:
    """Stretches of `ids`, one after another."""
    ends = np.cumsum(lengths)
    return np.asarray(ids[np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)])


class Joiner:
    """Ids of texts that are units joined by spaces, between an opening and a closing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.splicer = Splicer(tokenizer, " ")
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._checked = False

    @property
    def verified(self) -> bool:
        """Whether pieces were seen to join, so that the units in the middle need not be known as texts."""
        return self._checked and self.splicer.safe

    def ids(self, frame: List, units: Sequence[str], middle: Callable[[], Ids]) -> Ids:
        """Ids of opening, `units`, closing; `middle` gives those of all units but the first and the last."""
        if self.splicer.safe and len(units) > 1:
            head = self.bos + self.tokenizer.encode(frame.opening + units[0])
            tail = self.splicer.piece(" " + units[-1] + frame.closing)
            made = np.concatenate([np.array(head, np.int32), middle(), np.array(tail, np.int32)])
            if self._checked:
                return made
            whole = self.encoded(frame, units)
            self._checked = True
            self.splicer.safe = bool(np.array_equal(made, whole))
            return whole
        return self.encoded(frame, units)

    def encoded(self, frame: List, units: Sequence[str]) -> Ids:
        text = frame.opening + " ".join(units) + frame.closing
        return np.array(self.bos + self.tokenizer.encode(text), dtype=np.int32)

    def fixed(self, frame: List) -> int:
        """About how many tokens stand around the list."""
        return len(self.bos) + len(self.tokenizer.encode(frame.opening)) + len(self.tokenizer.encode(frame.closing))


@lru_cache(maxsize=4)
def _joiner(key: ByDigest) -> tuple[Joiner, Table, list[Table]]:
    """A tokenizer's joiner, the table of all words, and that of the numbers made so far."""
    joiner = Joiner(key.tokenizer)
    return joiner, Table(joiner.splicer, single_words()), []


class Common:
    """Fits cwe lists into windows of one length."""

    def __init__(self, tokenizer: Tokenizer, seed: int, length: int, budget: int) -> None:
        self.joiner, self.words, self._numbers = _joiner(ByDigest(tokenizer))
        self.seed, self.length, self.limit = seed, length, length - budget
        self.shape = length  # the one whose repeats are used
        if length >= cwe.LARGE and self._spare() < 0:
            self.shape = cwe.LARGE - 1

    def _spare(self) -> int:
        """Tokens to spare where the first sample has half as many words again as a list must have."""
        stream = stream_of(self.seed, cwe.NAME, 0)
        drawn = stream.permutation(len(self.words.texts))
        counts = np.repeat(cwe.repeats(self.shape), [cwe.COMMON, 2 * _LEAST_OTHERS])
        tokens = int((counts * self.words.lengths[drawn[: len(counts)]]).sum())
        frame = self._frame(stream, drawn)
        return self.limit - self.joiner.fixed(frame) - tokens - int(self._number_tokens(counts.cumsum()[-1:])[0])

    def numbers(self, count: int) -> Table:
        """The table of "1.", "2.", ... up to at least `count`."""
        if not self._numbers or len(self._numbers[0].texts) < count:
            size = 1 << max(count - 1, 1).bit_length()
            self._numbers[:] = [Table(self.joiner.splicer, [f"{i}." for i in range(1, size + 1)])]
        return self._numbers[0]

    def build(self, index: int) -> tuple[List, Ids, Callable[[], str]]:
        """Sample `index`: what it asks, the ids of its prompt, and its text."""
        stream = stream_of(self.seed, cwe.NAME, index)
        drawn = stream.permutation(len(self.words.texts))
        frame = self._frame(stream, drawn)
        room = self.limit - self.joiner.fixed(frame)
        order, ids = _fullest(
            self.limit, room, lambda tokens: self._order(drawn, tokens, index), partial(self._ids, frame)
        )
        return frame, ids, lambda: frame.opening + " ".join(self._units(order)) + frame.closing

    def _frame(self, stream: np.random.RandomState, drawn: Ints) -> List:
        size, common, others = cwe.example_shape(self.shape)
        shown = [self.words.texts[i] for i in drawn[-size:]]
        listed = shown[: cwe.COMMON] * common + shown[cwe.COMMON :] * others
        mixed = [listed[i] for i in stream.permutation(len(listed))]
        solved = f"{cwe.prompt(mixed)} {cwe.numbered(shown[: cwe.COMMON])}"
        answers = tuple(self.words.texts[i] for i in drawn[: cwe.COMMON])
        return List(answers, f"{solved}\n{cwe.INTRODUCTION}\n", f"\n{cwe.QUESTION}{cwe.ANSWER_PREFIX}")

    def _order(self, drawn: Ints, room: int, index: int) -> Ints:
        """Words by number, in the order of a list of about `room` tokens."""
        common, others = cwe.repeats(self.shape)
        lengths = self.words.lengths[drawn]
        scale = 1
        while True:
            counts = np.full(len(drawn), others * scale)
            counts[: cwe.COMMON] = common * scale
            entries = np.cumsum(counts)
            tokens = np.cumsum(counts * lengths) + self._number_tokens(entries)
            size = int(np.searchsorted(tokens, room, side="right"))
            if size < len(drawn):
                break
            scale += 1
        least = cwe.COMMON + _LEAST_OTHERS
        if size < least:
            need = int(tokens[least - 1]) - room + self.length
            raise UserError(
                f"length {self.length} is too short for {cwe.NAME} with this tokenizer: a solved list and"
                f" {least} words take about {need} tokens; use at least {need}"
            )
        left = room - int(tokens[size - 1])
        before, after = self._number_tokens(np.array([entries[size - 1], entries[size - 1] + 1]))
        part = min(left // max(int(lengths[size] + after - before), 1), int(counts[size]) - 1)
        listed = np.repeat(drawn[: size + 1], np.append(counts[:size], part))
        return np.asarray(listed[stream_of(self.seed, cwe.NAME, index, "order").permutation(len(listed))])

    def _number_tokens(self, entries: Ints) -> Ints:
        """Tokens of the first so many numbers."""
        table = self.numbers(int(entries[-1]) + 1)
        ends = np.append(0, table.starts + table.lengths)
        return np.asarray(ends[entries])

    def _units(self, order: Ints) -> list[str]:
        return [part for i, word in enumerate(order, start=1) for part in (f"{i}.", self.words.texts[word])]

    def _ids(self, frame: List, order: Ints) -> Ids:
        numbers, words = self.numbers(len(order)), self.words

        def middle() -> Ids:
            starts, lengths = np.empty(2 * len(order), np.int64), np.empty(2 * len(order), np.int64)
            starts[0::2], lengths[0::2] = numbers.starts[: len(order)], numbers.lengths[: len(order)]
            starts[1::2], lengths[1::2] = words.starts[order] + len(numbers.ids), words.lengths[order]
            return gathered(np.concatenate([numbers.ids, words.ids]), starts[1:-1], lengths[1:-1])

        units = ["1.", words.texts[order[-1]]] if self.joiner.verified else self._units(order)
        return self.joiner.ids(frame, units, middle)


def _fullest(limit: int, room: int, order: Callable[[int], Ints], ids: Callable[[Ints], Ids]) -> tuple[Ints, Ids]:
    """The order, and its ids, of the longest prompt found that is not above `limit`; a list takes `room` or so."""
    best: tuple[Ints, Ids] | None = None
    seen: dict[int, int] = {}  # entries of a list, and by how much its prompt misses the limit
    for _ in range(_TRIES):
        listed = order(room)
        if len(listed) in seen:
            if best is not None:
                break
            room += min(seen[len(listed)], -1)
            continue
        made = ids(listed)
        gap = seen[len(listed)] = limit - len(made)
        if gap >= 0 and (best is None or len(made) > len(best[1])):
            best = listed, made
        if 0 <= gap <= _CLOSE:
            break
        room += gap
    if best is None:
        raise UserError(f"no list fits {limit} tokens with this tokenizer")
    return best


class Frequent:
    """Fits fwe texts into windows of one length."""

    def __init__(self, tokenizer: Tokenizer, seed: int, length: int, budget: int) -> None:
        self.joiner = Joiner(tokenizer)
        self.seed, self.length, self.limit = seed, length, length - budget
        self.ranks = math.isqrt(length) + 8  # a word of a later rank never comes

    def build(self, index: int) -> tuple[List, Ids, Callable[[], str]]:
        """Sample `index`: what it asks, the ids of its prompt, and its text."""
        words: list[str] = []
        rng = rng_of(self.seed, fwe.NAME, index)
        while len(words) < self.ranks:
            new = fwe.coded(rng)
            words += [] if new in words else [new]
        table = Table(self.joiner.splicer, [fwe.DOTS, *words[1:]])
        frame = List(tuple(words[1:4]), fwe.INTRODUCTION, fwe.QUESTION + fwe.ANSWER_PREFIX)
        room = self.limit - self.joiner.fixed(frame)

        def order(tokens: int) -> Ints:
            return self._order(table, tokens, index)

        def ids(listed: Ints) -> Ids:
            def middle() -> Ids:
                return gathered(table.ids, table.starts[listed[1:-1]], table.lengths[listed[1:-1]])

            inner = [listed[0], listed[-1]] if self.joiner.verified else listed
            return self.joiner.ids(frame, [table.texts[i] for i in inner], middle)

        listed, made = _fullest(self.limit, room, order, ids)
        return frame, made, lambda: frame.opening + " ".join(table.texts[i] for i in listed) + frame.closing

    def _order(self, table: Table, room: int, index: int) -> Ints:
        """Ranks, in the order of a text of about `room` tokens."""

        def cost(total: int) -> int:
            return int((fwe.counts(total, self.ranks) * table.lengths).sum())

        low, high = 0, max(room, 0)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= room else (low, middle - 1)
        counts = fwe.counts(low, self.ranks)
        if not counts[1] > counts[2] > counts[3] > counts[4]:
            raise UserError(
                f"length {self.length} is too short for {fwe.NAME} with this tokenizer: three words cannot come most"
                f" often in {max(room, 0)} tokens; use at least {self.length + _MORE}"
            )
        counts[0] += (room - cost(low)) // max(int(table.lengths[0]), 1)
        listed = np.repeat(np.arange(self.ranks), counts)
        return np.asarray(listed[stream_of(self.seed, fwe.NAME, index, "order").permutation(len(listed))])
