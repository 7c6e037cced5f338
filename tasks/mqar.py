"""Associative recall: pairs are read once, then asked for from the state they left. For any tokenizer.

    harbor: lamp
    engine: forest
    ...
    harbor:                  -> " lamp"

All questions of a context are asked from one state, so they cost their few tokens only. A question is right where
greedy decoding would give the value (multi-query associative recall, Arora et al. 2023, arXiv:2312.04927). Four tasks:

    mqar       each key has one value
    capacity   the same for ever more pairs: how many until recall falls below half (`gdn2-eval capacity`)
    overwrite  half of the keys are assigned again, `times` times in all; the last value counts
    keep       the same contexts; asked are the keys that were assigned once, which the others must not have erased

In profile `lines` the pairs are words as above; in `needles` they have the wording of RULER's single-needle tasks, for
models that were trained on nothing else: "One of the special magic numbers for bright-harbor is: 4821736."

Fields: `pairs` (keys of a context), `gap` (sentences between the pairs and the questions), `vocabulary` (words that
keys, and as many others that values, are drawn from), `queries` (questions of a context at most), `times`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from statistics import fmean

import numpy as np

from evalsuite.types import (
    Field,
    Ids,
    LogLikelihood,
    Prompt,
    Response,
    Sample,
    Score,
    Setting,
    Tokenizer,
    expanded,
    field_values,
)
from gdn2.errors import UserError
from tasks.ruler.haystack import load_haystack, rng_of
from tasks.ruler.niah import Lazy
from tasks.ruler.splice import continued
from tasks.ruler.templates import NIAH_TASKS
from tasks.ruler.words import LIST_DIGESTS, VERBS, draw, held_out, single_words

DEFAULT_SAMPLES = 100
METRICS = ("recall", "value_logprob", "value_rank")
PREFERRED = "preferred"
_WORDS_SEED = "mqar/words"
_LONGEST = 8  # letters of a word


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Lower-case words of three to eight letters in an order of ours, none the beginning of another."""
    short = [word for word in single_words() if 3 <= len(word) <= _LONGEST and word.isascii() and word.islower()]
    short = [word for word in short if word.isalpha()]
    # Sorted, a word is followed at once by those it begins.
    kept = [word for word, following in zip(short, [*short[1:], ""], strict=True) if not following.startswith(word)]
    rng_of(_WORDS_SEED).shuffle(kept)
    return tuple(kept)


@lru_cache(maxsize=8)
def pools(profile: str, vocabulary: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys and the values of a profile, `vocabulary` of each."""
    if profile == "lines":
        return words()[:vocabulary], words()[-vocabulary:]
    rng = rng_of(_WORDS_SEED, profile)
    found: dict[str, dict[str, None]] = {_NEEDLE.key: {}, _NEEDLE.value: {}}
    for kind, texts in found.items():
        while len(texts) < vocabulary:
            texts[draw(kind, rng, held_out)] = None
    return tuple(found[_NEEDLE.key]), tuple(found[_NEEDLE.value])


_NEEDLE = NIAH_TASKS[0]
_NUMBER = r"[1-9][0-9]{0,4}"
_FIELDS = {
    "pairs": Field("4/16/64", _NUMBER, "a whole number from 1 to 99999"),
    "gap": Field("0", r"0|" + _NUMBER, "a whole number from 0 to 99999"),
    "vocabulary": Field("1024", _NUMBER, "a whole number from 1 to 99999"),
    "queries": Field("32", _NUMBER, "a whole number from 1 to 99999"),
}
_TIMES = Field("2", r"[2-9]|[1-9][0-9]", "a whole number from 2 to 99")


@dataclass(frozen=True, slots=True)
class Context:
    """Assignments in the order of the text, and what is asked: (key, its value, a value that is wrong)."""

    assigned: tuple[tuple[str, str], ...]
    asked: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Recall:
    """A `Task` of the harness."""

    name: str
    pairs: str = _FIELDS["pairs"].default
    rewritten: bool = False  # half of the keys are assigned again
    asks_rewritten: bool = False
    version: int = 1
    suite: str = "memory"
    has_lengths: bool = False
    protocols: tuple[str, ...] = ("lines", "needles")

    @property
    def fields(self) -> Mapping[str, Field]:
        own = Field(self.pairs, _NUMBER, _FIELDS["pairs"].meaning)
        return _FIELDS | {"pairs": own} | ({"times": _TIMES} if self.rewritten else {})

    def expand(self, profile: str) -> tuple[str, ...]:
        """The protocols a profile stands for, one for each number of pairs; see `evalsuite.types.Adjustable`."""
        found = expanded(self.name, self.protocols, self.fields, profile)
        for protocol in found:
            self._numbers(protocol)
        return found

    def _numbers(self, protocol: str) -> dict[str, int]:
        values = {name: int(value) for name, value in field_values(self.fields, protocol).items()}
        most = len(words()) // 2
        if values["vocabulary"] > most:
            raise UserError(f"vocabulary {values['vocabulary']} of {self.name} is above the {most} there are")
        if values["pairs"] > values["vocabulary"]:
            raise UserError(
                f"pairs {values['pairs']} of {self.name} need as many keys: the vocabulary has {values['vocabulary']}"
            )
        if self.rewritten and values["pairs"] < 2:
            raise UserError(f"pairs {values['pairs']} of {self.name} must be at least 2: half are assigned again")
        return values

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """Contexts of one cell, 100 unless the setting says otherwise."""
        numbers = self._numbers(setting.protocol)
        count = DEFAULT_SAMPLES if setting.samples is None else setting.samples
        return Lazy(count, lambda i: self._sample(setting, numbers, tokenizer, i))

    def _sample(self, setting: Setting, numbers: Mapping[str, int], tokenizer: Tokenizer, index: int) -> Sample:
        profile = setting.protocol.partition(":")[0]
        context = self.context(setting.seed, profile, numbers, index)
        rng = rng_of(setting.seed, "gap", index)
        first = rng.randrange(10_000)
        filler = [load_haystack("bundled").sentence(first + i) for i in range(numbers["gap"])]
        parts = [_statement(profile, *pair) for pair in context.assigned] + ([" ".join(filler)] if filler else [])
        body = "\n".join([_NEEDLE.introduction, *parts] if profile == "needles" else parts)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        texts = [f"{body}\n{_question(profile, key)}" for key, _, _ in context.asked]
        requests: list[LogLikelihood] = []
        rows: list[list[int]] = tokenizer.encode_batch(texts)
        for text, ids, (_, right, wrong) in zip(texts, rows, context.asked, strict=True):
            prompt = Prompt(_ids(bos + ids), text)
            for value in (right, wrong) if self.rewritten else (right,):
                requests.append(LogLikelihood(prompt, continued(tokenizer, prompt, f" {value}"), value == right))
        return Sample(str(index), tuple(requests), tuple(right for _, right, _ in context.asked))

    def context(self, seed: int, profile: str, numbers: Mapping[str, int], index: int) -> Context:
        """Context `index`. Its first pairs are those of a context of fewer pairs."""
        vocabulary, pairs = numbers["vocabulary"], numbers["pairs"]
        every, pool = pools(profile, vocabulary)
        rng = rng_of(seed, "rewritten" if self.rewritten else "pairs", vocabulary, index)
        keys = rng.sample(every, vocabulary)[:pairs]
        values = {key: [rng.choice(pool)] for key in keys}
        assigned = [(key, values[key][0]) for key in keys]
        often = keys[: pairs // 2] if self.rewritten else []
        for _ in range(numbers.get("times", 1) - 1):
            for key in rng.sample(often, len(often)):
                values[key].append(_other(rng, pool, values[key][-1]))
                assigned.append((key, values[key][-1]))
        asked = [key for key in keys if not self.rewritten or (key in values and (key in often) == self.asks_rewritten)]
        asked = rng_of(seed, "asked", vocabulary, pairs, index).sample(asked, len(asked))[: numbers["queries"]]
        wrong = {key: self._tempting(key, values, often, i) for i, key in enumerate(asked)}
        return Context(tuple(assigned), tuple((key, values[key][-1], wrong[key]) for key in asked))

    def _tempting(self, key: str, values: Mapping[str, Sequence[str]], often: Sequence[str], i: int) -> str:
        """A value that is wrong: the one before the last, or of a key that was not assigned again, a later one's."""
        if not often:
            return ""
        if key in often:
            return values[key][-2]
        late = [values[other][-1] for other in often if values[other][-1] != values[key][-1]]
        return late[i % len(late)] if late else values[often[0]][0]

    def data_digest(self, setting: Setting) -> str:
        """sha256 over the word lists and the text of the gap."""
        parts = [*LIST_DIGESTS.values(), VERBS[1], load_haystack("bundled").digest]
        return sha256("\n".join(parts).encode()).hexdigest()

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """Means over the questions: right or not, nats of the value, rank of its least likely token.

        Where keys are assigned again also the share of questions whose value is likelier than the tempting one.
        """
        right = responses[::2] if self.rewritten else responses
        greedy = [float(bool(response.greedy)) for response in right]
        found = fmean(greedy)
        outcome = "target" if found == 1 else "partial" if found else "other"
        logprobs = [response.logprob or 0.0 for response in right]
        ranks = [float(response.rank or 1) for response in right]
        target = ", ".join(sample.target)
        pairs = zip(METRICS, (found, fmean(logprobs), fmean(ranks)), strict=True)
        scores = [Score(metric, value, target, "", outcome) for metric, value in pairs]
        if self.rewritten:
            wrong = [response.logprob or 0.0 for response in responses[1::2]]
            won = fmean(float(a > b) for a, b in zip(logprobs, wrong, strict=True))
            scores.append(Score(PREFERRED, won, target, "", outcome))
        return scores


def _statement(profile: str, key: str, value: str) -> str:
    return f"{key}: {value}" if profile == "lines" else _NEEDLE.needle(key, value)


def _question(profile: str, key: str) -> str:
    return f"{key}:" if profile == "lines" else f"{_NEEDLE.question(key)} {_NEEDLE.answer_prefix(key)}"


def _other(rng: random.Random, pool: Sequence[str], than: str) -> str:
    """A word of `pool` other than `than`, where there is one."""
    for _ in range(100):
        if (word := rng.choice(pool)) != than:
            break
    return word


def _ids(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int32)


TASKS = (
    Recall("mqar"),
    Recall("capacity", pairs="1/2/4/8/16/32/64/128/256"),
    Recall("overwrite", pairs="4/16/64", rewritten=True, asks_rewritten=True),
    Recall("keep", pairs="4/16/64", rewritten=True),
)
