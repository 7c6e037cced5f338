"""Multiple-choice tasks of commonsense and reading, asked as lm-eval 0.4.13 asks them: zero-shot, by log-likelihood.

The wording and the scores are lm-eval's of the same names, request for request: `acc` takes the likeliest choice,
`acc_norm` the likeliest a character of the choice's text. Where choices tie the first one counts. The paper reports
`acc`, of HellaSwag `acc_norm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evalsuite.lm_eval_bridge.encoding import PROTOCOL, pairs
from evalsuite.types import Response, Sample, Score, Setting, Tokenizer
from gdn2.errors import DataError
from tasks import data
from tasks.data.formats import read_json_lines, read_text


@dataclass(frozen=True, slots=True)
class Question:
    """One question: `contexts[i]` before `endings[i]` asks for choice i; `choices` are what `acc_norm` measures."""

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int  # -1 where the row has none


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """A `Task` of the harness."""

    name: str
    dataset: data.Dataset
    ask: Callable[[data.Row], Question]
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    version: int = 1
    suite: str = "commonsense"
    has_lengths: bool = False
    protocols: tuple[str, ...] = (PROTOCOL,)

    @property
    def datasets(self) -> tuple[data.Dataset, ...]:
        return (self.dataset,)

    @property
    def examples(self) -> int | None:
        """Samples of the complete set."""
        return self.dataset.records

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The samples, in the order of the file. Raises DataError where the file is not there."""
        rows = data.rows(self.dataset)[: setting.samples]
        questions = [self._question(row, number) for number, row in enumerate(rows)]
        texts = [pair for q in questions for pair in zip(q.contexts, q.endings, strict=True)]
        requests = iter(pairs(tokenizer, texts))
        return [
            Sample(str(i), tuple(next(requests) for _ in q.endings), (_target(q),), facts={"question": q})
            for i, q in enumerate(questions)
        ]

    def _question(self, row: data.Row, number: int) -> Question:
        try:
            return self.ask(row)
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.dataset.name}, record {number + 1}: {error}") from None

    def data_digest(self, setting: Setting) -> str:
        """sha256 of the file."""
        return data.digest(self.dataset)

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """lm-eval's metrics; a label that names no choice is an error of each."""
        question = sample.facts["question"]
        assert isinstance(question, Question)
        logprobs = np.array([response.logprob for response in responses])
        return [self._score(metric, question, logprobs) for metric in self.metrics]

    def _score(self, metric: str, question: Question, logprobs: np.ndarray) -> Score:
        count = len(question.choices)
        with np.errstate(divide="ignore", invalid="ignore"):  # a choice without characters
            sizes = np.array([float(len(choice)) for choice in question.choices])
            values = logprobs / sizes if metric == "acc_norm" else logprobs
        best = int(np.argmax(values))
        target = _target(question)
        output = f"{question.choices[best]}\n{logprobs.tolist()}"
        if not 0 <= question.gold < count:
            error = f"label {question.gold} is not one of 0 to {count - 1}"
            return Score(metric, None, target, output, "error", error=error)
        tied = int((values == values[best]).sum()) > 1
        outcome = "tie" if tied else "target" if best == question.gold else "distractor"
        return Score(metric, float(best == question.gold), target, output, outcome)


def _target(question: Question) -> str:
    return question.choices[question.gold] if 0 <= question.gold < len(question.choices) else ""


def _one_context(context: str, choices: Sequence[str], gold: int) -> Question:
    endings = tuple(f" {choice}" for choice in choices)
    return Question((context,) * len(endings), endings, tuple(choices), gold)


def _ask_piqa(row: data.Row) -> Question:
    return _one_context(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"])


def _ask_hellaswag(row: data.Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _one_context(_unwiki(context), [_unwiki(ending) for ending in row["endings"]], row["label"])


def _unwiki(text: str) -> str:
    """Without the brackets that WikiHow's pages left."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _ask_winogrande(row: data.Row) -> Question:
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("the sentence has no gap (_)")
    contexts = (before + row["option1"], before + row["option2"])
    gold = {"1": 0, "2": 1}.get(row["answer"], -1)
    return Question(contexts, (f" {after.strip()}",) * 2, contexts, gold)


def _ask_arc(row: data.Row) -> Question:
    context = f"Question: {row['question']}\nAnswer:"
    return _one_context(context, row["choices"]["text"], _place(row, row["answerKey"]))


def _ask_openbookqa(row: data.Row) -> Question:
    return _one_context(row["question_stem"], row["choices"]["text"], _place(row, row["answerKey"].lstrip()))


def _place(row: data.Row, key: str) -> int:
    labels = row["choices"]["label"]
    return labels.index(key) if key in labels else -1


def _ask_siqa(row: data.Row) -> Question:
    choices = (row["answerA"], row["answerB"], row["answerC"])
    return _one_context(f"Q: {row['context']} {row['question']}\nA:", choices, row["label"] - 1)


def _ask_boolq(row: data.Row) -> Question:
    return _one_context(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), row["label"])


def _with_labels(path: Path, first: int = 0) -> Iterator[data.Row]:
    """Rows of a file whose labels lie beside it, NAME-labels.lst, one a line."""
    labels = read_text(path.with_name(f"{path.stem}-labels.lst")).split()
    rows = read_json_lines(path)
    if len(labels) != len(rows):
        raise DataError(f"{path} has {len(rows)} records, its labels are {len(labels)}")
    return ({**row, "label": int(label)} for row, label in zip(rows, labels, strict=True))


def _openbookqa_tsv(path: Path) -> Iterator[data.Row]:
    """Rows of the original table: ID, Question Stem, Choices ("(A) one (B) two ..."), ..., Answer Key."""
    header, *lines = read_text(path).rstrip("\n").split("\n")
    names = header.rstrip("\r").split("\t")
    for line in lines:
        row = dict(zip(names, line.rstrip("\r").split("\t"), strict=True))
        parts = re.split(r"\s*\(([A-D])\)\s*", row["Choices"])
        choices = {"text": [text.strip() for text in parts[2::2]], "label": parts[1::2]}
        yield {"question_stem": row["Question Stem"], "choices": choices, "answerKey": row["Answer Key"]}


def _arc_lines(path: Path) -> Iterator[data.Row]:
    """Rows of the original files, in which stem and choices are one object."""
    for row in read_json_lines(path):
        choices = row["question"]["choices"]
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
        found = {"text": texts, "label": labels}
        yield {"question": row["question"]["stem"], "choices": found, "answerKey": row["answerKey"]}


def _boolq_lines(path: Path) -> Iterator[data.Row]:
    """Rows of the original files, in which the label is a truth value called answer."""
    return ({**row, "label": int(row["answer"])} for row in read_json_lines(path))


_ARC: dict[str, data.Kind] = {"question": "text", "choices": "choices", "answerKey": "text"}

PIQA = data.Dataset(
    "piqa", {"goal": "text", "sol1": "text", "sol2": "text", "label": "label"},
    "baber/piqa", "validation", None, 1838, "AFL-3.0", original=_with_labels,
)  # fmt: skip
HELLASWAG = data.Dataset(
    "hellaswag", {"activity_label": "text", "ctx_a": "text", "ctx_b": "text", "endings": "texts", "label": "label"},
    "Rowan/hellaswag", "validation", None, 10042, "MIT",
)  # fmt: skip
WINOGRANDE = data.Dataset(
    "winogrande", {"sentence": "text", "option1": "text", "option2": "text", "answer": "text"},
    "allenai/winogrande", "validation", "winogrande_xl", 1267, "CC BY 2.0",
)  # fmt: skip
ARC_EASY = data.Dataset(
    "arc_easy", _ARC, "allenai/ai2_arc", "test", "ARC-Easy", 2376, "CC BY-SA 4.0", original=_arc_lines
)
ARC_CHALLENGE = data.Dataset(
    "arc_challenge", _ARC, "allenai/ai2_arc", "test", "ARC-Challenge", 1172, "CC BY-SA 4.0", original=_arc_lines
)
OPENBOOKQA = data.Dataset(
    "openbookqa", {"question_stem": "text", "choices": "choices", "answerKey": "text"},
    "allenai/openbookqa", "test", "main", 500, "Apache-2.0", original=_openbookqa_tsv,
)  # fmt: skip
SIQA = data.Dataset(
    "social_iqa", {
        "context": "text", "question": "text", "answerA": "text", "answerB": "text", "answerC": "text",
        "label": "label",
    },
    "lighteval/siqa", "validation", None, 1954, "none stated", original=_with_labels,
)  # fmt: skip
BOOLQ = data.Dataset(
    "boolq", {"passage": "text", "question": "text", "label": "label"},
    "aps/super_glue", "validation", "boolq", 3270, "CC BY-SA 3.0", original=_boolq_lines,
)  # fmt: skip

TASKS = [
    ChoiceTask("piqa", PIQA, _ask_piqa),
    ChoiceTask("hellaswag", HELLASWAG, _ask_hellaswag),
    ChoiceTask("winogrande", WINOGRANDE, _ask_winogrande, ("acc",)),
    ChoiceTask("arc_easy", ARC_EASY, _ask_arc),
    ChoiceTask("arc_challenge", ARC_CHALLENGE, _ask_arc),
    ChoiceTask("openbookqa", OPENBOOKQA, _ask_openbookqa),
    ChoiceTask("social_iqa", SIQA, _ask_siqa, ("acc",)),
    ChoiceTask("boolq", BOOLQ, _ask_boolq, ("acc",)),
]
