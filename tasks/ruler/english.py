"""Procedural English: an unlimited supply of sentences no two of which are equal, made from our own word lists.

It is the default haystack of RULER's essay tasks and the plain text of the zoo's training data. Sentences are
random access: number i is computed, not stored.

Why no sentence appears twice, within a split or across the splits:

1. A four-round Feistel network permutes the 2**42 sentence numbers of a split; the low six bits of the result choose
   one of the 64 templates, the other 36 bits and the split (as the lowest bit) make a number n < 2**37.
2. Every template has a capacity C >= 2**37 (the product of its lists' sizes), and n -> n * m mod C with m coprime to C
   is one to one. Its digits in the mixed radix of the template's lists choose the entries. So (template, entries) is
   one to one in (split, i).
3. All entries of a list have the same number of words, so in one template different entries give different words at
   a fixed position; and any two templates of equally many words have a position at which no word of the one is a word
   of the other (`Template.positions`; a test checks all pairs). So different (template, entries) are different strings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import gcd, prod
from pathlib import Path
from typing import Literal

Split = Literal["train", "eval"]

N_SENTENCES = 2**42  # of a split and a seed
SEED_STRIDE = 2**32  # seeds start this many sentences apart

_HALF_BITS = 21
_HALF = (1 << _HALF_BITS) - 1
_ROUND_KEYS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
_TEMPLATE_BITS = 6
_FILES = ("english_words.txt", "english_templates.txt")
_SLOT = re.compile(r"\{(a:|\^)?(\w+)\}")


@dataclass(frozen=True)
class Template:
    """A sentence with slots. `literals` surround the slots: one more than `slots`."""

    literals: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    capacity: int
    multiplier: int

    def fill(self, number: int) -> str:
        """The sentence of `number`, 0 <= number < capacity."""
        rest = number * self.multiplier % self.capacity
        parts = [self.literals[0]]
        for words, literal in zip(self.slots, self.literals[1:], strict=True):
            rest, digit = divmod(rest, len(words))
            parts.append(words[digit])
            parts.append(literal)
        return "".join(parts)

    def positions(self) -> list[frozenset[str]]:
        """For each word position of the sentence, the words that can stand there, punctuation included."""
        columns = [[literal] for literal in self.literals[:1]]
        for words, literal in zip(self.slots, self.literals[1:], strict=True):
            columns += [list(words), [literal]]
        out: list[set[str]] = [{""}]
        for choices in columns:
            split = [choice.split(" ") for choice in choices]
            joined = {end + words[0] for end in out[-1] for words in split}
            out[-1:] = [joined, *({words[j] for words in split} for j in range(1, len(split[0])))]
        return [frozenset(words) for words in out]


def article(noun_phrase: str) -> str:
    """`noun_phrase` with "a" or "an" in front."""
    vowel = noun_phrase[0] in "aeiou" and not noun_phrase.startswith(("use", "uni", "eu", "one"))
    return ("an " if vowel or noun_phrase.startswith(("honest", "honour", "hour", "heir")) else "a ") + noun_phrase


def _lines(file: str) -> list[str]:
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@lru_cache(maxsize=1)
def word_lists() -> dict[str, tuple[str, ...]]:
    """The word lists by name."""
    bodies: dict[str, list[str]] = {}
    for line in _lines(_FILES[0]):
        if line.startswith("["):
            current = bodies.setdefault(line.strip("[]"), [])
        else:
            current.append(line)
    return {name: tuple(re.split(r",\s+", " ".join(body).rstrip(", "))) for name, body in bodies.items()}


def _parse(line: str) -> Template:
    lists = word_lists()
    slots = []
    for how, name in _SLOT.findall(line):
        words = lists[name]
        if how == "a:":
            words = tuple(article(word) for word in words)
        elif how == "^":
            words = tuple(word[0].upper() + word[1:] for word in words)
        slots.append(words)
    capacity = prod(len(words) for words in slots)
    multiplier = int(capacity * 0.6180339887498949) | 1
    while gcd(multiplier, capacity) != 1:
        multiplier += 2
    return Template(tuple(_SLOT.sub("\0", line).split("\0")), tuple(slots), capacity, multiplier)


@lru_cache(maxsize=1)
def templates() -> tuple[Template, ...]:
    """The sentence templates, in order."""
    out = tuple(_parse(line) for line in _lines(_FILES[1]))
    assert len(out) == 1 << _TEMPLATE_BITS, len(out)
    return out


def _permute(index: int) -> int:
    """A bijection of [0, 2**42) that scatters neighbours."""
    left, right = index >> _HALF_BITS, index & _HALF
    for key in _ROUND_KEYS:
        left, right = right, left ^ ((((right + key) * key) & 0xFFFFFFFFFFFFFFFF) >> 43)
    return left << _HALF_BITS | right


class Corpus:
    """The sentences of one split, in an order of their own for each seed.

    Seeds s and s + 1 start 2**32 sentences apart, so the first 2**32 sentences of any 1024 consecutive seeds are
    disjoint. "train" and "eval" never share a sentence, whatever the seeds.
    """

    def __init__(self, split: Split, seed: int = 0) -> None:
        if split not in ("train", "eval"):
            raise ValueError(f"split must be train or eval, got {split!r}")
        self.split, self.seed = split, seed
        self._bit = int(split == "eval")
        self._start = seed * SEED_STRIDE % N_SENTENCES
        self._templates: Sequence[Template] = templates()

    @property
    def digest(self) -> str:
        """sha256 of everything the sentences depend on."""
        return corpus_digest(self.split, self.seed)

    def sentence(self, i: int) -> str:
        """Sentence i, 0 <= i < 2**42: different for every i. Raises IndexError outside."""
        if not 0 <= i < N_SENTENCES:
            raise IndexError(f"sentence {i} is not in [0, 2**42)")
        number = _permute((i + self._start) % N_SENTENCES)
        template = self._templates[number & (1 << _TEMPLATE_BITS) - 1]
        return template.fill(number >> _TEMPLATE_BITS << 1 | self._bit)


def corpus_digest(split: Split, seed: int) -> str:
    """sha256 over the word lists, the templates, the constants of the permutation, the split and the seed."""
    hasher = sha256()
    for file in _FILES:
        hasher.update("\n".join(_lines(file)).encode() + b"\0")
    hasher.update(repr((_ROUND_KEYS, SEED_STRIDE, split, seed)).encode())
    return hasher.hexdigest()
