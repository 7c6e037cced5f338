"""Recall from real documents in the cloze form of Just Read Twice (Arora et al. 2024, arXiv:2407.05483): Table 4.

    ... The application was received on May 4. Device type: -> " Class II"

A document, cut to the window around its answer, and the beginning of a sentence that only the document can finish. What
a model says before a line break is right where it contains the answer. The paper does not give every setting of its
runs; each is a field of profile `jrt` with the likeliest value as its default (in brackets), and records show them all:

    window   tokens of document and answer together [2048]
    answer   of these, tokens kept free for the answer [50]
    cut      answer: the window lies around the answer; none: documents are not cut [answer]
    keys     what the window is laid around: fields of the row joined by +, or none: the window begins with the document
             [swde, fda: key+value; squad: value; nq: answers; triviaqa, drop: none]
    bos      whether prompts begin with BOS, where the model has one; the cutter counts it in any case [no]
    asked    once, or twice: question, document, document, question (JRT-Prompt; for squad the form is ours) [once]
    tokens   the longest answer [48]
    listing  swde: dropped, or kept: the listing of other facts before the question [dropped]
    length   nq: tokens the documents were prepared for, 512, 1024 or 2048 [2048]

A document one of whose `keys` has fewer than two letters is left out, as the originals do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evalsuite.scorers import contains
from evalsuite.types import (
    Decision,
    Field,
    Generate,
    Prompt,
    Response,
    Sample,
    Score,
    Setting,
    Tokenizer,
    expanded,
    field_values,
)
from tasks import data
from tasks.data import Dataset, Row

METRIC = "contains"
PROTOCOL = "jrt"
SUMMARY = "Summary of information above..."
_WHOLE = r"[1-9][0-9]{0,6}"
_TAGS = re.compile(r"\[PAR\]|\[DOC\]|\[TLE\]")

Build = Callable[[Row, Mapping[str, str]], str]


def cut(tokenizer: Tokenizer, text: str, row: Row, keys: Sequence[str], room: int) -> str | None:
    """The `room` tokens of `text` around its answer: at most half of them before it; None where the row is left out.

    The answer is the earliest place where one of the row's `keys` is written, else one of its alternative answers.
    Where there is none the second half of the window ends with the text, or it lies around the place the row names.
    Without keys the window begins with the text. Tokens are counted with BOS, where there is one.
    """
    text = text.strip()
    bos = int(tokenizer.bos_id is not None)
    place = -1
    for key in keys:
        answer = row[key]
        if not isinstance(answer, str):
            answer = answer[0] if answer else ""
        if len(answer) < 2:
            return None
        place = _earlier(place, text, answer)
    for answer in row.get("alt_answers", ()):
        if place >= 0:
            break
        place = _earlier(place, text, answer)
    if not keys:
        place = 0
    # One letter short of the whole where nothing was found: the index -1 of the originals.
    at = len(tokenizer.encode(text[:place])) + bos
    if place < 0 and row.get("tok_pos", -1) >= 0 and at > room:
        at = int(row["tok_pos"])
    ids = tokenizer.encode(text)
    start = max(0, at - room // 2)
    end = min(len(ids) + bos, start + room)
    return tokenizer.decode(ids[max(start - bos, 0) : max(end - bos, 0)])


def _earlier(place: int, text: str, answer: str) -> int:
    found = re.search(re.escape(answer), text, re.IGNORECASE)
    return place if found is None or 0 <= place < found.start() else found.start()


def without_question(text: str, question: str) -> str:
    """`text` without the question at its end, however often it stands there."""
    while question and text.lower().endswith(question.lower()):
        text = text[: -len(question)]
    return text


def _facts(row: Row, fields: Mapping[str, str]) -> str:
    """A form's text and the name of one of its entries: swde and fda."""
    key, swde = row["key"], "listing" in fields
    text = without_question(row["text"], f"{key}:")
    name = key[:1].upper() + key[1:]
    text = text.strip("\n")
    if fields["asked"] == "twice":
        text = text.strip(".").strip().strip("\n").strip() if swde else text.strip(".")
        text += "" if text.endswith(".") else "."
        return f"Information about {name.strip(':')}. {text}\n{text} {name}:"
    text = text.strip().strip("\n").strip().strip(".") + "." if swde else text.strip(".")
    return f"{text}{'' if text.endswith('.') else '.'} {name}:"


def _cloze(row: Row, fields: Mapping[str, str]) -> str:
    """A passage whose last sentence is to be finished: squad."""
    text = row["text"].strip()
    if fields["asked"] == "once":
        return str(text)
    passage, stop, question = text.rpartition(". ")
    return f"{question} {passage}{stop.strip()}\n{passage}{stop}{question}"


def _passage(row: Row, fields: Mapping[str, str]) -> str:
    """A passage and the beginning of the answer: drop."""
    question = row["question"].strip()
    return _asked(without_question(row["context"].strip(), question), question, row["orig_question"].strip(":"), fields)


def _tagged(row: Row, fields: Mapping[str, str]) -> str:
    """The same of several documents with tags between them: triviaqa."""
    question = row["question"].strip()
    context = without_question(_TAGS.sub("", row["context"].strip()), question)
    return _asked(context, question, row["orig_question"], fields)


def _page(row: Row, fields: Mapping[str, str]) -> str:
    """The same of a page, whose last words are left out once, and only as they are written: nq."""
    question = row["question"].strip()
    if fields["asked"] == "twice":
        return _passage(row, fields)
    return _asked(row["context"].strip().removesuffix(question), question, "", fields)


def _asked(context: str, question: str, before: str, fields: Mapping[str, str]) -> str:
    context = context.strip().strip(".")
    if fields["asked"] == "once":
        return f"{context}. {question}"
    context = f"{context.strip()}."
    return f"{before} {context}\n{context} {question}"


def _adapted(row: Row) -> Row:
    """A question's row with what only some rows have."""
    more = {"orig_question": row.get("orig_question") or row["question"], "alt_answers": [], "tok_pos": -1}
    return {**more, **row}


FORM_COLUMNS = {"text": "text", "key": "text", "value": "text"}
QUESTION_COLUMNS = {
    "context": "text",
    "question": "text",
    "answers": "texts",
    "orig_question": "text",
    "alt_answers": "texts",
    "tok_pos": "label",
}


def _dataset(name: str, columns: Mapping[str, str], records: int | None) -> Dataset:
    own = "based_" if "question" in columns else "based-"
    hub = f"hazyresearch/{own}{'swde-v2' if name == 'swde' else name}"
    adapt = _adapted if "question" in columns else None
    return Dataset(f"based_{name}", columns, hub, "validation", records=records, adapt=adapt)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class RecallTask:
    """A `Task` of the harness."""

    name: str
    sets: tuple[Dataset, ...]  # the last one is the default
    build: Build
    keys: str  # what the window is laid around
    context: str  # the column that is cut
    version: int = 1
    suite: str = "recall"
    has_lengths: bool = False
    protocols: tuple[str, ...] = (PROTOCOL,)

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """What it may read."""
        return self.sets

    @property
    def examples(self) -> int | None:
        """Rows of the complete set, those that are left out included; None where it depends on a field."""
        return self.sets[-1].records if len(self.sets) == 1 else None

    @property
    def fields(self) -> Mapping[str, Field]:
        names = "|".join(name for name in self.sets[-1].columns if name in ("key", "value", "answers"))
        own = {
            "window": Field("2048", _WHOLE, "a number of tokens"),
            "answer": Field("50", _WHOLE, "a number of tokens"),
            "cut": Field("answer", "answer|none", "answer or none"),
            "keys": Field(self.keys, rf"none|({names})(\+({names}))*", f"none, or some of {names.replace('|', ', ')}"),
            "bos": Field("no", "yes|no", "yes or no"),
            "asked": Field("once", "once|twice", "once or twice"),
            "tokens": Field("48", _WHOLE, "a number of tokens"),
        }
        if self.name == "swde":
            own["listing"] = Field("dropped", "dropped|kept", "dropped or kept")
        if len(self.sets) > 1:
            own["length"] = Field("2048", "512|1024|2048", "512, 1024 or 2048")
        return own

    def expand(self, profile: str) -> tuple[str, ...]:
        """The protocols a profile stands for, with every field; see `evalsuite.types.Adjustable`."""
        return expanded(self.name, self.protocols, self.fields, profile)

    def _dataset(self, fields: Mapping[str, str]) -> Dataset:
        wanted = f"_{fields.get('length', '')}"
        return next((one for one in self.sets if one.name.endswith(wanted)), self.sets[-1])

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """Of the first `setting.samples` rows those that are not left out. Raises DataError where there is no file."""
        fields = field_values(self.fields, setting.protocol)
        rows = data.rows(self._dataset(fields))[: setting.samples]
        return list(self._made(rows, fields, setting, tokenizer))

    def _made(
        self, rows: Sequence[Row], fields: Mapping[str, str], setting: Setting, tokenizer: Tokenizer
    ) -> Iterator[Sample]:
        keys = [] if fields["keys"] == "none" else fields["keys"].split("+")
        room = max(int(fields["window"]) - int(fields["answer"]), 1)
        budget = int(setting.options.get("budget", fields["tokens"]))
        bos = [tokenizer.bos_id] if fields["bos"] == "yes" and tokenizer.bos_id is not None else []
        for number, row in enumerate(rows):
            if fields.get("listing") == "dropped":
                row = {**row, "text": row["text"].partition(SUMMARY)[0]}
            if fields["cut"] == "answer":
                short = cut(tokenizer, row[self.context], row, keys, room)
                if short is None:
                    continue
                row = {**row, self.context: short}
            text = self.build(row, fields)
            references = tuple(row["answers"]) if "answers" in row else (str(row["value"]),)
            prompt = Prompt(np.array(bos + tokenizer.encode(text), dtype=np.int32), text)
            request = Generate(prompt, budget, ("\n",), Decision(references, "any"))
            yield Sample(str(number), (request,), references)

    def data_digest(self, setting: Setting) -> str:
        """sha256 of the file."""
        return data.digest(self._dataset(field_values(self.fields, setting.protocol)))

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """1 where what was said before the line break contains an answer, case ignored."""
        (response,) = responses
        target = ", ".join(sample.target)
        if not sample.target:
            return [Score(METRIC, None, target, response.text, "error", error="the record has no answer")]
        found = any(contains(response.text, reference) for reference in sample.target)
        outcome = "target" if found else "other" if response.text.strip() else "nothing"
        return [Score(METRIC, float(found), target, response.text, outcome)]


_NQ = tuple(_dataset(f"nq_{n}", QUESTION_COLUMNS, 3157 if n == 2048 else None) for n in (512, 1024, 2048))
TASKS = (
    RecallTask("swde", (_dataset("swde", FORM_COLUMNS, 1111),), _facts, "key+value", "text"),
    RecallTask("squad", (_dataset("squad", {"text": "text", "value": "text"}, 2984),), _cloze, "value", "text"),
    RecallTask("fda", (_dataset("fda", FORM_COLUMNS, 1102),), _facts, "key+value", "text"),
    RecallTask("triviaqa", (_dataset("triviaqa", QUESTION_COLUMNS, 1688),), _tagged, "none", "context"),
    RecallTask("nq", _NQ, _page, "answers", "context"),
    RecallTask("drop", (_dataset("drop", QUESTION_COLUMNS, 2087),), _passage, "none", "context"),
)
