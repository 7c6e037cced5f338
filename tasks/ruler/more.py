"""RULER's five tasks that hide no needle: variable tracking (vt), common words (cwe), frequent words (fwe), and
questions about documents of SQuAD (qa_1) and HotpotQA (qa_2).

In profile `exact` every sample has a random stream of its own and the window is filled; the other profiles write what
their generators write. Option: `budget` (tokens to generate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from typing import Literal

import numpy as np

from evalsuite.scorers import postprocess, string_match_all, string_match_part
from evalsuite.types import Decision, Generate, Prompt, Response, Sample, Score, Setting, Tokenizer
from gdn2.errors import UserError
from tasks.data import Dataset
from tasks.ruler import cwe, exact, fwe, lists, qa, vt
from tasks.ruler.documents import Library, Shelf
from tasks.ruler.haystack import NoiseHaystack
from tasks.ruler.niah import METRIC, PROFILES, Lazy, checked, stream
from tasks.ruler.search import Job, Made
from tasks.ruler.sources import DATASETS, corpus, data_digest
from tasks.ruler.splice import ByDigest
from tasks.ruler.words import LIST_DIGESTS, VERBS

Name = Literal["vt", "cwe", "fwe", "qa_1", "qa_2"]
METRIC_PART = "string_match_part"
BUDGETS: dict[str, int] = {"vt": vt.BUDGET, "cwe": cwe.BUDGET, "fwe": fwe.BUDGET, "qa_1": qa.BUDGET, "qa_2": qa.BUDGET}
PREFIXES = {
    "vt": vt.answer_prefix("").partition(",")[0],
    "cwe": cwe.ANSWER_PREFIX,
    "fwe": fwe.ANSWER_PREFIX,
    "qa_1": qa.ANSWER_PREFIX,
    "qa_2": qa.ANSWER_PREFIX,
}


@dataclass(frozen=True, slots=True)
class RulerTask:
    """A `Task` of the harness."""

    name: Name
    version: int = 1
    suite: str = "ruler"
    has_lengths: bool = True
    protocols: tuple[str, ...] = PROFILES

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """What it reads."""
        return (DATASETS[self.name],) if self.is_qa else ()

    @property
    def is_qa(self) -> bool:
        return self.name.startswith("qa")

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """Samples of one cell.

        Raises:
            UserError: a bad option, or a length too short for what it must hold.
            DataError: the documents are not there.
        """
        length, count, budget = checked(self.name, setting, BUDGETS[self.name])
        if setting.protocol == "exact":
            return _EXACT[self.name](self, setting, tokenizer, (length, count, budget))
        made = list(islice(self.compatible(setting, tokenizer), count))
        if not made and count:
            raise UserError(f"length {length} is too short for {self.name} in profile {setting.protocol}")
        return Lazy(len(made), lambda i: _compatible_sample(self, setting, tokenizer, made[i]))

    def compatible(self, setting: Setting, tokenizer: Tokenizer) -> Iterator[Made]:
        """What the generator that `setting.protocol` names makes, until it runs out of questions."""
        length, count, budget = checked(self.name, setting, BUDGETS[self.name])
        job = Job(self.name, setting.protocol, length, tokenizer, setting.seed, budget)
        if self.is_qa:
            return qa.compatible(job, corpus(self.name), count)
        return {"vt": vt.compatible, "cwe": cwe.compatible, "fwe": fwe.compatible}[self.name](job)

    def data_digest(self, setting: Setting) -> str:
        """sha256 of the documents, or of the word lists or the lines of noise."""
        if self.is_qa:
            return data_digest(self.name)
        parts = {"vt": [NoiseHaystack().digest], "cwe": [*LIST_DIGESTS.values(), VERBS[1]], "fwe": ["letters"]}
        return sha256("\n".join(parts[self.name]).encode()).hexdigest()

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """RULER's score: the share of references found, or for questions whether any was.

        lm-eval's for questions is a share, too: of a question's references, repeated ones counted each time.
        """
        (response,) = responses
        metric = METRIC_PART if self.is_qa else METRIC
        target = ", ".join(dict.fromkeys(sample.target))
        if response.error is not None:
            return [Score(metric, None, target, response.text, error=response.error)]
        said = postprocess(response.text)
        part = self.is_qa and sample.facts["profile"] != "lm-eval"
        value = (string_match_part if part else string_match_all)(said, sample.target)
        outcome = "target" if value == 1 else "partial" if value else "other" if said else "nothing"
        return [Score(metric, value, target, response.text, outcome=outcome)]


def _sample(
    task: RulerTask, setting: Setting, number: int, prompt: Prompt, answers: tuple[str, ...], depth: float | None = None
) -> Sample:
    budget = int(setting.options.get("budget", BUDGETS[task.name]))
    part = task.is_qa and setting.protocol != "lm-eval"
    request = Generate(prompt, max_tokens=budget, decision=Decision(answers, "any" if part else "all"))
    return Sample(str(number), (request,), answers, depth, {"profile": setting.protocol, "length": setting.length})


def _compatible_sample(task: RulerTask, setting: Setting, tokenizer: Tokenizer, made: Made) -> Sample:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = np.array(bos + tokenizer.encode(made.prompt), dtype=np.int32)
    return _sample(task, setting, made.index, Prompt(ids, made.prompt), made.answers)


Sizes = tuple[int, int, int]  # length, samples, tokens to generate


def _exact_chains(task: RulerTask, setting: Setting, tokenizer: Tokenizer, sizes: Sizes) -> Sequence[Sample]:
    length, count, budget = sizes
    filler = exact.Filler(vt.ChainWording(), tokenizer, stream(NoiseHaystack(), tokenizer, "\n"), length, budget)

    def question(i: int) -> vt.Chain:
        return vt.ask(setting.seed, i, length)

    def make(i: int) -> Sample:
        asked = question(i)
        built = filler.build(asked)
        return _sample(task, setting, i, Prompt(built.ids, lambda: filler.text(asked, built.units)), asked.answers)

    filler.check(question, count)
    return Lazy(count, make)


def _exact_lists(task: RulerTask, setting: Setting, tokenizer: Tokenizer, sizes: Sizes) -> Sequence[Sample]:
    length, count, budget = sizes
    kind = lists.Common if task.name == "cwe" else lists.Frequent
    fitter = kind(tokenizer, setting.seed, length, budget)

    def make(i: int) -> Sample:
        frame, ids, text = fitter.build(i)
        return _sample(task, setting, i, Prompt(ids, text), frame.answers)

    if count:
        make(0)
    return Lazy(count, make)


def _exact_questions(task: RulerTask, setting: Setting, tokenizer: Tokenizer, sizes: Sizes) -> Sequence[Sample]:
    length, count, budget = sizes
    library = _library(task.name, data_digest(task.name), ByDigest(tokenizer))
    shelf = Shelf(library, task.name, setting.seed, length, budget)
    questions = library.corpus.questions
    fitting = list(islice((i for i in range(len(questions)) if shelf.fits(i)), count))
    if count and not fitting:
        raise UserError(f"length {length} is too short for {task.name}: no question's documents fit; use a longer one")

    def make(i: int) -> Sample:
        number = fitting[i]
        depth, ids, text = shelf.build(number)
        return _sample(task, setting, number, Prompt(ids, text), questions[number].answers, depth)

    return Lazy(len(fitting), make)


@lru_cache(maxsize=4)
def _library(name: str, digest: str, key: ByDigest) -> Library:
    return Library(key.tokenizer, corpus(name))


_EXACT: dict[str, Callable[[RulerTask, Setting, Tokenizer, Sizes], Sequence[Sample]]] = {
    "vt": _exact_chains,
    "cwe": _exact_lists,
    "fwe": _exact_lists,
    "qa_1": _exact_questions,
    "qa_2": _exact_questions,
}
TASKS = tuple(RulerTask(name) for name in ("vt", "cwe", "fwe", "qa_1", "qa_2"))
