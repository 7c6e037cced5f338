"""Token ids of long prompts without encoding them again: sentences are encoded once and joined as ids.

That is exact where no token reaches across the joint. At a space between two words, or at a line break, a tokenizer
can be shown never to do so: no entry of its vocabulary holds a non-space followed by a space (or one of the two
orders at a line break). Then every such place is a token boundary, and merges or a Viterbi path left of it know
nothing of what is right of it. Tokenizers that fail the test have their prompts encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from evalsuite.types import Ids, Prompt, Tokenizer
from gdn2.errors import DataError
from tasks.ruler.haystack import Haystack

_BATCH = 512  # sentences encoded at once
_MARK = "."  # stands for the text before a piece
_RAW_SPACES = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})  # as vocabularies without a decoder spell them
_seen: dict[str, set[tuple[str, str]]] = {}  # by tokenizer digest
_JOINTS = {(" ", "before"): r"\S ", ("\n", "before"): r"\S\n", ("\n", "after"): r"\n\S"}


class ByDigest:
    """A tokenizer as the key of a cache: equal to any of the same digest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return hash(self.tokenizer.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByDigest) and self.tokenizer.digest == other.tokenizer.digest


def _crossed(tokenizer: Tokenizer) -> set[tuple[str, str]]:
    """The joints that some entry of the vocabulary reaches across."""
    if tokenizer.digest in _seen:
        return _seen[tokenizer.digest]
    found: set[tuple[str, str]] = set()
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i]).translate(_RAW_SPACES)
        if len(text) > 1 and re.search(r"\S\s|\s\S", text):
            found |= {joint for joint, pattern in _JOINTS.items() if re.search(pattern, text)}
    _seen[tokenizer.digest] = found
    return found


class Splicer:
    """Encodes pieces of text as they come out in the middle of a text.

    `safe` is False where the tokenizer may join tokens across `separator`: pieces are then only good as estimates.
    `lead` and `trail` are what belongs to a piece of the separators around it.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        self.lead, self.trail = separator, ""
        crossed = _crossed(tokenizer)
        self.safe = (separator, "before") not in crossed
        if not self.safe and separator == "\n":
            self.lead, self.trail = "", separator
            self.safe = (separator, "after") not in crossed
        self._before = _MARK + self.trail
        self._skip = tokenizer.encode(self._before)
        self.safe = self.safe and self._cuts_cleanly()
        self.lead_tokens = len(self.piece(self.lead)) if self.lead == "\n" else 0  # a space is part of the next token
        self.head = lru_cache(maxsize=256)(tokenizer.encode)

    def _cuts_cleanly(self) -> bool:
        words = ["The", "one", "A", "7", "“If", "(x"]
        whole = self.tokenizer.encode(self.separator.join(words))
        first = self.tokenizer.encode(words[0] + self.trail)
        middle = self.pieces([self.lead + word + self.trail for word in words[1:-1]])
        last = self.pieces([self.lead + words[-1]])
        return whole == first + [i for piece in [*middle, *last] for i in piece] and self.safe

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it comes out after something else. Clears `safe` where that has no meaning."""
        skip = self._skip
        out = []
        for ids in self.tokenizer.encode_batch([self._before + text for text in texts]):
            if ids[: len(skip)] != skip:
                self.safe = False
            out.append(ids[len(skip) :])
        return out

    def piece(self, text: str) -> list[int]:
        return self.pieces([text])[0]

    def units(self, texts: Sequence[str]) -> list[list[int]]:
        """`pieces` of sentences or lines, with the separator that belongs to each."""
        return self.pieces([self.lead + text + self.trail for text in texts])


@lru_cache(maxsize=8)
def spaces(tokenizer: ByDigest) -> Splicer:
    """The splicer of a tokenizer at spaces."""
    return Splicer(tokenizer.tokenizer, " ")


def continued(tokenizer: Tokenizer, prompt: Prompt, text: str) -> Prompt:
    """`text`, which begins with a space, as it comes out after `prompt`, which does not end with one."""
    splicer = spaces(ByDigest(tokenizer))
    ids = splicer.piece(text)
    if not splicer.safe:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        whole = bos + tokenizer.encode(prompt.text + text)
        if whole[: len(prompt.ids)] == prompt.ids.tolist():
            ids = whole[len(prompt.ids) :]
    return Prompt(np.array(ids, dtype=np.int32), text)


class Stream:
    """A haystack's token ids, made as far as needed and kept. Sentence numbers have no end: a text repeats."""

    def __init__(self, haystack: Haystack, splicer: Splicer) -> None:
        self.haystack = haystack
        self.splicer = splicer
        self._texts: list[str] = []
        self._ids = np.empty(1 << 12, dtype=np.int32)
        self._ends = np.zeros(1, dtype=np.int64)  # [sentences + 1] tokens before each sentence

    def _grow(self, count: int) -> None:
        """Have at least `count` sentences, or the whole text."""
        if self.haystack.size is not None:
            count = min(count, self.haystack.size)
        while (have := len(self._ends) - 1) < count:
            upto = have + _BATCH
            if self.haystack.size is not None:
                upto = min(upto, self.haystack.size)
            texts = [self.haystack.sentence(i) for i in range(have, upto)]
            new = self.splicer.units(texts)
            ends = self._ends[-1] + np.cumsum([len(ids) for ids in new])
            if ends[-1] > len(self._ids):
                grown = np.empty(max(2 * len(self._ids), int(ends[-1])), dtype=np.int32)
                grown[: self._ends[-1]] = self._ids[: self._ends[-1]]
                self._ids = grown
            if not ends[-1]:
                raise DataError(f"haystack {self.haystack.name}: this tokenizer makes no token of its text")
            self._ids[self._ends[-1] : ends[-1]] = [i for ids in new for i in ids]
            self._ends = np.concatenate([self._ends, ends])
            self._texts += texts

    def tokens_before(self, sentence: int) -> int:
        """Tokens of sentences 0 .. sentence - 1."""
        self._grow(sentence)
        size = self.haystack.size
        if size is None or sentence <= size:
            return int(self._ends[sentence])
        rounds, rest = divmod(sentence, size)
        return rounds * int(self._ends[size]) + int(self._ends[rest])

    def fitting(self, start: int, tokens: int) -> int:
        """The largest number of whole sentences from `start` on that takes at most `tokens` tokens."""
        goal = self.tokens_before(start) + max(tokens, 0)
        size = self.haystack.size
        while self._ends[-1] <= goal and (size is None or len(self._ends) <= size):
            self._grow(len(self._ends) - 1 + _BATCH)
        if size is None or self._ends[-1] > goal:
            return int(np.searchsorted(self._ends, goal, side="right")) - 1 - start
        rounds, rest = divmod(goal, int(self._ends[size]))
        return rounds * size + int(np.searchsorted(self._ends, rest, side="right")) - 1 - start

    def texts(self, start: int, stop: int) -> list[str]:
        """Sentences start .. stop - 1."""
        self._grow(stop)
        have = self._texts
        return have[start:stop] if stop <= len(have) else [have[i % len(have)] for i in range(start, stop)]

    def take(self, start: int, stop: int) -> list[Ids]:
        """Ids of sentences start .. stop - 1, in runs."""
        self._grow(stop)
        size = self.haystack.size or stop
        out = []
        while start < stop:
            first = start % size
            last = min(first + stop - start, size)
            run = self._ids[self._ends[first] : self._ends[last]]
            rounds = 1 if first else max((stop - start) // size, 1)
            out.append(np.tile(run, rounds) if rounds > 1 else run)
            start += (last - first) * rounds
        return out
