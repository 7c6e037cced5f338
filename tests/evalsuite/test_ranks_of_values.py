"""The rank of a teacher-forced continuation: 1 exactly where it is greedy, and the same in any batch."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.backends.reading import ranks
from evalsuite.backends.scripted import ScriptedBackend, nothing
from evalsuite.plan import _request_digest
from evalsuite.types import Generate, LogLikelihood, Prompt, Response
from tests.evalsuite.small import Letters, make, prompt


def pair(rng, n, m, front=(), ranked=True):
    return LogLikelihood(prompt(rng, n, front), prompt(rng, m), ranked)


def answers(backend, requests):
    return dict(backend.answer(requests))


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6), st.randoms())
def test_a_rank_counts_the_better_and_the_equal_before(rows, rng):
    table = torch.tensor(rows, dtype=torch.float32)
    targets = torch.tensor([rng.randrange(5) for _ in rows])
    for row, target, got in zip(rows, targets.tolist(), ranks(table, targets).tolist(), strict=True):
        order = sorted(range(5), key=lambda i: (-row[i], i))
        assert got == order.index(target) + 1
        assert (got == 1) == (torch.tensor(row).argmax().item() == target)


@pytest.mark.parametrize("pattern", [("gdn2", "gdn2"), ("mamba2", "window"), ("full",)])
def test_ranks_agree_with_one_pass_of_the_model(pattern):
    rng = random.Random(5)
    backend = make(pattern)
    requests = [pair(rng, n, m) for n, m in ((3, 1), (70, 2), (64, 5), (200, 17), (1, 90))]
    found = answers(backend, requests)
    for index, request in enumerate(requests):
        ids = [*request.context.ids.tolist(), *request.continuation.ids.tolist()]
        worst = 0
        for at in range(len(request.context.ids), len(ids)):
            only = LogLikelihood(
                Prompt(np.array(ids[:at], np.int32), ""), Prompt(np.array(ids[at : at + 1], np.int32), ""), True
            )
            worst = max(worst, answers(backend, [only])[0].rank)
        assert found[index].rank == worst
        assert (found[index].rank == 1) == found[index].greedy


def test_ranks_are_the_same_alone_in_any_batch_and_shared_or_not():
    rng = random.Random(7)
    front = [rng.randrange(1, 64) for _ in range(150)]
    requests = [pair(rng, rng.randrange(1, 90), rng.randrange(1, 30), front) for _ in range(12)]
    requests += [pair(rng, 40, 4, front, ranked=False), Generate(prompt(rng, 20, front), 8)]
    together = answers(make(), requests)
    reference = [(r.rank, r.logprob, r.greedy, r.text) for _, r in sorted(together.items())]
    for backend in (make(batch_tokens=64), make(slots=2), make(share_prefixes=False)):
        got = answers(backend, requests)
        assert [(r.rank, r.logprob, r.greedy, r.text) for _, r in sorted(got.items())] == reference
    for index in (0, 5, 11):
        assert answers(make(), [requests[index]])[0].rank == reference[index][0]
    assert reference[12][0] is None and reference[13][0] is None
    assert all(1 <= row[0] <= 64 for row in reference[:12])


def test_asking_for_a_rank_changes_nothing_else():
    rng = random.Random(9)
    plain = [pair(rng, 30, m, ranked=False) for m in (1, 2, 3, 12, 70)]
    asked = [LogLikelihood(one.context, one.continuation, True) for one in plain]
    for (_, a), (_, b) in zip(
        sorted(answers(make(), plain).items()), sorted(answers(make(), asked).items()), strict=True
    ):
        assert (a.logprob, a.greedy, a.tokens) == (b.logprob, b.greedy, b.tokens)
        assert a.rank is None and (b.rank == 1) == b.greedy


def test_an_empty_continuation_ranks_first():
    rng = random.Random(1)
    (response,) = answers(make(), [LogLikelihood(prompt(rng, 9), Prompt(np.array([], np.int32), ""), True)]).values()
    assert (response.logprob, response.greedy, response.rank) == (0.0, True, 1)


def test_the_question_is_another_one_with_a_rank_and_the_old_one_is_unchanged():
    rng = random.Random(2)
    plain = pair(rng, 5, 2, ranked=False)
    assert _request_digest(plain) != _request_digest(LogLikelihood(plain.context, plain.continuation, True))
    assert Response().rank is None


def test_the_scripted_model_has_ranks_too():
    rng = random.Random(3)
    tokenizer = Letters()
    requests = [pair(rng, 5, 2, ranked=bool(i % 2)) for i in range(30)]
    for index, response in ScriptedBackend(nothing).answer(requests):
        assert (response.rank is None) == (index % 2 == 0)
        assert response.rank is None or (response.rank == 1) == response.greedy
    assert tokenizer.vocab_size == 64
