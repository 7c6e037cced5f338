"""Every needle of one context asked from one state: what the state holds, without reading the context again.

Fields: `needles` (keys of a context), `values` (words, numbers or uuids).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from statistics import fmean
from typing import Literal

from evalsuite.scorers import contains, postprocess
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
from tasks.ruler import exact
from tasks.ruler.haystack import load_haystack
from tasks.ruler.niah import BUDGET, METRIC, Lazy, checked, sentence_offset, stream, value_scores
from tasks.ruler.splice import continued
from tasks.ruler.templates import Niah
from tasks.ruler.words import LIST_DIGESTS

FIELDS = {
    "needles": Field("8", r"[1-9][0-9]{0,3}", "a whole number from 1 to 9999"),
    "values": Field("numbers", "numbers|uuids", "numbers or uuids"),
}


@dataclass(frozen=True, slots=True)
class EveryNeedle:
    """A `Task` of the harness: RULER's wording, several needles, each asked for."""

    name: str = "niah_all"
    version: int = 1
    suite: str = "memory"
    has_lengths: bool = True
    protocols: tuple[str, ...] = ("exact",)

    @property
    def fields(self) -> Mapping[str, Field]:
        return FIELDS

    def expand(self, profile: str) -> tuple[str, ...]:
        """The protocols a profile stands for; see `evalsuite.types.Adjustable`."""
        return expanded(self.name, self.protocols, FIELDS, profile)

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """Contexts of one cell. Raises UserError for a length too short for so many needles."""
        chosen = field_values(FIELDS, setting.protocol)
        plain = replace(setting, protocol="exact")
        length, count, budget = checked(self.name, plain, BUDGET)
        values: Literal["numbers", "uuids"] = "uuids" if chosen["values"] == "uuids" else "numbers"
        spec = Niah(self.name, "essay", "words", values, keys=int(chosen["needles"]))
        haystack = load_haystack(setting.options.get("haystack", "bundled"))
        filler = exact.Filler(exact.NiahWording(spec), tokenizer, stream(haystack, tokenizer, " "), length, budget)
        offset = sentence_offset(plain)

        def question(i: int) -> exact.Question:
            return exact.ask(spec, setting.seed, i, haystack, offset)

        def make(i: int) -> Sample:
            return _sample(filler, question(i), tokenizer, i, budget)

        filler.check(lambda i: _longest(tokenizer, question(i)), count)
        return Lazy(count, make)

    def data_digest(self, setting: Setting) -> str:
        """sha256 over the haystack and the word lists."""
        parts = [load_haystack(setting.options.get("haystack", "bundled")).digest, *LIST_DIGESTS.values()]
        return sha256("\n".join(parts).encode()).hexdigest()

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """Means over the needles: the share whose value was said, and the teacher-forced scores."""
        said = [postprocess(response.text) for response in responses[::2]]
        hits = [float(contains(text, value)) for text, value in zip(said, sample.target, strict=True)]
        outcome = "target" if all(hits) else "partial" if any(hits) else "other" if any(said) else "nothing"
        target = ", ".join(sample.target)
        output = "\n".join(response.text for response in responses[::2])
        return [Score(METRIC, fmean(hits), target, output, outcome), *value_scores(target, responses[1::2])]


def _asking(question: exact.Question, j: int) -> exact.Question:
    """`question` with its needle `j` asked for."""
    needle = question.needles[j]
    return replace(question, queries=(needle.key,), answers=(needle.value,))


def _longest(tokenizer: Tokenizer, question: exact.Question) -> exact.Question:
    """The one of a context's questions that takes the most tokens, so that all fit."""
    keys = [needle.key for needle in question.needles]
    sizes = [len(ids) for ids in tokenizer.encode_batch([f" {key}" for key in keys])]
    return _asking(question, sizes.index(max(sizes)))


def _sample(filler: exact.Filler, question: exact.Question, tokenizer: Tokenizer, index: int, budget: int) -> Sample:
    asked = _longest(tokenizer, question)
    built = filler.build(asked)
    requests: list[Generate | LogLikelihood] = []
    for j, needle in enumerate(question.needles):
        own = _asking(question, j)
        prompt = Prompt(filler.again(built, asked, own), _Text(filler, own, built.units))
        requests.append(Generate(prompt, budget, decision=Decision((needle.value,), "all")))
        requests.append(LogLikelihood(prompt, continued(tokenizer, prompt, f" {needle.value}"), True))
    facts = {"profile": "exact", "depths": tuple(needle.depth for needle in question.needles)}
    return Sample(str(index), tuple(requests), tuple(needle.value for needle in question.needles), None, facts)


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt's text, made when asked for."""

    filler: exact.Filler
    question: exact.Question
    units: Sequence[exact.Unit]

    def __call__(self) -> str:
        return self.filler.text(self.question, self.units)


TASKS = (EveryNeedle(),)
