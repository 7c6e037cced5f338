"""vt, cwe, fwe and qa against what the generators they reproduce write.

lm-eval's own functions run here. NVIDIA's code is not a package: each digest is the sha256 of the lines that its
functions (main branch, and the scripts of 2024) wrote once for these arguments, `json.dumps` and a newline a record.
"""

import contextlib
import importlib
import io
import json
import random
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tasks.ruler import cwe, fwe, qa, vt
from tasks.ruler.search import Job, Made

MODULES = {"vt": vt, "cwe": cwe, "fwe": fwe}
NVIDIA = [
    ("vt", "nvidia-2024", 1024, "4ca3ad257e76f1aa83bda6aedaedd36ff0332f5e5524be844de6cd2e6683a3d4"),
    ("vt", "nvidia-2024", 4096, "f3ea269d3a28da17ae1c09661acc0de624d7d4aee889ffa6c6b8747e0da8b57c"),
    ("cwe", "nvidia-2024", 1024, "e8d6c5e5f32297476b28df42f8374808bea2b85d22d8fb80c5dd31a45b9f5dde"),
    ("cwe", "nvidia-2024", 4096, "6a38d48761d6417ca21f44bbe2a399e3464344adac09897c5e02eed059887ad5"),
    ("cwe", "nvidia-main", 1024, "4947bf602113629cb57be947a55ffc7de2f4eafaa0fc932212b4bb02440407f3"),
    ("cwe", "nvidia-main", 4096, "c188eab8386256fc0b1926405ff2e861aae98e4cca8ba633257cda226cecf70d"),
    ("fwe", "nvidia-2024", 1024, "0453208ef09074a90a54b0c1885c96c8e7df16183b8a7a252d06a38497a3554b"),
    ("fwe", "nvidia-2024", 4096, "741fd41cf5c7a567771179d30c4ad23b6669087dc3b6d35909d72a11512b5b7e"),
    ("fwe", "nvidia-main", 1024, "70997f1edb57a22a0d0b0ef2c32c58f39247c71b2fbe0b71c94615ae68242d6e"),
    ("fwe", "nvidia-main", 4096, "a56e04301f8406bf7b844ef11229cbe0ae2fee6e2f865d1163414a5d43742133"),
    ("qa_1", "nvidia-2024", 2048, "bc8ccda3bfe721e931d3e2abf89dfc47b9baa50d7b7562a450bd8139fa81f19c"),
    ("qa_1", "nvidia-2024", 4096, "af2cfc93dc1a5d513e2dd0959a11f2a631f165b844d966d80f7ad2829d08f975"),
    ("qa_1", "nvidia-main", 2048, "349b0355a8c8f01c52bea121bf71feecf51303edb63cce63b2d1e2f1b0c6e03d"),
    ("qa_1", "nvidia-main", 4096, "383ffdbe9cd32e3fab93ac3ee7cd900ab41be554d5ffda45c90084271f78d19d"),
    ("qa_2", "nvidia-2024", 4096, "e1e56ac8daf967d64e2fb36d1827b355ff6bba2473564a12604767057a076ee4"),
    ("qa_2", "nvidia-main", 4096, "1e5ca13a3379250d05e4ef639f50e07a1ae1b4a07afddd5b9068975784b4bccd"),
]


def made(name: str, profile: str, length: int, tokenizer: object, corpora: dict, count: int) -> list[Made]:
    if name in MODULES:
        job = Job(name, profile, length, tokenizer, 42, MODULES[name].BUDGET)
        return list(islice(MODULES[name].compatible(job), count))
    return list(qa.compatible(Job(name, profile, length, tokenizer, 42, qa.BUDGET), corpora[name], count))


def lines(samples: list[Made]) -> str:
    return "".join(json.dumps(sample.record) + "\n" for sample in samples)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds, and its talk kept to itself."""
    state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    random.setstate(state[0])
    np.random.set_state(state[1])


class Calling:
    """Our tokenizer, called as transformers' is."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> object:
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        return type("Encoded", (), {"input_ids": bos + self._tokenizer.encode(text)})


@pytest.fixture(scope="session")
def corpora(qa_files: dict[str, Path]) -> dict[str, qa.Corpus]:
    return {
        "qa_1": qa.squad_corpus(list(qa.squad_original(qa_files["qa_1"]))),
        "qa_2": qa.hotpotqa_corpus(list(qa.hotpotqa_original(qa_files["qa_2"]))),
    }


def test_the_golden_chains(public: Callable, shared: Path) -> None:
    golden = (shared / "golden" / "ruler" / "nvidia-main" / "vt@2048.jsonl").read_text("ascii")
    assert lines(made("vt", "nvidia-main", 2048, public("gpt-neox"), {}, golden.count("\n"))) == golden


@pytest.mark.parametrize(("name", "profile", "length", "digest"), NVIDIA)
def test_equal_to_nvidias_byte_for_byte(
    public: Callable, corpora: dict, name: str, profile: str, length: int, digest: str
) -> None:
    samples = made(name, profile, length, public("gpt-neox"), corpora, 10)
    assert len(samples) == 10
    assert sha256(lines(samples).encode("ascii")).hexdigest() == digest


def theirs(name: str, length: int, tokenizer: object, corpora: dict, count: int) -> list[dict]:
    """What lm-eval 0.4.13 makes."""
    tool = importlib.import_module(f"lm_eval.tasks.ruler.{name.partition('_')[0]}_utils")
    if name == "cwe":
        importlib.reload(tool)  # its stream of shuffles runs on from call to call
    call = Calling(tokenizer)
    with seeded():
        if name == "vt":
            example = tool.sys_vartrack_w_noise_random(call, num_samples=1, max_seq_length=500, incremental=5)[0]
            return tool.sys_vartrack_w_noise_random(call, count, length, icl_example=example)
        if name == "cwe":
            return tool.sys_word_pair_random(count, length, tokenizer=call)
        if name == "fwe":
            return tool.sys_kwext(call, length, num_samples=count)
        corpus = corpora[name]
        asked = [
            {"query": q.query, "outputs": list(q.answers), "context": list(q.given), "more_context": list(q.related)}
            for q in corpus.questions
        ]
        return tool.generate_samples(call, list(corpus.documents), asked, length, num_samples=count)


@pytest.mark.parametrize("tokenizer", ["gpt-neox", "llama2"])
@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", ["vt", "cwe", "fwe", "qa_1", "qa_2"])
def test_equal_to_lm_evals_own_functions(
    public: Callable, corpora: dict, name: str, length: int, tokenizer: str
) -> None:
    length = max(length, 2048) if name == "qa_2" else length  # its documents of few questions fit 1024
    count = 4 if length == 4096 else 8
    want = json.loads(json.dumps(theirs(name, length, public(tokenizer), corpora, count)))
    got = json.loads(
        lines(made(name, "lm-eval", length, public(tokenizer), corpora, count)).replace("}\n{", "},{").join("[]")
    )
    assert got == want and got


def test_the_corpora_are_read_as_lm_eval_reads_them(corpora: dict, qa_files: dict[str, Path], monkeypatch) -> None:
    tool = importlib.import_module("lm_eval.tasks.ruler.qa_utils")
    for name, read in (("qa_1", tool.read_squad), ("qa_2", tool.read_hotpotqa)):
        monkeypatch.setattr(tool, "download_json", lambda url, name=name: json.loads(qa_files[name].read_text("utf-8")))
        asked, documents = read.__wrapped__()
        assert list(corpora[name].documents) == documents
        ours = [
            {"query": q.query, "outputs": list(q.answers), "context": list(q.given)} for q in corpora[name].questions
        ]
        assert ours == [{k: v for k, v in one.items() if k != "more_context"} for one in asked]
        assert [list(q.related) for q in corpora[name].questions] == [one.get("more_context", []) for one in asked]
