"""What the engine saves on real data, what it costs beside a model, and that memory does not grow with the context."""

import json
import os
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from evalsuite.plan import Ask, make_plan
from evalsuite.runner import run
from evalsuite.types import Generate, LogLikelihood, ModelInfo, Prompt, Response, Sample, Score
from gdn2 import zoo
from gdn2.tokenizer import load_tokenizer

OURS = Path(zoo.__file__).with_name("tokenizer.json")


def as_prompt(tokenizer, text):
    return Prompt(np.array(tokenizer.encode(text), np.int32), text)


@pytest.fixture(scope="module")
def hellaswag(shared):
    """The first questions of the validation set, asked as lm-eval asks them: (context, four endings)."""
    with tarfile.open(shared / "data" / "hellaswag.tar.xz") as archive:
        lines = archive.extractfile("hellaswag/hf/validation.query.jsonl")
        rows = [json.loads(line) for _, line in zip(range(150), lines, strict=False)]
    return [(row["query"], [f" {ending}" for ending in row["endings"]]) for row in rows]


def lm_eval_reads(requests):
    """Tokens lm-eval's HFLM runs for them: each context with its continuation less its last token, without padding."""
    return sum(len(r.context.ids) + len(r.continuation.ids) - 1 for r in requests)


def test_hellaswag_reads_half_and_says_the_same(small, hellaswag):
    tokenizer = load_tokenizer(str(OURS))
    requests = [
        LogLikelihood(as_prompt(tokenizer, query), as_prompt(tokenizer, ending))
        for query, endings in hellaswag
        for ending in endings
    ]
    shared_, plain = small.make(vocabulary=2048), small.make(vocabulary=2048, share_prefixes=False)
    few = requests[:40]
    assert small.answers(shared_, few) == small.answers(plain, few)
    backend = small.make(vocabulary=2048)
    assert len(small.answers(backend, requests)) == 600
    assert backend.tokens_read <= lm_eval_reads(requests) / 1.85


def test_needles_in_one_haystack_read_little_more_than_half(small, monkeypatch):
    import tasks

    backend = small.make(vocabulary=2048)
    backend.tokenizer = load_tokenizer(str(OURS))
    (task,) = tasks.resolve("niah_single_2")
    plan = make_plan(backend, [task], Ask((4096,), 40))
    requests = [request for cell in plan.cells for sample in cell.samples() for request in sample.requests]
    few = [Generate(r.prompt, 3) for r in requests]
    monkeypatch.setattr(backend.model, "forward", partial(_costless, backend.model))
    monkeypatch.setattr(backend.model, "step", lambda ids, state: torch.zeros(len(ids), 32))
    assert len(dict(backend.answer(few))) == 40
    assert backend.tokens_read <= 0.6 * sum(len(r.prompt.ids) for r in few)


def _costless(model, ids, ragged, state=None):
    """In place of the model: hidden states and recurrent states of the right shape."""
    return torch.zeros(len(ids), model.config.d_model), model.new_state(ragged.n_sequences)


class Free:
    """A model that answers at once."""

    def __init__(self, tokenizer):
        identity = {"device": "cpu", "dtype": "none", "kernels": "none"}
        self.tokenizer = tokenizer
        self.info = ModelInfo("free", "none", "other", 0, "0" * 64, tokenizer.digest, None, {"identity": identity})

    def answer(self, requests):
        for index, request in enumerate(requests):
            if isinstance(request, Generate):
                yield index, Response(text="none", tokens=1, ended="length")
            else:
                yield index, Response(logprob=-1.0, greedy=True)


class Choices:
    """2,500 questions with four answers."""

    name, version, suite, has_lengths, protocols = "many", 1, "test", False, ("exact",)

    def samples(self, setting, tokenizer):
        out = []
        for i in range(2500):
            context = as_prompt(tokenizer, f"Question {i}: what is {i} times two?")
            choices = [as_prompt(tokenizer, f" {c * i}") for c in range(4)]
            out.append(Sample(str(i), tuple(LogLikelihood(context, choice) for choice in choices), ("0",)))
        return out

    def data_digest(self, setting):
        return "none"

    def score(self, sample, responses):
        return [Score("acc", float(responses[0].logprob == -1.0), "0", "0")]


def spent(directory, task, ask):
    """Seconds of this process's own work, which a busy machine does not change."""
    backend = Free(load_tokenizer(str(OURS)))
    began = time.process_time()
    outcome = run(make_plan(backend, [task], ask), backend, directory, {}, lambda text: None)
    return outcome, time.process_time() - began


def test_ten_thousand_likelihoods_cost_three_seconds_at_most(tmp_path):
    outcome, seconds = spent(tmp_path, Choices(), Ask((1024,)))
    assert outcome.answered == 2500 and outcome.failed == 0
    assert seconds < 3


def test_five_hundred_long_needles_cost_three_seconds_at_most(tmp_path):
    import tasks

    (task,) = tasks.resolve("niah_single_2")
    outcome, seconds = spent(tmp_path, task, Ask((32768,), 500))
    assert outcome.answered == 500 and outcome.failed == 0
    assert seconds < 3


def test_scheduling_ten_thousand_likelihoods_costs_three_seconds_at_most(small, monkeypatch):
    """Merging, batching and scoring alone: the model itself is replaced by zeros."""
    backend = small.make()
    tokenizer = backend.tokenizer
    requests = [r for sample in Choices().samples(None, tokenizer) for r in sample.requests]
    monkeypatch.setattr(backend.model, "forward", partial(_costless, backend.model))
    began = time.process_time()
    assert len(dict(backend.answer(requests))) == 10_000
    seconds = time.process_time() - began
    assert seconds < 3


READ_AND_ANSWER = """
import random, resource, sys
sys.path[:0] = [sys.argv[1]]
import small
from evalsuite.types import Generate
backend = small.make(batch_tokens=2048)
((_, response),) = backend.answer([Generate(small.prompt(random.Random(0), int(sys.argv[2])), 4)])
assert response.error is None and backend.tokens_read == int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(root, tokens):
    """Peak memory of a process that reads a prompt of so many tokens and answers."""
    command = [sys.executable, "-c", READ_AND_ANSWER, str(Path(__file__).parent), str(tokens)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_context(root):
    short = peak_kib(root, 8192)
    assert peak_kib(root, 1 << 18) < 1.1 * short


@pytest.mark.slow
def test_a_million_tokens_run_to_the_end(root):
    assert peak_kib(root, 1 << 20) < 1.1 * peak_kib(root, 8192)
