"""RULER's needle tasks at an exact length: prompt (BOS counted) and generation budget fill the window to the token.

Differences from the generators RULER came with, all on purpose: every sample has a random stream of its own, named
by (seed, task, number), so it asks for the same key and value at the same depth whatever the model, tokenizer,
length or process count; depths follow a golden-ratio sequence, evenly spread over any first n samples; the length
is met within `SLACK` tokens by cutting the last sentence short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from evalsuite.types import Ids, Tokenizer
from gdn2.errors import UserError
from tasks.ruler.haystack import Haystack, NeedleHaystack, rng_of
from tasks.ruler.splice import Splicer, Stream
from tasks.ruler.templates import NOISE, Niah, query_of
from tasks.ruler.words import draw, filler, held_out

SLACK = 8  # tokens a prompt may stay below its window
GOLDEN = 0.6180339887498949
_OFFSETS = 20_000  # sentences among which a random offset is drawn
_POOL = 4096  # lines among which the window of a needle haystack starts
_TRIES = 16
_CHECKED = 5000  # samples whose shortest prompt is measured where the length is small
_STEPS = 4096  # words tried one by one: some tokenizers make no token of a word
_NOISE_LINES = 64  # lines of noise to fill up a haystack of needles with
Unit = str | tuple[int, int]  # one needle or partial sentence; or a run of sentences


@dataclass(frozen=True, slots=True)
class Needle:
    key: str
    value: str
    depth: float  # 0..1 of the haystack


@dataclass(frozen=True, slots=True)
class Question:
    """What a sample asks, before any tokenizer has a say."""

    needles: tuple[Needle, ...]  # the first is that of the first answer
    queries: tuple[str, ...]
    answers: tuple[str, ...]
    offset: int  # first sentence of the haystack


class Wording(Protocol):
    """What surrounds the haystack, and what a needle says."""

    @property
    def name(self) -> str: ...
    @property
    def haystack(self) -> str: ...
    def needle(self, key: str, value: str) -> str: ...
    def opening(self, question: Question) -> str:
        """What stands before the haystack, line break included."""

    def closing(self, question: Question) -> str:
        """What stands after it."""


@dataclass(frozen=True, slots=True)
class NiahWording:
    """Of a needle task."""

    task: Niah

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def haystack(self) -> str:
        return self.task.haystack

    def needle(self, key: str, value: str) -> str:
        return self.task.needle(key, value)

    def opening(self, question: Question) -> str:
        return self.task.introduction + "\n"

    def closing(self, question: Question) -> str:
        query = query_of(question.queries)
        return f"\n{self.task.question(query)} {self.task.answer_prefix(query)}"


@dataclass(frozen=True, slots=True)
class Built:
    """A sample's prompt."""

    ids: Ids  # BOS included
    units: tuple[Unit, ...]
    needles: tuple[tuple[str, str], ...]  # (key, value) in the order of the text, lines of a needle haystack included
    position: int  # index in `ids` where the first answer's needle starts


def ask(task: Niah, seed: int, index: int, haystack: Haystack, offset: int | None) -> Question:
    """Draw sample `index`. `offset` None draws the haystack's first sentence, too."""
    rng = rng_of(seed, task.name, index)

    def free(text: str) -> bool:
        return held_out(text) and text not in used and not haystack.contains(text)

    def asked(text: str) -> bool:
        return held_out(text) and not filler(text)

    used: set[str] = set()
    accept = asked if task.haystack == "needle" else free
    keys = []
    values = []
    for _ in range(task.keys):
        keys.append(draw(task.key, rng, accept))
        used.add(keys[-1])
        values.append([draw(task.value, rng, accept) for _ in range(task.values)])
        used.update(values[-1])
    chosen = rng.sample(range(task.keys), task.queries)
    start = rng_of(seed, task.name, "depth").random()
    depths = [(start + index * GOLDEN) % 1.0] + [rng.random() for _ in range(task.keys * task.values - 1)]
    order = chosen + [j for j in range(task.keys) if j not in chosen]
    pairs = [(keys[j], value) for j in order for value in values[j]]
    if task.haystack == "needle":
        offset = rng.randrange(_POOL)
    elif offset is None:
        offset = rng.randrange(min(haystack.size or _OFFSETS, _OFFSETS))
    return Question(
        needles=tuple(Needle(key, value, d) for (key, value), d in zip(pairs, depths, strict=True)),
        queries=tuple(keys[j] for j in chosen),
        answers=tuple(value for j in chosen for value in values[j]),
        offset=offset,
    )


class Filler:
    """Fits prompts of one task into windows of one length."""

    def __init__(self, task: Wording, tokenizer: Tokenizer, stream: Stream, length: int, budget: int) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.stream = stream
        self.length = length
        self.budget = budget
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._verified = False
        self._words: dict[int, tuple[list[str], list[int]]] = {}

    @property
    def splicer(self) -> Splicer:
        return self.stream.splicer

    def needle(self, needle: Needle) -> str:
        return self.task.needle(needle.key, needle.value)

    def smallest(self, questions: Sequence[Question]) -> int:
        """Tokens of the longest of the shortest prompts, generation budget included."""
        texts = [
            self.task.opening(q) + self.splicer.separator.join(map(self.needle, q.needles)) + self.task.closing(q)
            for q in questions
        ]
        return max(map(len, self.tokenizer.encode_batch(texts))) + len(self.bos) + self.budget

    def check(self, questions: Callable[[int], Question], count: int) -> None:
        """Refuse a length that some of the first `count` samples cannot meet."""
        if count == 0:
            return
        # Samples differ by the length of their keys only; far above the first one's need none can fail.
        if self.smallest([questions(0)]) * 2 + 64 < self.length:
            return
        need = self.smallest([questions(i) for i in range(min(count, _CHECKED))])
        if need > self.length:
            raise UserError(
                f"length {self.length} is too short for {self.task.name} with this tokenizer: needle, question and"
                f" {self.budget} tokens to generate take {need}; use at least {need} or a smaller budget"
            )

    def build(self, question: Question) -> Built:
        """The fullest prompt found that is not above the window. At most SLACK below it but for odd tokenizers."""
        built = _Fit(self, question).run()
        if not self._verified:
            self._verified = True
            if self.splicer.safe and built.ids.tolist() != self.bos + self.tokenizer.encode(
                self.text(question, built.units)
            ):
                self.splicer.safe = False
                built = _Fit(self, question).run()
        return built

    def again(self, built: Built, asked: Question, question: Question) -> Ids:
        """Ids of the context that was built for `asked` with another question about it."""
        tail = built.units[-1] if isinstance(built.units[-1], str) else self.stream.texts(*built.units[-1])[-1]
        splicer = self.splicer
        if splicer.safe and len(built.units) > 1:
            old, new = splicer.pieces([splicer.lead + tail + self.task.closing(one) for one in (asked, question)])
            return np.concatenate([built.ids[: -len(old)], np.array(new, dtype=np.int32)])
        return np.array(self.bos + self.tokenizer.encode(self.text(question, built.units)), dtype=np.int32)

    def text(self, question: Question, units: Sequence[Unit]) -> str:
        parts: list[str] = []
        for unit in units:
            parts += [unit] if isinstance(unit, str) else self.stream.texts(*unit)
        return self.task.opening(question) + self.splicer.separator.join(parts) + self.task.closing(question)

    def rest_words(self, sentence: int) -> tuple[list[str], list[int]]:
        """Words that can follow the last whole sentence, and how many tokens the first 1, 2, ... of them take."""
        noise = self.task.haystack == "needle"  # a line of needles cut short would be a riddle
        key = -1 if noise else sentence % (self.stream.haystack.size or sentence + 1)
        if key not in self._words:
            words = (" ".join([NOISE] * _NOISE_LINES) if noise else self.stream.haystack.sentence(sentence)).split(" ")
            ids = self.tokenizer.encode_batch([f". {word}" for word in words])
            mark = len(self.tokenizer.encode("."))
            counts = np.cumsum([len(one) - mark for one in ids])
            self._words[key] = (words, counts.tolist())
        return self._words[key]


class _Fit:
    """The search for the last word of one prompt."""

    def __init__(self, filler: Filler, question: Question) -> None:
        self.f = filler
        self.q = question
        self.limit = filler.length - filler.budget
        self.opening = filler.task.opening(question)
        self.closing = filler.task.closing(question)
        self.needles = [filler.needle(needle) for needle in question.needles]
        self.base = filler.stream.tokens_before(question.offset)

    @cached_property
    def needle_ids(self) -> dict[str, list[int]]:
        return dict(zip(self.needles, self.f.splicer.units(self.needles), strict=True))

    def run(self) -> Built:
        fixed = len(self.f.bos) + len(self.f.splicer.head(self.opening)) + len(self.f.tokenizer.encode(self.closing))
        estimate = self.limit - fixed - sum(map(len, self.needle_ids.values()))
        best: tuple[int, int, int, Built] | None = None  # gap, whole sentences, words, prompt
        seen: set[tuple[int, int]] = set()
        for _ in range(_TRIES):
            whole, words, taken = self._guess(estimate)
            if (whole, words) in seen:
                break
            seen.add((whole, words))
            built = self._assemble(whole, self._partial(whole, words))
            gap = self.limit - len(built.ids)
            if gap >= 0 and (best is None or gap < best[0]):
                best = gap, whole, words, built
            if 0 <= gap <= SLACK:
                break
            estimate = taken + gap
        if best is None:
            best = self._shrink(whole, words)
        return best[3] if best[0] <= SLACK else self._extend(*best[1:])

    def _shrink(self, whole: int, words: int) -> tuple[int, int, int, Built]:
        """Fewer and fewer words until the prompt fits, which it does without any (`Filler.check`)."""
        while True:
            built = self._assemble(whole, self._partial(whole, words))
            if len(built.ids) <= self.limit:
                return self.limit - len(built.ids), whole, words, built
            if not whole and not words:
                raise UserError(f"length {self.f.length} is too short for a sample of {self.f.task.name}")
            if words:
                words -= 1
            else:
                whole -= 1
                words = len(self.f.rest_words(self.q.offset + whole)[0]) - 1

    def _extend(self, whole: int, words: int, built: Built) -> Built:
        """Word after word as long as they fit, for tokenizers whose estimates mislead; then part of the next word."""
        for _ in range(_STEPS):
            if self.limit - len(built.ids) <= SLACK:
                break
            following = self.f.rest_words(self.q.offset + whole)[0]
            if words == len(following):
                whole, words = whole + 1, 0
                continue
            tried = self._assemble(whole, self._partial(whole, words + 1))
            if len(tried.ids) > self.limit:
                return self._letters(self._partial(whole, words), whole, following[words], built)
            words, built = words + 1, tried
        return built

    def _letters(self, stem: str, whole: int, word: str, built: Built) -> Built:
        """As much of `word` after `stem` as fits, where all of it takes more than SLACK tokens."""
        low, high = 1, len(word)
        while low <= high:
            middle = (low + high) // 2
            tried = self._assemble(whole, f"{stem} {word[:middle]}".strip())
            if len(tried.ids) <= self.limit:
                low, built = middle + 1, max(built, tried, key=lambda one: len(one.ids))
            else:
                high = middle - 1
        return built

    def _guess(self, tokens: int) -> tuple[int, int, int]:
        """Whole sentences and words after them that take about `tokens` tokens, and how many they do take."""
        stream, offset = self.f.stream, self.q.offset
        whole = stream.fitting(offset, tokens)
        taken = stream.tokens_before(offset + whole) - self.base
        counts = self.f.rest_words(offset + whole)[1]
        words = int(np.searchsorted(counts, max(tokens - taken, 0), side="right"))
        return whole, words, taken + (counts[words - 1] if words else 0)

    def _partial(self, whole: int, words: int) -> str:
        return " ".join(self.f.rest_words(self.q.offset + whole)[0][:words])

    def _places(self, whole: int) -> list[tuple[int, int]]:
        """(sentence boundary, needle) in the order of the text."""
        stream, offset = self.f.stream, self.q.offset
        total = stream.tokens_before(offset + whole) - self.base
        out = []
        for j, needle in enumerate(self.q.needles):
            goal = needle.depth * total
            place = min(stream.fitting(offset, int(goal)), whole)
            if place < whole:
                before, after = (stream.tokens_before(offset + place + d) - self.base for d in (0, 1))
                place += goal - before > after - goal
            out.append((place, j))
        return sorted(out, key=lambda pair: (pair[0], self.q.needles[pair[1]].depth))

    def _assemble(self, whole: int, partial: str) -> Built:
        offset = self.q.offset
        units: list[Unit] = []
        pairs: list[tuple[str, str]] = []
        lines = self.f.stream.haystack if isinstance(self.f.stream.haystack, NeedleHaystack) else None
        last = 0
        first_answer = 0
        for place, j in [*self._places(whole), (whole, -1)]:
            if place > last:
                units.append((offset + last, offset + place))
                if lines is not None:
                    pairs += map(lines.pair, range(offset + last, offset + place))
            last = place
            if j >= 0:
                first_answer = len(units) if j == 0 else first_answer
                units.append(self.needles[j])
                pairs.append((self.q.needles[j].key, self.q.needles[j].value))
        if partial:
            units.append(partial)
        ids, starts = self._spliced(units) if self.f.splicer.safe else self._encoded(units, first_answer)
        return Built(ids, tuple(units), tuple(pairs), starts[first_answer])

    def _spliced(self, units: Sequence[Unit]) -> tuple[Ids, list[int]]:
        """Ids of the prompt, and the index at which each unit starts."""
        f, s = self.f, self.f.splicer
        sentence = f.stream.haystack.sentence
        rest = list(units)
        first = rest.pop(0)
        if isinstance(first, tuple):
            if first[0] + 1 < first[1]:
                rest.insert(0, (first[0] + 1, first[1]))
            first = sentence(first[0])
        end: Unit | None = rest.pop() if rest else None
        if isinstance(end, tuple):
            if end[0] < end[1] - 1:
                rest.append((end[0], end[1] - 1))
            end = sentence(end[1] - 1)
        if end is None:
            alone = f.bos + f.tokenizer.encode(self.opening + first + self.closing)
            return np.array(alone, dtype=np.int32), [len(f.bos) + len(s.head(self.opening))]
        parts: list[Ids | list[int]] = [f.bos, s.head(self.opening + first + s.trail)]
        at = len(f.bos) + len(parts[1])
        where = {first: len(f.bos) + len(s.head(self.opening))}
        for unit in rest:
            if isinstance(unit, tuple):
                new: list[Ids | list[int]] = list(f.stream.take(*unit))
            else:
                where[unit] = at + s.lead_tokens
                new = [self.needle_ids[unit]]
            parts += new
            at += sum(map(len, new))
        where[end] = at + s.lead_tokens
        parts.append(s.piece(s.lead + end + self.closing))
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        return ids, [where.get(unit, 0) if isinstance(unit, str) else 0 for unit in units]

    def _encoded(self, units: Sequence[Unit], first_answer: int) -> tuple[Ids, list[int]]:
        """The same for a tokenizer whose pieces cannot be joined: everything is encoded."""
        f = self.f
        whole = f.text(self.q, units)
        ids = f.bos + f.tokenizer.encode(whole)
        needle = units[first_answer]
        assert isinstance(needle, str)
        before = f.bos + f.tokenizer.encode(whole[: whole.index(needle)].rstrip(" "))
        # A token that reaches into the needle is where it starts.
        start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        return np.array(ids, dtype=np.int32), [start if j == first_answer else 0 for j in range(len(units))]
