"""RULER's samples as the existing generators make them, byte for byte.

    nvidia-2024           NVIDIA/RULER of April 2024 to May 2025: linear length search
    nvidia-main           NVIDIA/RULER since June 2025: bisection, answer prefix in a field of its own
    nvidia-main-noprefix  the same samples asked without the prefix, as its client did from 2025-05-30 to 2026-07-21
    lm-eval               lm-evaluation-harness: linear search, prefix joined by a space

One random stream runs through the length search and all samples, so sample i depends on the tokenizer and on
everything before it; that is upstream's behaviour. Where upstream loops for ever or skips samples because nothing
fits, this raises.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from evalsuite.types import Tokenizer
from gdn2.errors import UserError
from tasks.ruler import punkt
from tasks.ruler.templates import NOISE, Niah, query_of
from tasks.ruler.words import DRAW

PROFILES = ("nvidia-2024", "nvidia-main", "nvidia-main-noprefix", "lm-eval")
DEFAULT_SAMPLES = 500
_DEFAULT_SEED = 42
_SHUFFLE_SEED = 42  # lm-eval's own, whatever the harness's seed
_PATIENCE = 100  # redraws of one sample at the smallest size
_DEPTHS = [round(100 * j / 39) for j in range(40)]  # percent


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt before anything is cut from it. `needles` in the order of the text."""

    body: str  # up to and including the question mark
    prefix: str  # of the answer, leading space included
    answers: tuple[str, ...]
    queries: tuple[str, ...]
    needles: tuple[tuple[str, str], ...]
    depth: float  # of the first answer's needle, 0..1
    repeats: bool  # whether the haystack holds anything twice


@dataclass(frozen=True, slots=True)
class Made:
    """One sample and the record upstream would write for it."""

    draft: Draft
    prompt: str
    record: dict[str, object]


@dataclass(frozen=True, slots=True)
class Job:
    """All samples of one file. `essay` is the raw text of the haystack, read for essay tasks only."""

    task: Niah
    profile: str
    length: int
    tokenizer: Tokenizer
    essay: Callable[[], str]
    seed: int = _DEFAULT_SEED
    budget: int = 128  # tokens to generate

    @property
    def increment(self) -> int:
        if self.task.haystack == "essay":
            return 500
        return 5 if self.length < 4096 else 25


@lru_cache(maxsize=4)
def _words(text: str) -> list[str]:
    return re.sub(r"\s+", " ", text).split(" ")


class Source:
    """Draws drafts of any haystack size from one random stream."""

    def __init__(self, job: Job) -> None:
        self.task = job.task
        self.harness = job.profile == "lm-eval"
        # The harness seeds `random` with 0; our default seed stands for each generator's own.
        seed = 0 if self.harness and job.seed == _DEFAULT_SEED else job.seed
        self.rng = random.Random(seed)
        self.shuffle_seed = _SHUFFLE_SEED if self.harness else job.seed
        self.repeats = job.profile.startswith("nvidia-main")
        self.words: list[str] = []
        if job.task.haystack == "essay":
            self.split = lru_cache(maxsize=8)(punkt.sentences())
            self.words = _words(job.essay())

    def draft(self, size: int) -> Draft:
        """A sample with `size` words or lines of haystack. Consumes random draws in upstream's order."""
        task, rng = self.task, self.rng
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(task.keys):
            keys.append(DRAW[task.key](rng))
            values.append([DRAW[task.value](rng) for _ in range(task.values)])
        pairs = [(key, value) for key, group in zip(keys, values, strict=True) for value in group]
        random.Random(self.shuffle_seed).shuffle(pairs)
        context, needles, depths = self._essay(size, pairs) if self.words else self._lines(size, pairs)
        asked = rng.sample(range(task.keys), task.queries)
        answers = tuple(value for j in asked for value in values[j])
        query = query_of([keys[j] for j in asked])
        return Draft(
            body=f"{task.introduction}\n{context}\n{task.question(query)}",
            prefix=" " + task.answer_prefix(query),
            answers=answers,
            queries=tuple(keys[j] for j in asked),
            needles=tuple(needles),
            depth=next((d for d, (_, value) in zip(depths, pairs, strict=True) if value == answers[0]), 0.0),
            repeats=size > len(self.words) if self.words else task.haystack == "noise",
        )

    def _essay(self, size: int, pairs: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]], list[float]]:
        words = self.words
        if self.repeats and size > len(words):
            words = words * -(-size // len(words))
        sentences = self.split(" ".join(words[:size]).strip())
        percents = self.rng.sample(_DEPTHS, len(pairs))
        cuts = sorted(int(len(sentences) * (percent / 100)) for percent in percents)
        parts: list[str] = []
        for start, stop, (key, value) in zip([0, *cuts], cuts, pairs, strict=False):
            parts += [" ".join(sentences[start:stop]), self.task.needle(key, value)]
        parts.append(" ".join(sentences[cuts[-1] :]))
        return " ".join(parts), pairs, [percent / 100 for percent in sorted(percents)]

    def _lines(self, size: int, pairs: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]], list[float]]:
        task, rng = self.task, self.rng
        others: list[tuple[str, str]] = []
        if task.haystack == "needle":
            others = [(DRAW[task.key](rng), DRAW[task.value](rng)) for _ in range(size)]
        lines = [task.needle(*other) for other in others] or [NOISE] * size
        places = sorted(rng.sample(range(size), len(pairs)), reverse=True)
        for place, pair in zip(places, pairs, strict=True):
            lines.insert(place, task.needle(*pair))
            others.insert(min(place, len(others)), pair)
        return "\n".join(lines), others, [place / size for place in places]


def generate(job: Job) -> Iterator[Made]:
    """Samples without end. Raises UserError where nothing of this task fits the length."""
    source = Source(job)
    harness = source.harness
    # What upstream counts: the harness leaves the answer prefix out and puts BOS in.
    extra = int(harness and job.tokenizer.bos_id is not None)

    def counted(draft: Draft) -> str:
        return draft.body if harness else draft.body + draft.prefix

    def cost(draft: Draft, tail: str = "") -> int:
        return len(job.tokenizer.encode(counted(draft) + tail)) + extra + job.budget

    least, need = _smallest(job, cost)
    if need > job.length:
        raise _too_short(job, need)
    size = max(_bisect(job, source, cost) if source.repeats else _climb(job, source, cost), least)
    index = 0
    while True:
        used = size
        draft = source.draft(used)
        tries = 0
        while (length := cost(draft)) > job.length:
            if used > job.increment:
                used -= job.increment
            elif harness or (tries := tries + 1) == _PATIENCE:
                # The harness leaves such a sample out and goes on; NVIDIA's code draws for ever.
                raise _too_short(job, length)
            draft = source.draft(used)
        yield _finish(job, draft, index, length)
        index += 1


def _too_short(job: Job, length: int) -> UserError:
    return UserError(
        f"length {job.length} is too short for {job.task.name} in profile {job.profile}, whose smallest prompt takes"
        f" {length} tokens, {job.budget} of them to generate: use at least {length}"
    )


def _smallest(job: Job, cost: Callable[[Draft], int]) -> tuple[int, int]:
    """The smallest haystack upstream's search can end with, and the tokens of a sample with it."""
    if job.profile == "lm-eval":
        least = job.task.keys * job.task.values
    elif job.profile == "nvidia-2024" and job.task.haystack == "essay":
        least = 0
    else:
        least = job.increment
    probe = Source(job)  # a stream of its own: these draws must not shift the samples
    return least, min(cost(probe.draft(least)) for _ in range(8))


def _climb(job: Job, source: Source, cost: Callable[..., int]) -> int:
    size, total = job.increment, 0
    while total < job.length:
        draft = source.draft(size)
        total = cost(draft, " ".join(draft.answers))
        if total > job.length:
            return size - job.increment
        if source.words and size > len(source.words):
            return len(source.words)
        size += job.increment
    return size


def _bisect(job: Job, source: Source, cost: Callable[[Draft], int]) -> int:
    first = job.increment
    per_unit = (cost(source.draft(first)) - job.budget) / first
    low, high, best = first, max(int(job.length / per_unit * 3), 2 * first), first
    while low <= high:
        middle = (low + high) // 2
        if cost(source.draft(middle)) <= job.length:
            low, best = middle + 1, middle
        else:
            high = middle - 1
    return best


def _finish(job: Job, draft: Draft, index: int, length: int) -> Made:
    record: dict[str, object] = {"index": index}
    if job.profile == "lm-eval":
        record |= {"input": draft.body, "outputs": list(draft.answers), "length": length}
        record |= {"max_length": job.length, "gen_prefix": draft.prefix[1:]}
        return Made(draft, draft.body + draft.prefix, record)
    whole = draft.body + draft.prefix
    if job.profile == "nvidia-2024":
        return Made(draft, whole, record | {"input": whole, "outputs": list(draft.answers), "length": length})
    cut = whole.rfind(draft.prefix[:10])
    offset = whole.find(draft.answers[0])
    record = {
        "index": offset,  # upstream overwrites the sample's number
        "input": whole[:cut],
        "outputs": list(draft.answers),
        "length": length,
        "length_w_model_temp": length,
        "answer_prefix": whole[cut:],
        "token_position_answer": len(job.tokenizer.encode(whole[:offset])),
    }
    return Made(draft, whole[:cut] if job.profile == "nvidia-main-noprefix" else whole, record)
