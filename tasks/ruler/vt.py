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
from dataclasses import dataclass

import numpy as np

from gdn2.errors import UserError
from tasks.ruler import search
from tasks.ruler.exact import Needle, Question
from tasks.ruler.haystack import rng_of
from tasks.ruler.search import Draft, Job, Made
from tasks.ruler.templates import NOISE

NAME, BUDGET = "vt", 30
HOPS = 4
INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."
EXAMPLE_LENGTH, EXAMPLE_STEP = 500, 5
LONG = 2048  # tokens of a window whose example has as many lines as RULER's, in profile `exact`
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
    try:
        size = search.bisect(short, maker) if job.bisects else search.climb(short, maker)
        example, _ = search.fitted(short, maker, size, 0)
    except UserError:
        raise UserError(
            f"the solved example of {job.name} in profile {job.profile} takes more than {EXAMPLE_LENGTH} tokens with"
            " this tokenizer, at any length: use profile exact"
        ) from None
    source = _Source(job, rng, numbers, example)
    return search.generate(job, source, answer_prefix("")[:-1])


@dataclass(frozen=True, slots=True)
class Chain(Question):
    """A question of profile `exact`; its needles are the statements, in the order of the chain."""

    example: str = ""


@dataclass(frozen=True, slots=True)
class ChainWording:
    """In profile `exact`: RULER's words, without the spaces at the ends of statements and of the answer's beginning."""

    name: str = NAME
    haystack: str = "noise"

    def needle(self, key: str, value: str) -> str:
        return f"VAR {key} = {value}"

    def opening(self, question: Question) -> str:
        assert isinstance(question, Chain)
        return f"{question.example}\n\n{INTRODUCTION}\n\n"

    def closing(self, question: Question) -> str:
        (value,) = question.queries
        return f"\n{_asked(value)}"


def _asked(value: str) -> str:
    return f"{question(value)}{answer_prefix(value).rstrip()}"


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str, list[str]]:
    """Names of a chain, its value, its statements."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        new = name(rng, letters)
        names += [] if new in names else [new]
    value = str(rng.randint(10000, 99998))
    sides = [value, *(f"VAR {old}" for old in names[:-1])]
    return names, value, [ChainWording().needle(*pair) for pair in zip(names, sides, strict=True)]


def ask(seed: int, index: int, length: int) -> Chain:
    """Sample `index` of a window of `length` tokens, before any tokenizer has a say."""
    rng = rng_of(seed, NAME, index)
    names, value, _ = _chain(rng, 5)
    depths = sorted(rng.random() for _ in names)
    sides = [value, *(f"VAR {old}" for old in names[:-1])]
    solved, number, lines = _chain(rng, 3)
    lines_of_noise = 15 if length >= LONG else 5
    places = sorted(rng.sample(range(lines_of_noise), len(lines)))
    example = [NOISE] * lines_of_noise
    for j, (place, line) in enumerate(zip(places, lines, strict=True)):
        example.insert(place + j, line)
    shown = "\n".join([f"{INTRODUCTION}\n", *example, f"{_asked(number)} {' '.join(solved)}"])
    needles = tuple(Needle(*row) for row in zip(names, sides, depths, strict=True))
    return Chain(needles, (value,), tuple(names), 0, shown)
