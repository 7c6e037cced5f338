"""Retrieval episodes for training: RULER's NIAH prompts with their answers, in the exact wording of the evaluation.

An episode is BOS, the prompt (instruction, haystack with needles, question, answer prefix), the answer " VALUE.",
and then either EOS or a further question about the same context. Each question draws its needle anew, whatever was
asked before: were every needle asked once, a model could answer by elimination and never look at a key. Restated
needles are the densest form of the same lesson: needles alone, then one of them at a time, drawn anew, said again.
Training uses the keys and values that `held_out` leaves to it and the train split of the procedural English; held-out
episodes use the other half of both. A document is a pure function of (mixture, split, seed, index).

Axes: T tokens of one document.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gdn2.errors import UserError
from tasks.ruler.english import Corpus, Split
from tasks.ruler.templates import NIAH_TASKS, NOISE, Niah
from tasks.ruler.words import draw, held_out

RESTATED = ("restated", "restated_uuid")
KINDS = ("noise", "essay", "uuid", "text", *RESTATED)
POOL = 1 << 15  # sentences from which one stream takes its haystacks

# The single-needle tasks.
_WORDING: dict[str, Niah] = dict(zip(("noise", "essay", "uuid"), NIAH_TASKS, strict=False))
_WORDING |= {"restated": _WORDING["essay"], "restated_uuid": _WORDING["uuid"]}

TRIES = 20  # of drawing keys and values that fit a length

Ids = NDArray[np.int32]
Document = tuple[Ids, NDArray[np.float32]]
Part = tuple[Sequence[int] | Ids, bool]  # tokens, and whether they are an answer


class Encoder(Protocol):
    """The part of a tokenizer that episodes need. EOS also serves as BOS."""

    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Mixture:
    """What the episodes of one curriculum stage look like.

    Args:
        kinds: relative frequency of each of `KINDS`: noise and essay haystacks with numbers, essays with uuids, plain
            text without a needle, and needles without a haystack, restated to the end.
        length: shortest and longest document in tokens; lengths are drawn log-uniformly between them.
        needles: fewest and most needles of a haystack.
        questions: fewest and most questions about it; fewer where the length leaves no room.
        text_weight: loss weight of every token that is not part of an answer; answers have weight 1.
        bare: share of documents without instruction and question, which keep haystack and answer prefix.
    """

    kinds: Mapping[str, float]
    length: tuple[int, int]
    needles: tuple[int, int] = (1, 1)
    questions: tuple[int, int] = (1, 1)
    text_weight: float = 0.1
    bare: float = 0.0

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or min(self.kinds.values()) < 0 or not 0 < sum(self.kinds.values()) < math.inf:
            raise UserError(f"kinds {dict(self.kinds)} must give finite weights >= 0 to some of {', '.join(KINDS)}")
        for name in ("length", "needles", "questions"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise UserError(f"{name} [{low}, {high}] must be two rising whole numbers from 1")
        if not 0 <= self.text_weight < 1:
            raise UserError(f"text_weight {self.text_weight} must lie in [0, 1): answers have weight 1")
        if not 0 <= self.bare <= 1:
            raise UserError(f"bare {self.bare} must lie in [0, 1]: it is a share of the documents")


class EpisodeStream:
    """Documents number 0, 1, 2, ... of one mixture."""

    def __init__(self, tokenizer: Encoder, mixture: Mixture, seed: int, split: Split = "train") -> None:
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end-of-text token, which ends every episode")
        self._tokenizer, self._mixture, self._seed, self._split = tokenizer, mixture, seed, split
        self._ids = lru_cache(maxsize=1 << 12)(tokenizer.encode)  # most pieces of an episode are the same in all
        self._eos = tokenizer.eos_id
        # Seed 0 of the eval split is the default haystack of the evaluation: stay away from it.
        self._corpus = Corpus(split, seed=1 + seed % 1023)
        self._noise_line = np.array(tokenizer.encode("\n" + NOISE), dtype=np.int32)
        self._space = np.array(tokenizer.encode(" "), dtype=np.int32)
        # The pool: sentences with the space before them, end to end, and where each starts.
        self._pool, self._starts = np.empty(0, np.int32), np.zeros(1, np.int64)
        if set(mixture.kinds) - {"noise", *RESTATED}:
            rows = tokenizer.encode_batch([" " + self._corpus.sentence(i) for i in range(POOL)])
            self._pool = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
            self._starts = np.cumsum([0, *map(len, rows)])
            if mixture.length[1] * 2 > len(self._pool):
                raise UserError(f"length {mixture.length[1]} is more than half a pool of {len(self._pool)} tokens")

    def document(self, index: int) -> Document:
        """Ids int32 [T] and loss weights fp32 [T] (of each token as the target; 0 at BOS) of document `index`."""
        rng = random.Random(f"{self._seed}/{self._split}/{index}")
        mixture = self._mixture
        kind = rng.choices(list(mixture.kinds), list(mixture.kinds.values()))[0]
        low, high = mixture.length
        length = min(high, round(low * math.exp(rng.random() * math.log(high / low))))
        if kind == "text":
            return self._text(rng, length)
        n_needles, n_questions = rng.randint(*mixture.needles), rng.randint(*mixture.questions)
        if kind in RESTATED:
            return self._restated(rng, kind, length, n_needles)
        bare = rng.random() < mixture.bare
        for _ in range(TRIES):
            document = self._episode(rng, kind, length, (n_needles, n_questions), bare)
            if len(document[0]) <= high:
                return document
            n_needles, n_questions = max(1, n_needles - 1), max(1, n_questions - 1)
        raise UserError(f"length {high} is too short: {kind} episodes take {len(document[0])} tokens")

    def _text(self, rng: random.Random, length: int) -> Document:
        _, sentences = self._sentences(rng, length - 2)
        ids = np.concatenate([[self._eos], *sentences, [self._eos]], dtype=np.int32)
        weights = np.full(len(ids), self._mixture.text_weight, dtype=np.float32)
        weights[0] = 0
        return ids, weights

    def _episode(self, rng: random.Random, kind: str, length: int, counts: tuple[int, int], bare: bool) -> Document:
        """One episode of (needles, questions), at most `length` tokens long; more only where the haystack is empty."""
        task = _WORDING[kind]
        keys = self._draw(rng, task.key, counts[0])
        values = self._draw(rng, task.value, counts[0])
        asked = [rng.randrange(counts[0]) for _ in range(counts[1])]
        lines = task.separator == "\n"  # the newline after the introduction then goes with the first line
        head = [] if bare else self._ids(task.introduction + ("" if lines else "\n"))
        needles = [self._needle(task, *pair) for pair in zip(keys, values, strict=True)]
        questions = [self._question(task, keys[j], bare) for j in asked]
        answers = [self._answer(values[j]) for j in asked]
        room = length - 3 - len(head) - sum(map(len, chain(needles, questions, answers)))
        hay = self._noise_hay(rng, room, needles) if lines else self._essay_hay(rng, room, needles)
        parts: list[Part] = [(head, False), *((part, False) for part in hay)]
        for question, answer in zip(questions, answers, strict=True):
            parts += [(question, False), (answer, True)]
        return self._joined(parts)

    def _restated(self, rng: random.Random, kind: str, length: int, n_needles: int) -> Document:
        """Needles, then one at a time again while `length` has room, as a needle or as a bare question's answer."""
        task = _WORDING[kind]
        keys = self._draw(rng, task.key, n_needles)
        values = self._draw(rng, task.value, n_needles)
        parts: list[Part] = [(self._needle(task, *pair), False) for pair in zip(keys, values, strict=True)]
        room = length - 2 - sum(len(part) for part, _ in parts)
        while True:
            j = rng.randrange(n_needles)
            again = self._stem(task, keys[j]) if rng.random() < 0.5 else self._question(task, keys[j], bare=True)
            answer = self._answer(values[j])
            room -= len(again) + len(answer)
            if room < 0:
                return self._joined(parts)
            parts += [(again, False), (answer, True)]

    def _joined(self, parts: Sequence[Part]) -> Document:
        """BOS, the parts, EOS; tokens of a part marked true weigh 1."""
        around = [self._eos]
        ids = np.concatenate([around, *(part for part, _ in parts), around]).astype(np.int32)
        weights = np.full(len(ids), self._mixture.text_weight, dtype=np.float32)
        weights[0], at = 0, 1
        for part, answer in parts:
            if answer:
                weights[at : at + len(part)] = 1
            at += len(part)
        return ids, weights

    def _draw(self, rng: random.Random, kind: str, n: int) -> list[str]:
        """`n` different keys or values of this split."""
        wanted = self._split == "eval"
        out: dict[str, None] = {}
        while len(out) < n:
            out[draw(kind, rng, lambda text: held_out(text) == wanted)] = None
        return list(out)

    # Needles and questions are made of pieces cut before a space: each has the same ids there as alone.

    def _needle(self, task: Niah, key: str, value: str) -> list[int]:
        """Ids of a needle, with the separator before it."""
        return self._stem(task, key) + self._answer(value)

    def _stem(self, task: Niah, key: str) -> list[int]:
        before, after = task.needle("|", "|").split("|")[:2]
        return self._around(task.separator + before, key, after.rstrip())

    def _question(self, task: Niah, key: str, bare: bool) -> list[int]:
        """Ids of the question and the answer's beginning, or of that alone, on a new line."""
        before, after = task.answer_prefix("|").split("|")
        if bare:
            return self._around("\n" + before, key, after)
        first, between = task.question("|").split("|")
        return self._around("\n" + first, key, f"{between} {before}".rstrip()) + self._around("", key, after)

    def _around(self, before: str, key: str, after: str) -> list[int]:
        return [*self._ids(before.removesuffix(" ")), *self._ids(" " + key), *self._ids(after)]

    def _answer(self, value: str) -> list[int]:
        return self._tokenizer.encode(f" {value}.")

    def _noise_hay(self, rng: random.Random, room: int, needles: list[list[int]]) -> list[Ids]:
        """Lines of noise with a needle before some of them, none after the last."""
        n, width = max(room, 0) // len(self._noise_line), len(self._noise_line)
        noise = np.tile(self._noise_line, n)
        return _insert(noise, [at * width for at in _positions(rng, max(n, 1), len(needles))], needles)

    def _essay_hay(self, rng: random.Random, room: int, needles: list[list[int]]) -> list[Ids]:
        """Sentences with a needle before some of them or after the last; as in RULER, a space then ends the text."""
        first, sentences = self._sentences(rng, room)
        n = len(sentences)
        positions = _positions(rng, n + 1, len(needles))
        if n and positions[0] == 0:
            sentences[0] = self._pool[self._starts[first] : self._starts[first + 1]]
        offsets = np.minimum(np.cumsum([0, *map(len, sentences)]), max(room, 0))
        body = np.concatenate([*sentences, np.empty(0, np.int32)])[: offsets[-1]]
        end = [self._space] if positions[-1] == n else []
        return _insert(body, [int(offsets[at]) for at in positions], needles) + end

    def _sentences(self, rng: random.Random, room: int) -> tuple[int, list[Ids]]:
        """A random run of sentences filling `room` tokens, the first without its space; and the number of the first.

        As in RULER the last sentence may be cut short. No sentence where the first does not fit.
        """
        last = int(np.searchsorted(self._starts, self._starts[-1] - max(room, 0))) - 1
        first = rng.randrange(max(last, 1))
        bare = np.array(self._tokenizer.encode(self._corpus.sentence(first)), dtype=np.int32)
        if len(bare) > room:
            return first, []
        begin = self._starts[first + 1]
        end = begin + room - len(bare)
        cuts = self._starts[first + 2 : np.searchsorted(self._starts, end)]
        return first, [bare, *np.split(self._pool[begin:end], cuts - begin)]


def _positions(rng: random.Random, n: int, k: int) -> list[int]:
    """`k` rising positions in [0, n), distinct where there is room."""
    return sorted(rng.sample(range(n), k) if k <= n else rng.choices(range(n), k=k))


def _insert(body: Ids, offsets: Sequence[int], needles: list[list[int]]) -> list[Ids]:
    """`body` cut at the rising token `offsets`, a needle in each cut."""
    pieces = np.split(body, offsets)
    out = [pieces[0]]
    for needle, piece in zip(needles, pieces[1:], strict=True):
        out += [np.array(needle, dtype=np.int32), piece]
    return out


class JsonTokenizer:
    """A tokenizer.json whose only special token is `<|endoftext|>`."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True  # such a string inside a text is text
        self.eos_id: int | None = self._tokenizer.token_to_id("<|endoftext|>")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Batches here are mostly short; one at a time also keeps a worker on its core.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def open_episodes(tokenizer: Path, mixture: Mapping[str, object], seed: int, split: Split) -> EpisodeStream:
    """The episode stream of a tokenizer.json and the fields of a `Mixture`: what a training worker opens."""
    return EpisodeStream(JsonTokenizer(tokenizer), Mixture(**mixture), seed, split)  # type: ignore[arg-type]
