"""RULER's variable tracking: one value handed along a chain of five variables, hidden among lines of noise.

    VAR PQZRT = 48213
    ...
    VAR KWMFA = VAR PQZRT
    ...
    Question: Find all variables that are assigned the value 48213 in the text above.

A solved example of three-letter names stands before the question. Every string is part of the benchmark.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

import numpy as np

from tasks.ruler import search
from tasks.ruler.search import Draft, Job, Made
from tasks.ruler.templates import NOISE

NAME, BUDGET = "vt", 30
HOPS = 4
INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."
EXAMPLE_LENGTH, EXAMPLE_STEP = 500, 5
_TASK = INTRODUCTION + "\n\n{context}\n{question}"
_PLACEHOLDER = "12345"  # the example's value in NVIDIA's main branch, until it is replaced
_LAST_TEN = "they are: "  # where the older generators look for the names of the example


def question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def answer_prefix(value: str, typo: bool = False) -> str:
    """The answer's beginning with the space before it; `typo` as spelt until May 2025 and in lm-eval."""
    assigned = "assgined" if typo else "assigned"
    return (
        " Answer: According to the chain(s) of variable assignment in the text above,"
        f" {HOPS + 1} variables are {assigned} the value {value}, they are: "
    )


def name(rng: random.Random, letters: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=letters))


class _Source:
    """Draws chains. `example` None makes the example itself."""

    most: int | None = None

    def __init__(self, job: Job, rng: random.Random, numbers: np.random.RandomState, example: Draft | None) -> None:
        self.job, self.rng, self.numbers = job, rng, numbers
        self.letters = 3 if example is None else 5
        self.step = EXAMPLE_STEP if example is None else 5 if job.bisects and job.length < 4096 else 10
        self.example = ""
        self.search_extra = self.sample_extra = 0
        if example is not None:
            self.example = f"{example.text} {' '.join(example.answers)}" + ("\n" if job.bisects else "\n\n")
            self.search_extra = job.tokens(self.example)
            self.sample_extra = 0 if job.bisects else self.search_extra

    def first_probe(self) -> tuple[int, int]:
        return self.step, 3

    def probe(self, size: int) -> str:
        while True:
            try:
                draft = self.draft(size, 0)
            except ValueError:
                if size < HOPS + 1:
                    raise self.job.too_short(None) from None
                continue  # a name drawn twice; upstream stops with an error here
            return draft.text if self.job.bisects else f"{draft.text} {list(draft.answers)}"

    def draft(self, size: int, index: int) -> Draft:
        count = HOPS + 1
        names = [name(self.rng, self.letters) for _ in range(count)]
        while len(set(names)) < count:
            names.append(name(self.rng, self.letters))
        value = self._value()
        if len(names) > count:
            self._value()  # upstream begins a second chain, fails for lack of names, and draws anew
            raise ValueError("a name was drawn twice")
        return self._placed(size, names, value)

    def _value(self) -> str:
        fixed = self.job.bisects and not self.example
        return _PLACEHOLDER if fixed else str(self.numbers.randint(10000, 99999))

    def _placed(self, size: int, names: list[str], value: str) -> Draft:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
        lines = [NOISE if self.job.bisects else NOISE + "\n"] * size
        if not self.job.bisects and len(lines) <= len(chain):
            lines = [part + "." if part.strip() else part for line in lines for part in line.split(".")]
        places = sorted(self.rng.sample(range(len(lines)), len(chain)))
        for j, (place, statement) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + j, statement)
        context = ("\n" if self.job.bisects else " ").join(lines).replace(". \n", ".\n")
        text = _TASK.format(context=context, question=question(value))
        return Draft(text + answer_prefix(value, typo=not self.job.bisects), tuple(names))

    def finish(self, draft: Draft) -> Draft:
        """Put the example before the question, under names of its own."""
        if not self.example:
            return draft
        example = self.example
        main = self.job.bisects
        names = example.split()[-HOPS - 1 :] if main else example.partition(_LAST_TEN)[2].split()
        for old in names:
            example = example.replace(old, name(self.rng, len(old)))
        if main:
            example = example.replace(_PLACEHOLDER, str(self.numbers.randint(10000, 99999)))
        return Draft(example + ("\n" if main else "\n\n") + draft.text, draft.answers)


def compatible(job: Job) -> Iterator[Made]:
    """Samples of a profile that reproduces another generator, without end."""
    rng, numbers = job.rng(), np.random.RandomState(job.seeds[1])
    # The newer generator keeps no room for an answer to the example.
    short = Job(job.name, job.profile, EXAMPLE_LENGTH, job.tokenizer, job.seed, 0 if job.bisects else BUDGET)
    maker = _Source(short, rng, numbers, None)
    size = search.bisect(short, maker) if job.bisects else search.climb(short, maker)
    example, _ = search.fitted(short, maker, size, 0)
    source = _Source(job, rng, numbers, example)
    return search.generate(job, source, answer_prefix("")[:-1])
