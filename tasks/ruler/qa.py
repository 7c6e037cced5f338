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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.ruler import search
from tasks.ruler.search import Draft, Job, Made

BUDGET = 32
ANSWER_PREFIX = " Answer:"
_ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
OPENING = f"{_ORDER}\n\nThe following are given documents.\n\n"
Row = Mapping[str, Any]


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


def squad_corpus(rows: Iterable[Row]) -> Corpus:
    """Questions of SQuAD rows (title, context, question, outputs); those without outputs cannot be answered."""
    articles: dict[str, dict[str, None]] = {}
    for row in rows:
        articles.setdefault(row["title"], {})[row["context"]] = None
    documents = sorted({text for texts in articles.values() for text in texts})
    place = {text: i for i, text in enumerate(documents)}
    numbers = {title: [place[text] for text in texts] for title, texts in articles.items()}
    questions = []
    for row in rows:
        given = (place[row["context"]],)
        related = tuple(i for i in numbers[row["title"]] if i != given[0])
        if row["outputs"]:
            questions.append(Question(row["question"], tuple(row["outputs"]), given, related, given))
    return Corpus(tuple(questions), tuple(documents))


def hotpotqa_corpus(rows: Iterable[Row]) -> Corpus:
    """Questions of HotpotQA rows (question, outputs, titles, documents, facts)."""
    texts = [[f"{title}\n{text}" for title, text in zip(r["titles"], r["documents"], strict=True)] for r in rows]
    documents = sorted({text for row in texts for text in row})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for row, own in zip(rows, texts, strict=True):
        given = tuple(place[text] for text in own)
        needed = tuple(place[text] for title, text in zip(row["titles"], own, strict=True) if title in row["facts"])
        questions.append(Question(row["question"], tuple(row["outputs"]), given, (), needed or given))
    return Corpus(tuple(questions), tuple(documents))


def squad_adapt(row: Row) -> Row:
    """Our columns of a row of the hub's squad_v2."""
    names = ("title", "context", "question")
    return {name: row[name] for name in names} | {"outputs": list(row["answers"]["text"])}


def squad_original(path: Path) -> Iterator[Row]:
    """Rows of SQuAD 2.0's own file."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [] if asked.get("is_impossible") else [answer["text"] for answer in asked["answers"]]
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "outputs": answers,
                }


def hotpotqa_adapt(row: Row) -> Row:
    """Our columns of a row of the hub's hotpot_qa, or of HotpotQA's own file."""
    context, facts = row["context"], row["supporting_facts"]
    if isinstance(context, Mapping):
        context = list(zip(context["title"], context["sentences"], strict=True))
        facts = [[title] for title in facts["title"]]
    return {
        "question": row["question"],
        "outputs": [row["answer"]],
        "titles": [title for title, _ in context],
        "documents": ["".join(sentences) for _, sentences in context],
        "facts": [fact[0] for fact in facts],
    }


def hotpotqa_original(path: Path) -> Iterator[Row]:
    """Rows of HotpotQA's own file, one list."""
    yield from map(hotpotqa_adapt, json.loads(path.read_text(encoding="utf-8")))


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


def compatible(job: Job, corpus: Corpus, count: int) -> Iterator[Made]:
    """Samples of a profile that reproduces another generator: of the first `count` questions; lm-eval's of those that
    fit."""
    source = _Source(job, corpus)
    size = search.bisect(job, source) if job.bisects else search.climb(job, source)
    for index, question in enumerate(corpus.questions[:count]):
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
