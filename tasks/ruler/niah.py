"""RULER's eight needle-in-a-haystack tasks (Hsieh et al. 2024, arXiv:2404.06654), generated natively.

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the
    number afterwards.
    ... One of the special magic numbers for bright-harbor is: 4821736. ...
    What is the special magic number for bright-harbor mentioned in the provided text? The special magic number for
    bright-harbor mentioned in the provided text is

Field of every profile: `forced`; with yes, beside the generated answer, the log-probability and the rank of each value
right after the prompt, in one pass from the state that the prompt left.

Options: `haystack` (bundled, essays, a file or directory; essay tasks only), `haystack_offset` (first sentence, or
`random`: one for each sample; profile `exact`), `budget` (tokens to generate, 128).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from statistics import fmean
from typing import overload

import numpy as np

from evalsuite.scorers import postprocess, string_match_all
from evalsuite.types import (
    Decision,
    Field,
    Generate,
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
from tasks.ruler import compat, exact
from tasks.ruler.haystack import Haystack, NeedleHaystack, NoiseHaystack, load_haystack
from tasks.ruler.splice import ByDigest, Splicer, Stream, continued
from tasks.ruler.templates import NIAH_TASKS, Niah, query_of
from tasks.ruler.words import LIST_DIGESTS, PATTERNS

LAST_OFFSET = 100_000  # sentences
METRIC = "string_match_all"
FORCED = ("value_logprob", "value_rank", "value_greedy")
FIELDS = {"forced": Field("no", "yes|no", "yes or no")}
BUDGET = 128
PROFILES = ("exact", *compat.PROFILES)


class Lazy(Sequence[Sample]):
    """Samples made when asked for."""

    def __init__(self, count: int, make: Callable[[int], Sample]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            chosen = range(self._count)[index]
            return Lazy(len(chosen), lambda i: self._make(chosen[i]))
        if not -self._count <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        return self._make(index % self._count)


class InOrder:
    """Items of an iterator by number: making item i makes all before it, which are kept."""

    def __init__(self, source: Iterator[compat.Made]) -> None:
        self._source = source
        self._made: list[compat.Made] = []

    def __getitem__(self, index: int) -> compat.Made:
        self._made += islice(self._source, max(index + 1 - len(self._made), 0))
        return self._made[index]


@dataclass(frozen=True, slots=True)
class NiahTask:
    """A `Task` of the harness."""

    spec: Niah
    version: int = 1
    suite: str = "ruler"
    has_lengths: bool = True
    protocols: tuple[str, ...] = PROFILES

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def fields(self) -> Mapping[str, Field]:
        return FIELDS

    def expand(self, profile: str) -> tuple[str, ...]:
        """The protocols a profile with fields stands for; see `evalsuite.types.Adjustable`."""
        return expanded(self.name, self.protocols, FIELDS, profile, brief=True)

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """Samples of one cell. Raises UserError for a bad option or a length too short for what it must hold."""
        forced = field_values(FIELDS, setting.protocol)["forced"] == "yes"
        made = self._samples(replace(setting, protocol=setting.protocol.partition(":")[0]), tokenizer)
        return Lazy(len(made), lambda i: with_values(made[i], tokenizer)) if forced else made

    def _samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        length, count, budget = checked(self.name, setting, BUDGET)
        if setting.protocol == "exact":
            return self._exact(setting, tokenizer, length, count, budget)
        made = InOrder(self.compatible(setting, tokenizer))
        if count:
            made[0]

        def make(i: int) -> Sample:
            return _compatible_sample(self.spec, setting, tokenizer, made[i], i)

        return Lazy(count, make)

    def compatible(self, setting: Setting, tokenizer: Tokenizer) -> Iterator[compat.Made]:
        """What the generator that `setting.protocol` names makes, without end. The haystack is read at once."""
        length, _, budget = checked(self.name, setting, BUDGET)
        essay = load_haystack(setting.options.get("haystack", "bundled")) if _is_essay(self) else None

        def text() -> str:
            return essay.text() if essay else ""

        return compat.generate(compat.Job(self.spec, setting.protocol, length, tokenizer, text, setting.seed, budget))

    def _exact(self, setting: Setting, tokenizer: Tokenizer, length: int, count: int, budget: int) -> Sequence[Sample]:
        haystack = self._haystack(setting)
        offset = sentence_offset(setting)
        sentences = stream(haystack, tokenizer, self.spec.separator)
        filler = exact.Filler(exact.NiahWording(self.spec), tokenizer, sentences, length, budget)

        def question(i: int) -> exact.Question:
            return exact.ask(self.spec, setting.seed, i, haystack, offset)

        def make(i: int) -> Sample:
            asked = question(i)
            return _exact_sample(self.spec, setting, (filler, asked, filler.build(asked)), i)

        filler.check(question, count)
        return Lazy(count, make)

    def _haystack(self, setting: Setting) -> Haystack:
        if self.spec.haystack == "noise":
            return NoiseHaystack()
        if self.spec.haystack == "needle":
            return _lines(self.spec, setting.seed)
        return load_haystack(setting.options.get("haystack", "bundled"))

    def data_digest(self, setting: Setting) -> str:
        """sha256 over the haystack and the word lists."""
        parts = [self._haystack(setting).digest, *LIST_DIGESTS.values()]
        return sha256("\n".join(parts).encode()).hexdigest()

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """RULER's fraction of references found, and what was said instead."""
        response, *forced = responses
        target = ", ".join(sample.target)
        if response.error is not None:
            return [Score(METRIC, None, target, response.text, error=response.error)]
        said = postprocess(response.text)
        value = string_match_all(said, sample.target)
        scores = [Score(METRIC, value, target, response.text, outcome=_outcome(value, said, sample))]
        return scores + (value_scores(target, forced) if forced else [])


def with_values(sample: Sample, tokenizer: Tokenizer) -> Sample:
    """`sample` with a further request for each value: its likelihood and rank right after the prompt."""
    (request,) = sample.requests
    assert isinstance(request, Generate)
    prompt = request.prompt
    asked = (LogLikelihood(prompt, continued(tokenizer, prompt, f" {value}"), True) for value in sample.target)
    return replace(sample, requests=(request, *asked))


def value_scores(target: str, responses: Sequence[Response]) -> list[Score]:
    """Means over the values: nats of all its tokens, rank of its least likely one, share that greedy decoding gives."""
    logprobs = [response.logprob or 0.0 for response in responses]
    found = [float(response.rank or 1) for response in responses]
    greedy = [float(bool(response.greedy)) for response in responses]
    outcome = "target" if all(greedy) else "partial" if any(greedy) else "other"
    pairs = zip(FORCED, (logprobs, found, greedy), strict=True)
    return [Score(metric, fmean(values), target, "", outcome) for metric, values in pairs]


def _outcome(value: float, said: str, sample: Sample) -> str:
    """target, partial, distractor:R, other or nothing.

    R counts the needles of the prompt from its end, 1 being the last one; of several the one said first is meant.
    """
    if value == 1:
        return "target"
    if value > 0:
        return "partial"
    needles = sample.facts["needles"]
    assert isinstance(needles, tuple)
    folded = said.lower()
    found = [
        (folded.find(value), rank)
        for rank, (_, value) in enumerate(reversed(needles), start=1)
        if value in folded and value not in sample.target
    ]
    if found:
        return f"distractor:{min(found)[1]}"
    return "other" if PATTERNS[str(sample.facts["kind"])].search(said) else "nothing"


def _is_essay(task: NiahTask) -> bool:
    return task.spec.haystack == "essay"


def checked(name: str, setting: Setting, budget: int) -> tuple[int, int, int]:
    """Length, number of samples and budget of a setting of task `name`, whose own budget is `budget`.

    Raises UserError for what cannot be one.
    """
    if setting.protocol not in PROFILES:
        raise UserError(f"{name} has no profile {setting.protocol!r}: use one of {', '.join(PROFILES)}")
    if "haystack" in setting.options:
        load_haystack(setting.options["haystack"])  # a bad one is refused by the tasks that do not read it, too
    if setting.length is None or setting.length < 1:
        raise UserError(f"{name} needs a length of at least 1 token, got {setting.length}")
    count = compat.DEFAULT_SAMPLES if setting.samples is None else setting.samples
    if count < 0:
        raise UserError(f"samples must not be negative, got {count}")
    budget = _whole(setting.options.get("budget", str(budget)), "budget", 1)
    if "haystack_offset" in setting.options and setting.protocol != "exact":
        raise UserError(f"haystack_offset is an option of profile exact, not of {setting.protocol}")
    return setting.length, count, budget


def _whole(text: str, name: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19) or int(text) < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {text[:40]!r}")
    return int(text)


def sentence_offset(setting: Setting) -> int | None:
    """First sentence of the haystack that a setting asks for; None is another for each sample."""
    text = setting.options.get("haystack_offset", "0")
    if text == "random":
        return None
    offset = _whole(text, "haystack_offset (or `random`)", 0)
    if offset > LAST_OFFSET:
        raise UserError(f"haystack_offset {text!r} is beyond {LAST_OFFSET}: every sentence before it is tokenized")
    return offset


@lru_cache(maxsize=4)
def _lines(spec: Niah, seed: int) -> NeedleHaystack:
    return NeedleHaystack(spec, seed)


def stream(haystack: Haystack, tokenizer: Tokenizer, separator: str) -> Stream:
    """The token stream of a haystack: one for equal haystacks and tokenizers, whatever the length or the task."""
    return _stream(_Cached(haystack), ByDigest(tokenizer), separator)


class _Cached:
    """A haystack, equal to any of the same name and digest."""

    def __init__(self, haystack: Haystack) -> None:
        self.haystack = haystack
        self._key = (haystack.name, haystack.digest)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Cached) and self._key == other._key


@lru_cache(maxsize=8)
def _stream(haystack: _Cached, tokenizer: ByDigest, separator: str) -> Stream:
    return Stream(haystack.haystack, Splicer(tokenizer.tokenizer, separator))


def _sample(
    prompt: Prompt, setting: Setting, index: int, answers: tuple[str, ...], depth: float, facts: Mapping[str, object]
) -> Sample:
    budget = int(setting.options.get("budget", BUDGET))
    request = Generate(prompt, max_tokens=budget, decision=Decision(answers, "all"))
    common = {"profile": setting.protocol, "length": setting.length}
    return Sample(str(index), (request,), answers, depth, {**common, **facts})


def _exact_sample(
    spec: Niah, setting: Setting, fitted: tuple[exact.Filler, exact.Question, exact.Built], index: int
) -> Sample:
    filler, question, built = fitted
    size = filler.stream.haystack.size
    sentences = sum(unit[1] - unit[0] for unit in built.units if not isinstance(unit, str))
    facts = {
        "kind": spec.value,
        "key": query_of(question.queries),
        "needles": built.needles,
        "needle_token": built.position,
        "haystack": filler.stream.haystack.name,
        "haystack_offset": question.offset,
        "haystack_repeats": size is not None and sentences >= size,
    }
    prompt = Prompt(built.ids, lambda: filler.text(question, built.units))
    return _sample(prompt, setting, index, question.answers, question.needles[0].depth, facts)


def _compatible_sample(spec: Niah, setting: Setting, tokenizer: Tokenizer, made: compat.Made, index: int) -> Sample:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = np.array(bos + tokenizer.encode(made.prompt), dtype=np.int32)
    draft = made.draft
    key = next(key for key, value in draft.needles if value == draft.answers[0])
    start = made.prompt.index(spec.needle(key, draft.answers[0]))
    facts = {
        "kind": spec.value,
        "key": query_of(draft.queries),
        "needles": draft.needles,
        "needle_token": len(bos) + len(tokenizer.encode(made.prompt[:start].rstrip(" "))),
        "haystack": setting.options.get("haystack", "bundled") if spec.haystack == "essay" else spec.haystack,
        "haystack_offset": 0,
        "haystack_repeats": draft.repeats,
    }
    return _sample(Prompt(ids, made.prompt), setting, index, draft.answers, draft.depth, facts)


TASKS = tuple(NiahTask(spec) for spec in NIAH_TASKS)
SUITES = {
    "ruler": tuple(spec.name for spec in NIAH_TASKS),
    "niah-paper": ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1"),
}
