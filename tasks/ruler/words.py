"""Random keys and values of RULER's needles: adjective-noun pairs, seven-digit numbers, UUIDs.

Upstream draws words with `random.choice` from the sorted list of all adjective-noun pairs of wonderwords, 6.2 million
strings. Here the list is arithmetic: it is adjective-major, but for a few adjectives that continue one another (`high`
and `high-pitched`), whose pairs interleave and are sorted together.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import overload
from uuid import UUID

from gdn2.errors import DataError

# sha256 of the lists of wonderwords 3.0.1 as shipped; other versions give other keys for the same seed.
LIST_DIGESTS = {
    "adjectivelist.txt": "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
    "nounlist.txt": "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
}
VERBS = ("verblist.txt", "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad")
KINDS = ("numbers", "words", "uuids")
PATTERNS = {
    "numbers": re.compile(r"\d{2,}"),
    "words": re.compile(r"[A-Za-z]+-[A-Za-z]+"),
    "uuids": re.compile(r"[0-9a-f]{6,8}-[0-9a-f]{2,4}", re.IGNORECASE),
}


class WordPairs(Sequence[str]):
    """The sorted, de-duplicated `adjective-noun` pairs as a sequence that is never materialised."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._families = _families(sorted(set(adjectives)))
        self._starts = [0]  # of each family, counted in adjectives
        for family in self._families:
            self._starts.append(self._starts[-1] + len(family))
        self._of_adjective = [j for j, family in enumerate(self._families) for _ in family]
        self._sorted: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return len(self._of_adjective) * len(self._nouns)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        adjective, noun = divmod(index % len(self), len(self._nouns))
        j = self._of_adjective[adjective]
        family = self._families[j]
        if len(family) == 1:
            return f"{family[0]}-{self._nouns[noun]}"
        if j not in self._sorted:
            self._sorted[j] = sorted(f"{a}-{n}" for a in family for n in self._nouns)
        return self._sorted[j][(adjective - self._starts[j]) * len(self._nouns) + noun]


def _families(adjectives: list[str]) -> list[list[str]]:
    """Adjectives in the order of their pairs; those whose pairs interleave (`a`, `a-b`) share a family."""
    families: list[list[str]] = []
    for adjective in sorted(adjectives, key=lambda a: a + "-"):
        if families and adjective.startswith(families[-1][0] + "-"):
            families[-1].append(adjective)
        else:
            families.append([adjective])
    return families


@lru_cache(maxsize=1)
def word_pairs() -> WordPairs:
    """Pairs of wonderwords 3.0.1. Raises DataError where another version is installed."""
    return WordPairs(*(_listed(*pair) for pair in LIST_DIGESTS.items()))


def single_words() -> list[str]:
    """Nouns, adjectives and verbs of wonderwords 3.0.1, sorted, each once: a new list."""
    return sorted({word for pair in (*LIST_DIGESTS.items(), VERBS) for word in _listed(*pair)})


def _listed(name: str, digest: str) -> list[str]:
    # Found, not imported: its import reads the lists in the locale's encoding, which may not be theirs.
    spec = find_spec("wonderwords")
    assert spec is not None and spec.submodule_search_locations
    data = (Path(spec.submodule_search_locations[0]) / "assets" / name).read_bytes()
    if sha256(data).hexdigest() != digest:
        raise DataError(f"{name} of wonderwords is not that of 3.0.1, so keys would differ: install 3.0.1")
    return [line.rstrip() for line in data.decode("utf-8").splitlines()]


def number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def word(rng: random.Random) -> str:
    return rng.choice(word_pairs())


def uuid(rng: random.Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


DRAW: dict[str, Callable[[random.Random], str]] = {"numbers": number, "words": word, "uuids": uuid}


def _class(text: str) -> int:
    return blake2b(text.encode("utf-8"), digest_size=1).digest()[0]


def held_out(text: str) -> bool:
    """Whether a key or value belongs to evaluation. Training episodes use the others only."""
    return _class(text) % 2 == 0


def filler(text: str) -> bool:
    """Of the evaluation half, whether `text` may stand in the lines of a haystack made of needles.

    What is asked about comes from the other quarter, so that no line of such a haystack can repeat it.
    """
    return _class(text) % 4 == 2


def draw(kind: str, rng: random.Random, accept: Callable[[str], bool]) -> str:
    """The first draw of `kind` that `accept` takes."""
    while True:
        text = DRAW[kind](rng)
        if accept(text):
            return text
