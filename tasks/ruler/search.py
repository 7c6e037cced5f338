"""How the generators RULER came with fit a sample to a length, for the tasks whose size is a number of units.

Units are lines, words or documents. Since June 2025 NVIDIA's code bisects, before it and in lm-eval the number grows
step by step; either way every probe draws from the stream the samples come from. A sample that is too long after all
is drawn again a step smaller. Where upstream would draw for ever, this raises.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from evalsuite.types import Tokenizer
from gdn2.errors import UserError

DEFAULT_SEED = 42
PATIENCE = 100  # redraws of one sample at the smallest size
_HARNESS_SEEDS = (0, 1234)  # of `random` and numpy, lm-eval's own


@dataclass(frozen=True, slots=True)
class Job:
    """All samples of one file."""

    name: str
    profile: str
    length: int
    tokenizer: Tokenizer
    seed: int
    budget: int  # tokens to generate

    @property
    def harness(self) -> bool:
        """Whether lm-eval's port is meant."""
        return self.profile == "lm-eval"

    @property
    def bisects(self) -> bool:
        return self.profile.startswith("nvidia-main")

    @property
    def seeds(self) -> tuple[int, int]:
        """Of `random` and of numpy. Our default stands for each generator's own."""
        return _HARNESS_SEEDS if self.harness and self.seed == DEFAULT_SEED else (self.seed, self.seed)

    @property
    def shuffle_seed(self) -> int:
        """Of the shuffles that are the same in every sample."""
        return DEFAULT_SEED if self.harness else self.seed

    def rng(self) -> random.Random:
        return random.Random(self.seeds[0])

    def tokens(self, text: str) -> int:
        """Tokens of `text` as the generator counts them: lm-eval counts BOS."""
        extra = int(self.harness and self.tokenizer.bos_id is not None)
        return len(self.tokenizer.encode(text)) + extra

    def too_short(self, need: int | None) -> UserError:
        use = f"; use at least {need}" if need else ""
        return UserError(f"length {self.length} is too short for {self.name} in profile {self.profile}{use}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt, the answer's beginning included. `measured` is what is counted where it is not `text`."""

    text: str
    answers: tuple[str, ...]
    measured: str | None = None
    more: dict[str, object] = field(default_factory=dict)  # further fields of the record


@dataclass(frozen=True, slots=True)
class Made:
    """One sample, its number, and the record upstream would write for it."""

    index: int
    prompt: str
    answers: tuple[str, ...]
    record: dict[str, object]


class Source(Protocol):
    """Draws samples of any size from one random stream. May raise ValueError where upstream's draw would."""

    step: int  # units more or fewer at a time
    most: int | None  # units there are; the linear search ends with them
    search_extra: int  # tokens counted on top of a probe
    sample_extra: int  # and of a sample

    def first_probe(self) -> tuple[int, int]:
        """Size of the probe that a bisection starts with, and the factor on its estimate."""

    def probe(self, size: int) -> str:
        """The text counted in the search."""

    def draft(self, size: int, index: int) -> Draft:
        """Sample `index`."""

    def finish(self, draft: Draft) -> Draft:
        """What is done once a sample fits, or before it is measured where bisection is the search."""


def bisect(job: Job, source: Source) -> int:
    """The largest size whose probe fits, as NVIDIA's main branch finds it."""
    first, factor = source.first_probe()
    per_unit = job.tokens(source.probe(first)) / first
    estimate = int(job.length // per_unit) * factor if factor == 2 else int(job.length / per_unit * factor)
    low, high, best = source.step, max(estimate, 2 * source.step), source.step
    while low <= high:
        middle = (low + high) // 2
        if job.tokens(source.probe(middle)) + source.search_extra + job.budget <= job.length:
            low, best = middle + 1, middle
        else:
            high = middle - 1
    return best


def climb(job: Job, source: Source) -> int:
    """The last size whose probe fits, as the older generators find it; 0 where the first does not."""
    size, total = source.step, 0
    extra = source.search_extra + job.budget
    while total + extra < job.length:
        total = job.tokens(source.probe(size))
        if total + extra > job.length:
            return size - source.step
        size += source.step
        if source.most is not None and size > source.most:
            return source.most
    return size


def fitted(job: Job, source: Source, size: int, index: int) -> tuple[Draft, int]:
    """Sample `index` at `size` units or the fewer it takes, and its length. Raises UserError where none fits."""
    tries, need = 0, None
    while True:
        try:
            draft = source.draft(size, index)
            if job.bisects:
                draft = source.finish(draft)
            length = job.tokens(draft.measured or draft.text) + source.sample_extra + job.budget
            if length <= job.length:
                return (draft if job.bisects else source.finish(draft)), length
            need = min(length, need or length)
        except ValueError:
            pass  # fewer units than the sample needs: upstream goes on with fewer still
        if size > source.step:
            size -= source.step
            need = None
        elif (tries := tries + 1) == PATIENCE:
            raise job.too_short(need)


def generate(job: Job, source: Source, prefix: str, joint: str = " ") -> Iterator[Made]:
    """Samples without end, of the size the search finds. `prefix` and `joint`: see `written`."""
    size = bisect(job, source) if job.bisects else climb(job, source)
    index = 0
    while True:
        draft, length = fitted(job, source, size, index)
        yield written(job, draft, prefix, index, length, joint)
        index += 1


def written(job: Job, draft: Draft, prefix: str, index: int, length: int, joint: str = " ") -> Made:
    """The sample as each generator writes it.

    `prefix` is the beginning of the answer, `joint` what lm-eval puts before it.
    """
    record: dict[str, object] = {"index": index}
    cut = draft.text.rfind(prefix[:10])
    body, rest = draft.text[:cut], draft.text[cut:]
    outputs = list(draft.answers)
    if job.harness:
        record |= {"input": body} | draft.more | {"outputs": outputs, "length": length}
        record |= {"max_length": job.length, "gen_prefix": rest.strip()}
        return Made(index, body + joint + rest.strip(), draft.answers, record)
    if job.profile == "nvidia-2024":
        record |= {"input": draft.text, "outputs": outputs, "length": length}
        return Made(index, draft.text, draft.answers, record)
    record |= {"input": body, "outputs": outputs, "length": length}
    record |= {"length_w_model_temp": length, "answer_prefix": rest}
    return Made(index, body if job.profile == "nvidia-main-noprefix" else draft.text, draft.answers, record)
