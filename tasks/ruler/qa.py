"""RULER's question answering: the documents that answer a question among others, from SQuAD (qa_1) or HotpotQA (qa_2).

    Answer the question based on the given documents. Only give me the answer and do not output any other words.
    The following are given documents.
    Document 1: ... Document 2: ...
    Question: In what country is Normandy located? Answer:

Question i is the i-th of the file that can be answered. Every string is part of the benchmark.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from gdn2.errors import DataError
from tasks.ruler import search
from tasks.ruler.search import Draft, Job, Made

BUDGET = 32
ANSWER_PREFIX = " Answer:"
_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
OPENING = f"{_ORDER}\n\nThe following are given documents.\n\n"
SOURCES = {"qa_1": "squad", "qa_2": "hotpotqa"}


def closing(query: str) -> str:
    return f"\n\n{_ORDER}\n\nQuestion: {query}"


@dataclass(frozen=True, slots=True)
class Question:
    query: str
    answers: tuple[str, ...]
    given: tuple[int, ...]  # documents that always stand in the prompt
    related: tuple[int, ...]  # others of the same article: the first distractors
    needed: tuple[int, ...]  # those of `given` without which it cannot be answered


@dataclass(frozen=True, slots=True)
class Corpus:
    questions: tuple[Question, ...]
    documents: tuple[str, ...]  # sorted, each once
    digest: str  # sha256 of the file


def read(path: Path, source: str) -> Corpus:
    """The questions and documents of a file in the original form of `source`; HotpotQA also as JSON lines.

    Raises DataError naming what is wrong with it.
    """
    try:
        stamp = path.stat()
        return _read(path, source, (stamp.st_size, stamp.st_mtime_ns))
    except OSError as error:
        raise DataError(f"{source}: cannot read {path}: {error.strerror}") from error


@lru_cache(maxsize=4)
def _read(path: Path, source: str, stamp: tuple[int, int]) -> Corpus:
    data = path.read_bytes()
    try:
        found = _squad(_parsed(data)) if source == "squad" else _hotpotqa(_parsed(data))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        said = " ".join(str(error).split())[:100]
        raise DataError(f"{path} is not {source} in its original form: {type(error).__name__} {said}") from None
    questions, documents = found
    if not questions:
        raise DataError(f"{path} holds no question that can be answered")
    return Corpus(tuple(questions), tuple(documents), sha256(data).hexdigest())


def _parsed(data: bytes) -> Any:
    text = data.decode("utf-8")
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.endswith("}"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _squad(data: Any) -> tuple[list[Question], list[str]]:
    articles = [[(p["context"], p["qas"]) for p in article["paragraphs"]] for article in data["data"]]
    documents = sorted({text for article in articles for text, _ in article})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        numbers = [place[text] for text, _ in article]
        for text, asked in article:
            given = (place[text],)
            related = tuple(i for i in numbers if i != given[0])
            for one in asked:
                if not one.get("is_impossible", False):
                    answers = tuple(str(answer["text"]) for answer in one["answers"])
                    questions.append(Question(one["question"], answers, given, related, given))
    return questions, documents


def _hotpotqa(data: Any) -> tuple[list[Question], list[str]]:
    rows = [[(title, f"{title}\n{''.join(sentences)}") for title, sentences in item["context"]] for item in data]
    documents = sorted({text for row in rows for _, text in row})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for item, row in zip(data, rows, strict=True):
        given = tuple(place[text] for _, text in row)
        facts = {title for title, *_ in item.get("supporting_facts", ())}
        needed = tuple(place[text] for title, text in row if title in facts)
        questions.append(Question(item["question"], (str(item["answer"]),), given, (), needed or given))
    return questions, documents


class _Source:
    step = 10
    search_extra = sample_extra = 0

    def __init__(self, job: Job, corpus: Corpus) -> None:
        self.job, self.rng = job, job.rng()
        self.questions = corpus.questions
        self.documents = list(corpus.documents)
        self.most: int | None = len(self.documents)

    def first_probe(self) -> tuple[int, int]:
        return self.step, 3

    def draft(self, size: int, index: int) -> Draft:
        question = self.questions[index]
        chosen = self._chosen(question, size)
        random.Random(self.job.shuffle_seed).shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, start=1))
        body = f"{OPENING}{context}{closing(question.query)}"
        # lm-eval's template ends before the answer's beginning, and counts without it.
        return Draft(body + ANSWER_PREFIX, question.answers, body if self.job.harness else None)

    def _chosen(self, question: Question, size: int) -> list[str]:
        documents = self.documents
        if size >= len(documents):
            if self.job.bisects:
                return (documents * -(-size // len(documents)))[:size]
            return documents  # itself: upstream's shuffle of it stays, and later samples see another order
        given, related = list(question.given), list(question.related)
        more = size - len(given)
        if self.job.harness:
            more = max(more, 0)
        if more > len(related):
            known = {*given, *related}
            others = [i for i in range(len(documents)) if i not in known]
            numbers = given + related + self.rng.sample(others, max(0, more - len(related)))
        else:
            numbers = given + self.rng.sample(related, more)
        return [documents[i] for i in numbers]

    def probe(self, size: int) -> str:
        try:
            draft = self.draft(size, 0)
        except ValueError:
            raise self.job.too_short(None) from None  # the first question has more documents than a step
        text = draft.measured or draft.text
        return text if self.job.bisects else f"{text} {list(draft.answers)}"

    def finish(self, draft: Draft) -> Draft:
        return draft


def compatible(job: Job, corpus: Corpus) -> Iterator[Made]:
    """Samples of a profile that reproduces another generator, one for each question; lm-eval leaves some out."""
    source = _Source(job, corpus)
    size = search.bisect(job, source) if job.bisects else search.climb(job, source)
    for index, question in enumerate(corpus.questions):
        if job.harness:
            found = _smaller(job, source, max(size, 1), (index, len(question.given)))
        else:
            found = search.fitted(job, source, size, index)
        if found is not None:
            yield search.written(job, found[0], ANSWER_PREFIX, index, found[1])


def _smaller(job: Job, source: _Source, size: int, question: tuple[int, int]) -> tuple[Draft, int] | None:
    """lm-eval's sample of `question` (number, documents given): fewer and fewer documents, or none at all."""
    index, least = question
    for used in (*range(max(size, least), least, -source.step), least):
        draft = source.draft(used, index)
        length = job.tokens(draft.measured or draft.text) + job.budget
        if length <= job.length:
            return draft, length
    return None
