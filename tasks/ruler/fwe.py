"""RULER's frequent words: coded text in which the word of rank r comes about r to the minus two as often as the first.

    Read the following coded text and track the frequency of each coded word. ...
    ... qpzldk ... wmxnre qpzldk ...
    What are the three most frequently appeared words in the above coded text?

The first rank is the dots; the answer is ranks two to four. Every string is part of the benchmark.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.ruler import search
from tasks.ruler.search import Draft, Job, Made

NAME, BUDGET = "fwe", 50
DOTS = "..."
INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word."
    " Find the three most frequently appeared coded words. "
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
LETTERS = 6
_ZETA = math.pi**2 / 6  # of two, the exponent of the law


def counts(total: int, ranks: int) -> NDArray[np.int64]:
    """How often each rank comes in a text of about `total` words."""
    share = np.arange(1, ranks + 1) ** -2.0
    return np.asarray((total * share / _ZETA).astype(np.int64))


def coded(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=LETTERS))


def vocabulary(rng: random.Random, size: int) -> list[str]:
    """`size` different coded words, sorted."""
    words = [coded(rng) for _ in range(size)]
    while len(set(words)) < size:
        words.append(coded(rng))
    return sorted(set(words))


class _Source:
    def __init__(self, job: Job) -> None:
        self.job, self.rng = job, job.rng()
        self.limit = job.length - job.budget if job.bisects else job.length  # what a text may take
        self.step = self.limit // 32

    def words(self) -> list[str]:
        words = vocabulary(self.rng, self.limit // 50)
        random.Random(self.job.shuffle_seed).shuffle(words)
        if len(words) < 4:
            raise self.job.too_short(256)
        words[0] = DOTS
        return words

    def text(self, words: Sequence[str], total: int) -> str:
        rows = zip(words, counts(total, len(words)).tolist(), strict=True)
        out = [word for word, count in rows for _ in range(count)]
        random.Random(self.job.shuffle_seed).shuffle(out)
        return f"{INTRODUCTION}{' '.join(out)}{QUESTION}{ANSWER_PREFIX}"

    def search(self) -> int:
        words, total = self.words(), self.limit // LETTERS
        while self.job.tokens(self.text(words, total)) < self.limit:
            total += self.step
        return total - self.step

    def draft(self, total: int) -> tuple[Draft, int]:
        """A sample, and its tokens."""
        words = self.words()
        while True:
            text = self.text(words, total)
            tokens = self.job.tokens(text)
            if tokens <= self.limit:
                return Draft(text, tuple(words[1:4])), tokens
            if total <= 0:
                raise self.job.too_short(tokens + self.job.budget)
            total -= self.step


def compatible(job: Job) -> Iterator[Made]:
    """Samples of a profile that reproduces another generator, without end."""
    source = _Source(job)
    total = source.search()
    if total <= 0:
        raise job.too_short(None)
    index = 0
    while True:
        draft, tokens = source.draft(total)
        yield search.written(job, draft, ANSWER_PREFIX, index, tokens + job.budget)
        index += 1
