"""The parts of RULER's five other tasks: length searches, laws of frequency, readers of documents, frozen samples."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from evalsuite.types import Setting
from gdn2.errors import UserError
from tasks.ruler import cwe, fwe, lists, qa, search, vt
from tasks.ruler.compat import PROFILES
from tasks.ruler.documents import Library, Shelf
from tasks.ruler.search import Draft, Job
from tests.tasks.test_splice import Letters

# A change here changes what a published number means: raise the task's `version` with it.
FROZEN = {
    "vt": "580702a606fe8a2633619f6cc9ee3634a25cc1bcbb74217495838ce09214093e",
    "cwe": "6a43416453452e478242d7c5b2ad7b43346ab824cd99e3d1d1ca583396a8b4dc",
    "fwe": "ced1261be4c2f1e5031b0c5e529d8749f4777215fbd7d27516273ec26f727f8a",
}
PARAGRAPHS = [
    {"context": "B text.", "qas": [{"question": "b?", "answers": [{"text": "B"}], "is_impossible": False}]},
    {"context": "A text.", "qas": [{"question": "no?", "answers": [], "is_impossible": True}]},
]
HOTPOT = {
    "question": "who?",
    "answer": "Ann",
    "supporting_facts": [["Two", 0]],
    "context": [["One", ["First.", " Second."]], ["Two", ["Ann."]]],
}


class Words:
    """A source whose size is its number of words; some draws fail."""

    step, most, search_extra, sample_extra = 10, 80, 0, 0

    def __init__(self, fails: int = 0) -> None:
        self.sizes: list[int] = []
        self.fails = fails

    def first_probe(self) -> tuple[int, int]:
        return self.step, 3

    def probe(self, size: int) -> str:
        self.sizes.append(size)
        return "a" * size

    def draft(self, size: int, index: int) -> Draft:
        if self.fails > 0:
            self.fails -= 1
            raise ValueError("no such sample")
        return Draft("a" * (size + index), ("x",))

    def finish(self, draft: Draft) -> Draft:
        return draft


def job(profile: str, length: int, budget: int = 5) -> Job:
    return Job("words", profile, length, Letters(), 42, budget)


@given(st.integers(30, 400))
def test_both_searches_find_the_largest_size_they_can(length: int) -> None:
    room = length - 5
    assert search.bisect(job("nvidia-main", length), Words()) == max(min(room, 3 * length), 10)
    climbed = search.climb(job("nvidia-2024", length), Words())
    # A probe that meets the length exactly is stepped past, as upstream does.
    want = room // 10 * 10 + 10 * (room % 10 == 0)
    assert climbed == min(want, 80)


def test_a_sample_too_long_is_drawn_again_a_step_smaller() -> None:
    draft, length = search.fitted(job("nvidia-2024", 60), Words(), 50, 12)
    assert (len(draft.text), length) == (52, 57)
    draft, _ = search.fitted(job("nvidia-main", 60), Words(fails=2), 50, 0)
    assert len(draft.text) == 30
    with pytest.raises(UserError, match="too short for words in profile nvidia-main; use at least 25"):
        search.fitted(job("nvidia-main", 20), Words(), 40, 10)
    with pytest.raises(UserError, match="too short"):
        search.fitted(job("nvidia-main", 60), Words(fails=1000), 10, 0)


def test_every_probe_of_the_golden_chain_search(
    public: Callable, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes tried and tokens counted are those that the reference's search logged."""
    (row,) = [
        r for r in json.loads((shared / "golden/ruler/fits.json").read_text())["nvidia-main"] if r["task"] == "vt"
    ]
    probes: list[list[int]] = []
    probe = vt._Source.probe

    def noted(source: vt._Source, size: int) -> str:
        text = probe(source, size)
        extra = source.search_extra + source.job.budget
        probes.append([size, len(source.job.tokenizer.encode(text)) + extra])
        return text

    monkeypatch.setattr(vt._Source, "probe", noted)
    next(vt.compatible(Job("vt", "nvidia-main", 2048, public("gpt-neox"), 42, 30)))
    size = len(row["example_search"])
    assert probes[1 : 1 + size] == row["example_search"]
    assert probes[2 + size :] == row["search"]  # after the estimates that begin the two searches


def test_ranks_follow_the_law() -> None:
    counts = fwe.counts(10_000, 50)
    assert counts[0] == int(10_000 * 6 / np.pi**2) and counts[1] == int(10_000 * 6 / np.pi**2 / 4)
    assert (np.diff(counts) <= 0).all() and 9_000 < counts.sum() < 10_000
    words = fwe.vocabulary(random.Random(1), 300)
    assert words == sorted(set(words)) and len(words) == 300 and {len(word) for word in words} == {6}


def test_lists_are_numbered_from_one() -> None:
    assert cwe.numbered(["a", "b c"]) == "1. a 2. b c"
    assert cwe.repeats(4095) == (6, 1) and cwe.repeats(4096) == (30, 3)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.randoms())
def test_stretches_are_gathered_in_order(sizes: list[int], rng: random.Random) -> None:
    rows = [[rng.randrange(99) for _ in range(size)] for size in sizes]
    lengths = np.array(sizes)
    order = np.array([rng.randrange(len(rows)) for _ in range(12)])
    flat = np.array([i for row in rows for i in row], dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    got = lists.gathered(flat, starts[order], lengths[order])
    assert got.tolist() == [i for j in order for i in rows[j]]


def test_documents_are_read_from_original_files(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"title": "T", "paragraphs": PARAGRAPHS}]}))
    corpus = qa.squad_corpus(list(qa.squad_original(file)))
    assert corpus.documents == ("A text.", "B text.")
    assert corpus.questions == (qa.Question("b?", ("B",), (1,), (0,), (1,)),)
    hub = {"title": "T", "context": "B text.", "question": "b?", "answers": {"text": ["B"], "answer_start": [0]}}
    assert qa.squad_adapt(hub) == {"title": "T", "context": "B text.", "question": "b?", "outputs": ["B"]}
    own = qa.hotpotqa_adapt(HOTPOT)
    titles, sentences = zip(*HOTPOT["context"], strict=True)
    facts = {"title": ["Two"], "sent_id": [0]}
    assert own == qa.hotpotqa_adapt(
        HOTPOT | {"context": {"title": titles, "sentences": sentences}, "supporting_facts": facts}
    )
    corpus = qa.hotpotqa_corpus([own])
    assert corpus.documents == ("One\nFirst. Second.", "Two\nAnn.")
    assert corpus.questions[0].given == (0, 1) and corpus.questions[0].needed == (1,)


@pytest.mark.parametrize("name", FROZEN)
def test_samples_are_frozen(name: str) -> None:
    found = sha256()
    for sample in tasks.get(name).samples(Setting("exact", 9000, 3), Letters()):
        found.update(sample.requests[0].prompt.ids.tobytes())
    assert found.hexdigest() == FROZEN[name]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.tasks.test_ruler_parts import digests
print(*digests())
"""


def digests() -> list[str]:
    """Of the first questions made from documents of our own, in every profile."""
    texts = [f"Entry {i}\nThe fact of entry {i} is that stone {i * 7} lies under oak {i * 11}." * 4 for i in range(60)]
    asked = [qa.Question(f"What lies under oak {i * 11}?", (f"stone {i * 7}",), (i,), (i + 1,), (i,)) for i in range(9)]
    corpus = qa.Corpus(tuple(asked), tuple(texts))
    shelf = Shelf(Library(Letters(), corpus), "qa_1", 42, 6000, 32)
    found = [sha256(shelf.build(i)[1].tobytes()).hexdigest() for i in (0, 8)]
    for profile in PROFILES:
        made = qa.compatible(Job("qa_1", profile, 6000, Letters(), 42, 32), corpus, 3)
        found.append(sha256("".join(json.dumps(one.record) for one in made).encode()).hexdigest())
    return found


def test_another_process_with_another_hash_seed_makes_the_same(root: Path) -> None:
    environment = {"PYTHONHASHSEED": "321", "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(root=str(root))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=root)
    assert done.stdout.split() == digests(), done.stderr
    assert len(set(digests())) == 2 + len(PROFILES) - 1  # without the prefix only the prompt differs
