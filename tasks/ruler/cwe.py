"""RULER's common words: a numbered list in which ten words come more often than the others.

    Below is a numbered list of words. In these words, some appear more often than others. ...
    1. lamp 2. quiet 3. harbor 4. lamp ...
    Question: What are the 10 most common words in the above list?

A shorter solved list stands before it. Every string is part of the benchmark.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from gdn2 import env
from gdn2.errors import DataError
from tasks.ruler import search
from tasks.ruler.search import Draft, Job, Made
from tasks.ruler.words import single_words

NAME, BUDGET = "cwe", 120
COMMON = 10
INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often."
)
QUESTION = "Question: What are the 10 most common words in the above list?"
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
LARGE = 4096  # tokens from which words come more often
_PROBE = 4096  # words of the probe that a bisection starts with
_MORE_WORDS = "english_words.json"


def repeats(length: int) -> tuple[int, int]:
    """How often a common word and another come in a list for `length` tokens."""
    return (30, 3) if length >= LARGE else (6, 1)


def example_shape(length: int) -> tuple[int, int, int]:
    """Words of the solved list, and how often a common one and another come."""
    return (40, 10, 3) if length >= LARGE else (20, 3, 1)


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def prompt(words: Sequence[str]) -> str:
    return f"{INTRODUCTION}\n{numbered(words)}\n{QUESTION}{ANSWER_PREFIX}"


@lru_cache(maxsize=1)
def _more_words() -> list[str]:
    """The long list NVIDIA's main branch turns to where a prompt needs more words than wonderwords has."""
    path = env.cache_dir() / _MORE_WORDS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DataError(
            f"cwe at this length needs RULER's {_MORE_WORDS} (in its repository, 8.6 MB): put it at {path}, or use"
            " profile exact"
        )
    return [str(word) for word in found.values()]


class _Source:
    search_extra = sample_extra = 0
    step = 10

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rng = job.rng()
        self.words = single_words()
        shuffles = random.Random(job.shuffle_seed)
        shuffles.shuffle(self.words)
        self._persistent = shuffles  # lm-eval's one stream of shuffles
        self.most: int | None = len(self.words)

    def first_probe(self) -> tuple[int, int]:
        return _PROBE, 2

    def _list(self, size: int, common: int, others: int) -> tuple[list[str], list[str]]:
        """A shuffled list of `size` words, and the common ones."""
        source = self.words if size <= len(self.words) or not self.job.bisects else _more_words()
        drawn = self.rng.sample(source, size)
        frequent = drawn[:COMMON]
        out = frequent * common + drawn[COMMON:] * others
        shuffles = self._persistent if self.job.harness else random.Random(self.job.shuffle_seed)
        shuffles.shuffle(out)
        return out, frequent

    def draft(self, size: int, index: int) -> Draft:
        if size < COMMON:  # upstream writes a list of no words, whose answers nobody can score
            raise ValueError(f"{size} words hold no {COMMON} common ones")
        solved, answer = self._list(*example_shape(self.job.length))
        asked, frequent = self._list(size, *repeats(self.job.length))
        joint = " " if self.job.bisects else ""  # forgotten before June 2025
        example = prompt(solved) + joint + numbered(answer)
        text = prompt(asked)
        if self.job.harness:  # made and counted in the search, and never put in the prompt
            return Draft(text, tuple(frequent), more={"input_example": example})
        return Draft(f"{example}\n{text}", tuple(frequent))

    def probe(self, size: int) -> str:
        draft = self.draft(size, 0)
        if self.job.bisects:
            return draft.text
        before = f"{draft.more['input_example']}\n" if self.job.harness else ""
        return f"{before}{draft.text} {numbered(draft.answers)}"

    def finish(self, draft: Draft) -> Draft:
        return draft


def compatible(job: Job) -> Iterator[Made]:
    """Samples of a profile that reproduces another generator, without end."""
    return search.generate(job, _Source(job), ANSWER_PREFIX, joint="\n\n")
