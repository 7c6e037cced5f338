"""Where the documents of qa_1 and qa_2 come from."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from gdn2 import env
from gdn2.errors import DataError
from tasks.ruler import qa

FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}


def _path(name: str) -> Path:
    path = env.cache_dir() / FILES[name]
    if not path.is_file():
        raise DataError(f"{path} is missing")
    return path


def data_digest(name: str) -> str:
    return sha256(_path(name).read_bytes()).hexdigest()


@lru_cache(maxsize=2)
def corpus(name: str) -> qa.Corpus:
    if name == "qa_1":
        return qa.squad_corpus(list(qa.squad_original(_path(name))))
    return qa.hotpotqa_corpus(list(qa.hotpotqa_original(_path(name))))
