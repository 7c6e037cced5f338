"""Samples stay what they are: in every process, on every machine, and in the next release of the same task version."""

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

import tasks
from evalsuite.types import Setting
from tasks.ruler.exact import ask
from tasks.ruler.haystack import NeedleHaystack, TextHaystack
from tasks.ruler.templates import NIAH_TASKS
from tests.tasks.test_splice import Letters

TEXT = " ".join(f"Sentence number {'abcdefghij'[i % 10] * (i % 7 + 1)} of the text is here." for i in range(300))
# A change here changes what a published number means: raise the task's `version` with it.
QUESTIONS = "5deb294872c2fcc8c0cac4bd609215d3c14d49fb10542d6e3a7d560a0f2e13fc"
PROMPTS = "e29332d17a2d7b637abe5d19b60c37792096bdd82f805f7f25c7c6e8df4e7983"
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.tasks.test_frozen import prompts, questions
print(questions(), prompts({folder!r}))
"""


def questions() -> str:
    """Digest of what the first samples of every task ask."""
    lines = []
    for spec in NIAH_TASKS:
        haystack = NeedleHaystack(spec, 42) if spec.haystack == "needle" else TextHaystack("text", TEXT)
        lines += [repr(ask(spec, 42, i, haystack, None)) for i in range(5)]
    return sha256("\n".join(lines).encode()).hexdigest()


def prompts(folder: str) -> str:
    """Digest of the first prompts of every task, at two lengths of a tokenizer that has a token a letter."""
    file = Path(folder) / "frozen-haystack.txt"
    file.write_text(TEXT)
    found = sha256()
    for spec in NIAH_TASKS:
        for length in (2500, 9000):
            setting = Setting("exact", length, 3, options={"haystack": str(file)})
            for sample in tasks.get(spec.name).samples(setting, Letters()):
                found.update(sample.requests[0].prompt.ids.tobytes())
    return found.hexdigest()


def test_the_questions_are_frozen() -> None:
    assert questions() == QUESTIONS


def test_the_prompts_are_frozen(tmp_path: Path) -> None:
    assert prompts(str(tmp_path)) == PROMPTS


def test_another_process_with_another_hash_seed_makes_the_same(root: Path, tmp_path: Path) -> None:
    script = SCRIPT.format(root=str(root), folder=str(tmp_path))
    environment = {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=root)
    assert done.stdout.split() == [QUESTIONS, PROMPTS], done.stderr


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_the_needle_is_within_one_sentence_of_its_depth(trained: Callable, name: str) -> None:
    tokenizer = trained("plain")
    for length in (1024, 3000):
        for sample in tasks.get(name).samples(Setting("exact", length, 25), tokenizer):
            _, *context, _ = sample.requests[0].prompt.text.split("\n")
            spec = next(spec for spec in NIAH_TASKS if spec.name == name)
            first = next(key for key, value in sample.facts["needles"] if value == sample.target[0])
            before, after = spec.separator.join(context).split(spec.needle(first, sample.target[0]))
            hay = [len(tokenizer.encode(part)) for part in (before, after)]
            sentences = [len(tokenizer.encode(part)) for part in context if part] if len(context) > 1 else [60]
            assert abs(hay[0] - sample.depth * sum(hay)) <= max(sentences) + 60
