"""The documents of qa_1 and qa_2."""

from __future__ import annotations

from functools import lru_cache

from tasks.data import Dataset, digest, rows
from tasks.ruler import qa

_LICENCE = "CC BY-SA 4.0"
DATASETS = {
    "qa_1": Dataset(
        "squad_v2", {"title": "text", "context": "text", "question": "text", "outputs": "texts"},
        "rajpurkar/squad_v2", "validation", records=11873, licence=_LICENCE,
        adapt=qa.squad_adapt, original=qa.squad_original,
    ),
    "qa_2": Dataset(
        "hotpotqa", {"question": "text", "outputs": "texts", "titles": "texts", "documents": "texts", "facts": "texts"},
        "hotpotqa/hotpot_qa", "validation", config="distractor", records=7405, licence=_LICENCE,
        adapt=qa.hotpotqa_adapt, original=qa.hotpotqa_original,
    ),
}  # fmt: skip


def data_digest(name: str) -> str:
    """sha256 of the file behind task `name`. Raises DataError where it is not there."""
    return digest(DATASETS[name])


def corpus(name: str) -> qa.Corpus:
    """Questions and documents of task `name`. Raises DataError where they are not there."""
    return _corpus(name, data_digest(name))


@lru_cache(maxsize=2)
def _corpus(name: str, found: str) -> qa.Corpus:
    read = qa.squad_corpus if name == "qa_1" else qa.hotpotqa_corpus
    return read(rows(DATASETS[name]))
