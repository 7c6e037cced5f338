"""The wording of RULER's needle-in-a-haystack tasks (Hsieh et al. 2024, arXiv:2404.06654), and what the eight ask.

Every string here is part of the benchmark: a changed character makes another benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HIDDEN = (
    "{some} special magic {kind} {be} hidden within the following text."
    " Make sure to memorize it. I will quiz you about the {kind} afterwards."
)
_QUESTION = "What {ask} the special magic {kind} for {query} mentioned in the provided text?"
_PREFIX = "The special magic {kind} for {query} mentioned in the provided text {be}"


@dataclass(frozen=True, slots=True)
class Niah:
    """One of RULER's eight needle tasks. Numbers of keys, of values a key, of keys asked for."""

    name: str
    haystack: Literal["noise", "essay", "needle"]
    key: Literal["words", "uuids"]
    value: Literal["numbers", "uuids"]
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def one(self) -> bool:
        """Whether a single value is asked for: the wording is then in the singular."""
        return self.values * self.queries == 1

    @property
    def kind(self) -> str:
        return self.value[:-1] if self.one else self.value

    @property
    def separator(self) -> str:
        """What stands between two sentences or lines of the haystack."""
        return " " if self.haystack == "essay" else "\n"

    @property
    def introduction(self) -> str:
        some, be = ("A", "is") if self.one else ("Some", "are")
        return _HIDDEN.format(some=some, kind=self.kind, be=be)

    def needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def question(self, query: str) -> str:
        return _QUESTION.format(ask="is" if self.one else "are all", kind=self.kind, query=query)

    def answer_prefix(self, query: str) -> str:
        """Start of the answer, part of the prompt, without a leading space."""
        return _PREFIX.format(kind=self.kind, query=query, be="is" if self.one else "are")


def query_of(keys: Sequence[str]) -> str:
    """The keys asked for, as the question lists them."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


NIAH_TASKS = (
    Niah("niah_single_1", "noise", "words", "numbers"),
    Niah("niah_single_2", "essay", "words", "numbers"),
    Niah("niah_single_3", "essay", "words", "uuids"),
    Niah("niah_multikey_1", "essay", "words", "numbers", keys=4),
    Niah("niah_multikey_2", "needle", "words", "numbers"),
    Niah("niah_multikey_3", "needle", "uuids", "uuids"),
    Niah("niah_multivalue", "essay", "words", "numbers", values=4),
    Niah("niah_multiquery", "essay", "words", "numbers", keys=4, queries=4),
)
