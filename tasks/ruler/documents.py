"""The question tasks in profile `exact`: documents that fill the window.

Rules: sample i is question i of the file, and its number is its id; a question whose documents do not fit the window
is left out. The documents that answer it stand at a depth that a golden-ratio sequence spreads evenly; around them
distractors in an order of the sample's own, of the same article first, whole as long as they fit. One more is cut at a
word, so that the window is met to the word; a rest too small for a document's heading and a word stays empty.

Prompts are joined from ids at spaces: after "Document", and after each document's first word.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np

from evalsuite.types import Ids, Tokenizer
from gdn2.errors import UserError
from tasks.ruler import qa
from tasks.ruler.exact import GOLDEN
from tasks.ruler.haystack import rng_of
from tasks.ruler.splice import Splicer

_TRIES = 64
_MARGIN = 400  # tokens around the documents, as a rule


class Library:
    """Documents and their ids, each encoded when first used."""

    def __init__(self, tokenizer: Tokenizer, corpus: qa.Corpus) -> None:
        self.tokenizer, self.corpus = tokenizer, corpus
        self.splicer = Splicer(tokenizer, " ")
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.start = self.bos + tokenizer.encode(f"{qa.OPENING}Document")
        self.checked = False
        self._rest: dict[int, Ids] = {}
        self.piece = lru_cache(maxsize=1 << 16)(self.splicer.piece)

    def rest(self, document: int) -> Ids:
        """Ids of what follows a document's first word, and the mark of the next document."""
        if document not in self._rest:
            _, space, rest = self.corpus.documents[document].partition(" ")
            self._rest[document] = np.array(self.splicer.piece(f"{space}{rest}\n\nDocument"), dtype=np.int32)
        return self._rest[document]

    def front(self, number: int, document: int) -> list[int]:
        """Ids of a document's number and first word."""
        return self.piece(f" {number}:\n{self.corpus.documents[document].partition(' ')[0]}")

    def size(self, number: int, document: int) -> int:
        """Tokens a whole document takes as the one with this number."""
        return len(self.front(number, document)) + len(self.rest(document))


def _closing(question: qa.Question) -> str:
    return qa.closing(question.query) + qa.ANSWER_PREFIX


class Shelf:
    """Fits questions and documents into windows of one length."""

    def __init__(self, library: Library, name: str, seed: int, length: int, budget: int) -> None:
        self.library, self.name, self.seed, self.length = library, name, seed, length
        self.limit = length - budget
        self._front = lru_cache(maxsize=2)(self._fronted)

    def fits(self, index: int) -> bool:
        """Whether the documents of question `index` leave room in the window."""
        question = self.library.corpus.questions[index]
        given = sum(self.library.size(n, document) for n, document in enumerate(question.needed, start=1))
        # Estimates mislead for odd tokenizers only, and by less than a few tokens a document.
        if given + 2 * _MARGIN < self.limit:
            return True
        return given <= self.limit and len(self._ids(question.needed, [], _closing(question))) <= self.limit

    def build(self, index: int) -> tuple[float, Ids, Callable[[], str]]:
        """Depth of a document that answers, ids of the prompt, and its text. Raises UserError where nothing fits."""
        library, question = self.library, self.library.corpus.questions[index]
        depth = (rng_of(self.seed, self.name, "depth").random() + index * GOLDEN) % 1.0
        room = self.limit - len(library.start) - len(library.splicer.piece(_closing(question)))
        room -= sum(library.size(n, document) for n, document in enumerate(question.needed, start=1))
        for _ in range(_TRIES):
            rng = rng_of(self.seed, self.name, index)
            others, last = self._distractors(question, rng, room)
            whole = self._placed(question, others, depth, rng)
            ids = self._ids(whole, [], _closing(question))
            if len(ids) <= self.limit:
                words, ids = self._filled(question, whole, last, ids)
                return depth, ids, partial(self._text, whole, words, _closing(question))
            room -= max(len(ids) - self.limit, room // 8)
        raise UserError(f"length {self.length} is too short for sample {index} of {self.name}")

    def _distractors(self, question: qa.Question, rng: random.Random, room: int) -> tuple[list[int], int | None]:
        """Whole documents for about `room` tokens, and the one after them, to be cut."""
        library = self.library
        near = list(dict.fromkeys(i for i in (*question.given, *question.related) if i not in question.needed))
        rng.shuffle(near)
        taken: list[int] = []
        known = {*question.needed, *near}
        number = len(question.needed) + 1
        for document in self._all(near, known, rng.getrandbits(32)):
            size = library.size(number, document)
            if size > room:
                return taken, document
            taken.append(document)
            room -= size
            number += 1
        return taken, None

    def _all(self, near: list[int], known: set[int], seed: int) -> Iterator[int]:
        """Distractors without end: the near ones, then the others, then all of them again."""
        order = np.random.RandomState(seed).permutation(len(self.library.corpus.documents)).tolist()
        while near or len(known) < len(order):
            yield from near
            yield from (document for document in order if document not in known)

    def _placed(self, question: qa.Question, others: list[int], depth: float, rng: random.Random) -> list[int]:
        needed = list(question.needed)
        rng.shuffle(needed)
        out = list(others)
        out.insert(round(depth * len(others)), needed[0])
        for document in needed[1:]:
            out.insert(rng.randint(0, len(out)), document)
        return out

    def _filled(
        self, question: qa.Question, whole: Sequence[int], last: int | None, bare: Ids
    ) -> tuple[list[str], Ids]:
        """As many words of `last` after the whole documents as fit, and the ids with them; `bare` is without."""
        words = [] if last is None else self.library.corpus.documents[last].split(" ")
        best, used, low, high = bare, 0, 1, len(words)
        while low <= high and len(best) < self.limit:
            middle = (low + high) // 2
            made = self._ids(whole, words[:middle], _closing(question))
            if len(made) <= self.limit:
                used, best, low = middle, made, middle + 1
            else:
                high = middle - 1
        return words[:used], best

    def _text(self, whole: Sequence[int], words: Sequence[str], closing: str) -> str:
        texts = [self.library.corpus.documents[i] for i in whole] + ([" ".join(words)] if words else [])
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, start=1))
        return f"{qa.OPENING}{context}{closing}"

    def _ids(self, whole: Sequence[int], words: Sequence[str], closing: str) -> Ids:
        library = self.library
        if library.splicer.safe:
            made = self._joined(whole, words, closing)
            if library.checked:
                return made
        encoded = np.array(library.bos + library.tokenizer.encode(self._text(whole, words, closing)), dtype=np.int32)
        if library.splicer.safe:
            library.checked = True
            library.splicer.safe = bool(np.array_equal(made, encoded))
        return encoded

    def _fronted(self, documents: tuple[int, ...]) -> Ids:
        """Ids of the prompt up to the number of the document after these."""
        library = self.library
        parts: list[Ids | list[int]] = [library.start]
        for number, document in enumerate(documents, start=1):
            parts += [library.front(number, document), library.rest(document)]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])

    def _joined(self, whole: Sequence[int], words: Sequence[str], closing: str) -> Ids:
        library = self.library
        parts: list[Ids | list[int]] = [self._front(tuple(whole if words else whole[:-1]))]
        number = len(whole) + bool(words)
        text = " ".join(words) if words else library.corpus.documents[whole[-1]]
        first, space, rest = text.partition(" ")
        if space:
            parts += [library.piece(f" {number}:\n{first}"), library.splicer.piece(f" {rest}{closing}")]
        else:
            parts.append(library.splicer.piece(f" {number}:\n{first}{closing}"))
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
