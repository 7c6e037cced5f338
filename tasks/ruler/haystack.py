"""What needles are hidden in: English sentences, a repeated line, or other needles.

`exact` reads a haystack as numbered sentences without end; the compatible profiles read it as one text.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

from gdn2.errors import DataError
from tasks.ruler import essays
from tasks.ruler.english import Corpus
from tasks.ruler.templates import NOISE, Niah
from tasks.ruler.words import draw, filler

MAX_WORDS = 64  # of a sentence: longer ones are cut, so that depth stays fine-grained in texts without full stops
MAX_CHARS = 256  # of a word: longer ones are cut, so that any text can be trimmed
_BUNDLED_TEXT = 20_000  # sentences of the bundled corpus that stand for it where a text must end
_END = re.compile(r"""[.!?…。！？]["'”’)\]»]*$""")
_ABBREVIATION = re.compile(r"""["'“‘(\[]*(?:[A-Za-z]|Mr|Mrs|Ms|Dr|St|Prof|Rev|Gen|vs|etc|e\.g|i\.e|No|vol|pp)\.$""")
_SUSPECT = re.compile(r"[-\d]")


class Haystack(Protocol):
    """Sentences by number, from 0 without end."""

    name: str
    digest: str  # sha256 of what defines it

    @property
    def size(self) -> int | None:
        """Sentences before it repeats; None never does."""

    def sentence(self, i: int) -> str:
        """Sentence i, with single spaces and no line break."""

    def contains(self, value: str) -> bool:
        """Whether a key or value, or the telling part of it, occurs anywhere in the haystack."""

    def text(self) -> str:
        """All of it, as the compatible profiles read it."""


def split_sentences(text: str) -> list[str]:
    """Sentences of any text: whitespace collapsed, sentences of at most MAX_WORDS words of at most MAX_CHARS."""
    out: list[str] = []
    current: list[str] = []
    for word in _bounded(text.split()):
        current.append(word)
        if len(current) == MAX_WORDS or (_END.search(word) and not _ABBREVIATION.match(word)):
            out.append(" ".join(current))
            current = []
    return [*out, " ".join(current)] if current else out


def _bounded(words: Iterable[str]) -> Iterable[str]:
    for word in words:
        if len(word) <= MAX_CHARS:
            yield word
        else:
            yield from (word[i : i + MAX_CHARS] for i in range(0, len(word), MAX_CHARS))


class TextHaystack:
    """A text of the user's, repeated where it is too short."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._text = text
        self.digest = sha256(text.encode("utf-8")).hexdigest()

    @cached_property
    def _sentences(self) -> list[str]:
        return split_sentences(self._text)

    @property
    def size(self) -> int | None:
        return len(self._sentences)

    @cached_property
    def _suspects(self) -> str:
        # Keys and values hold a hyphen or digits, so only such words can be confused with them.
        return " ".join(filter(_SUSPECT.search, self._text.split()))

    def sentence(self, i: int) -> str:
        return self._sentences[i % len(self._sentences)]

    def contains(self, value: str) -> bool:
        return any(part in self._suspects for part in filter(_SUSPECT.search, value.split()))

    def text(self) -> str:
        return self._text


class BundledHaystack:
    """The procedural English that ships with the package: unlimited, never repeats, evaluation half."""

    name = "bundled"
    size: int | None = None

    def __init__(self) -> None:
        self._corpus = Corpus(split="eval")
        self.digest = self._corpus.digest

    def sentence(self, i: int) -> str:
        return self._corpus.sentence(i)

    def contains(self, value: str) -> bool:
        """Never: its words are of letters only, and keys and values have a hyphen or digits."""
        return False

    def text(self) -> str:
        return " ".join(self.sentence(i) for i in range(_BUNDLED_TEXT))


class NoiseHaystack:
    """RULER's one line of noise, again and again."""

    name = "noise"
    size: int | None = 1

    def __init__(self) -> None:
        self.digest = sha256(NOISE.encode()).hexdigest()

    def sentence(self, i: int) -> str:
        return NOISE

    def contains(self, value: str) -> bool:
        return False

    def text(self) -> str:
        return NOISE


class NeedleHaystack:
    """Lines that are needles themselves, with keys and values no question asks for; line i of (seed, task, i)."""

    size: int | None = None

    def __init__(self, task: Niah, seed: int) -> None:
        self.name = "needle"
        self._task = task
        self._seed = seed
        self._pairs: list[tuple[str, str]] = []
        self.digest = sha256(f"{task.name}/{seed}".encode()).hexdigest()

    def pair(self, i: int) -> tuple[str, str]:
        """Key and value of line i."""
        while len(self._pairs) <= i:
            rng = rng_of(self._seed, self._task.name, "line", len(self._pairs))
            self._pairs.append((draw(self._task.key, rng, filler), draw(self._task.value, rng, filler)))
        return self._pairs[i]

    def sentence(self, i: int) -> str:
        return self._task.needle(*self.pair(i))

    def contains(self, value: str) -> bool:
        return filler(value)

    def text(self) -> str:
        return ""


def rng_of(*parts: object) -> random.Random:
    """A random stream of its own for `parts`, the same on every machine."""
    name = "/".join(str(part) for part in parts)
    return random.Random(int.from_bytes(blake2b(name.encode("utf-8"), digest_size=16).digest(), "big"))


def load_haystack(source: str) -> Haystack:
    """Haystack of the essay tasks: `bundled`, `essays` (downloaded before), a text file, or a directory of .txt files.

    A .json file is read as upstream's, an object with the text under "text". Raises DataError, naming file and byte.
    """
    if source == "bundled":
        return _bundled()
    if not source.strip():
        raise DataError(f"haystack {source!r} is no name: give bundled, essays, a file or a directory")
    path = essays.find() if source == "essays" else Path(source)
    try:
        if path.is_dir():
            files = sorted((file for file in path.glob("*.txt") if file.is_file()), key=lambda file: file.name)
        else:
            files = [path]
        found = [file.stat() for file in files]
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"haystack {source!r}: {what}; give bundled, essays, a file or a directory") from error
    if not files:
        raise DataError(f"haystack {source!r}: no .txt file in this directory")
    if not all(S_ISREG(one.st_mode) for one in found):
        raise DataError(f"haystack {source!r} is neither a file nor a directory")
    return _from_files(source, tuple(files), tuple((one.st_size, one.st_mtime_ns) for one in found))


@lru_cache(maxsize=1)
def _bundled() -> BundledHaystack:
    return BundledHaystack()


@lru_cache(maxsize=4)
def _from_files(name: str, files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> TextHaystack:
    text = "\n".join(_read(file) for file in files)
    if not text.strip():
        size = sum(stamp[0] for stamp in stamps)
        raise DataError(f"haystack {name!r}: {size} bytes but not a word to hide a needle in")
    return TextHaystack(name, text)


def _read(file: Path) -> str:
    name = repr(str(file))
    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
        if file.suffix != ".json":
            return text.removeprefix("\ufeff")
        found = json.loads(text)
    except OSError as error:
        raise DataError(f"haystack {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        at = f"byte {error.start} (0x{data[error.start]:02x})"
        raise DataError(f"haystack {name}: {at} is not UTF-8; convert the file") from error
    except ValueError as error:
        raise DataError(f"haystack {name} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise DataError(f'haystack {name}: expected an object with the text under "text"')
    content = str(found["text"])
    if surrogate := re.search("[\ud800-\udfff]", content):
        raise DataError(f"haystack {name}: character {surrogate.start()} of the text is half a surrogate pair")
    return content
