"""Drawn tokens: softmax's distribution, of the tokens that top_k and top_p leave, and no answer depends on the rest."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evalsuite.backends import sampling
from evalsuite.backends.sampling import choose, draws, form, greedy
from evalsuite.plan import Ask, _request_digest, make_plan
from evalsuite.runner import run
from evalsuite.store import read_records
from evalsuite.types import Decision, Generate, Sample, Sampling, Score
from gdn2.ragged import Ragged

CPU = torch.device("cpu")
WAYS = [
    Sampling(1.0, 0), Sampling(0.2, 0), Sampling(3.0, 0), Sampling(1.0, 0, top_k=7), Sampling(0.7, 0, top_p=0.9),
    Sampling(2.0, 0, top_p=0.5), Sampling(1.5, 0, top_p=0.8, top_k=20), Sampling(1.0, 0, top_k=1),
]  # fmt: skip


def row(seed, n=60):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3


def expected(logits, how):
    """Probabilities by transformers' own rules for the same settings."""
    from transformers.generation import logits_process as rules

    table = logits.double()[None] / how.temperature
    if how.top_k:
        table = rules.TopKLogitsWarper(how.top_k)(None, table)
    if how.top_p < 1:
        table = rules.TopPLogitsWarper(how.top_p)(None, table)
    return table.softmax(-1)[0].numpy()


def likely(counts, wanted):
    """The p-value of counts beside what was expected, those of less than five together."""
    few = wanted < 5
    pairs = [np.append(x[~few], x[few].sum()) if few.any() else x for x in (counts, wanted)]
    counts, wanted = (x[pairs[1] > 1e-6] for x in pairs)
    return stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue if len(wanted) > 1 else 1.0


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"T{how.temperature}-p{how.top_p}-k{how.top_k}")
def test_tokens_have_the_distribution_asked_for(how):
    """A chi-square test over 20,000 seeds, tokens of less than five expected ones together; the seeds are fixed."""
    pytest.importorskip("transformers")
    logits, n = row(1), 20_000
    found = choose(logits.expand(n, -1), [replace(how, seed=seed * 7919) for seed in range(n)], [3] * n)
    wanted = expected(logits, how) * n
    counts = np.bincount(found.numpy(), minlength=len(logits))
    assert not counts[wanted == 0].any()
    assert likely(counts, wanted) > 0.001


@pytest.mark.parametrize(("top_p", "top_k", "left"), [
    (0.3, 0, {0, 1}), (0.73, 0, {0, 1}), (0.74, 0, {0, 1, 2, 3}), (1.0, 1, {0, 1}), (1.0, 3, {0, 1, 2, 3}),
    (0.9, 2, {0, 1}),
])  # fmt: skip
def test_equal_logits_stay_or_go_together(top_p, top_k, left):
    logits = torch.tensor([3.0, 3.0, 2.0, 2.0, -9.0])  # 0.365, 0.365, 0.134, 0.134, and next to nothing
    found = choose(logits.expand(600, -1), [Sampling(1.0, seed, top_p, top_k) for seed in range(600)], [0] * 600)
    assert set(found.tolist()) == left


def test_positions_of_one_answer_are_independent_too():
    logits, n = row(2, 8), 20_000
    found = choose(logits.expand(n, -1), [Sampling(1.0, 42)] * n, range(n)).numpy()
    wanted = logits.double().softmax(-1).numpy() * n
    assert likely(np.bincount(found, minlength=8), wanted) > 0.001
    pairs = np.bincount(found[1:] * 8 + found[:-1], minlength=64)
    assert likely(pairs, np.outer(wanted, wanted).ravel() / n**2 * (n - 1)) > 0.001


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_choice_does_not_depend_on_the_other_rows(seed):
    rng = random.Random(seed)
    width = rng.choice([1, 2, 17, 64, 1000])
    table = torch.stack([row(rng.randrange(99), width) for _ in range(rng.randrange(1, 12))])
    asked = [rng.choice([None, Sampling(0.0, 1), Sampling(rng.choice([1e-3, 1.0, 900.0]), rng.randrange(1 << 64),
             rng.choice([1.0, 0.5, 1e-6]), rng.choice([0, 1, 3, 10**6]))]) for _ in table]  # fmt: skip
    positions = [rng.randrange(10**6) for _ in table]
    found = choose(table, asked, positions).tolist()
    assert found == [int(choose(table[i : i + 1], asked[i : i + 1], positions[i : i + 1])) for i in range(len(table))]
    order = rng.sample(range(len(table)), len(table))
    picked = [asked[i] for i in order], [positions[i] for i in order]
    assert choose(table, *picked, torch.tensor(order)).tolist() == [found[i] for i in order]
    best = greedy(table).tolist()
    for i, one in enumerate(asked):
        if one is None or one.temperature == 0 or one.top_k == 1:
            assert found[i] == best[i]


def test_large_tables_are_made_in_parts(monkeypatch):
    table = torch.stack([row(seed) for seed in range(40)])
    asked = [Sampling(1.0, seed, top_p=0.9) for seed in range(40)]
    whole = choose(table, asked, [0] * 40)
    monkeypatch.setitem(sampling.TABLE_VALUES, "cpu", 200)
    assert torch.equal(choose(table, asked, [0] * 40), whole)


def test_greedy_is_left_as_it_is_and_makes_no_noise(monkeypatch):
    table = torch.stack([row(seed) for seed in range(5)])
    for temperature in (1e-3, 1e-9, 1e-30):
        assert torch.equal(choose(table, [None, *[Sampling(temperature, 3)] * 4], [0] * 5), table.argmax(-1))
    table[1] = table[2] = 0.0  # of equal ones the first
    asked = [None, Sampling(0.0, 3), None, Sampling(1e-9, 3), None]
    assert torch.equal(choose(table, asked, [0] * 5), table.argmax(-1))
    monkeypatch.setattr(sampling.noise, "gumbel", lambda *given: pytest.fail("noise was made"))
    assert torch.equal(choose(table, [None, Sampling(0.0, 9, 0.5, 3)] * 2 + [None], [0] * 5), table.argmax(-1))
    assert form([None, Sampling(0.0, 1, 0.5)]) == "greedy" and form([]) == "greedy"
    assert form([None, Sampling(1.0, 1)]) == "drawn" and form([Sampling(1.0, 1), Sampling(1.0, 1, 1.0, 4)]) == "cut"


def test_rows_that_are_not_finite_are_marked_and_spoil_no_other():
    bad = torch.stack([row(1), row(2).fill_(torch.nan), row(3), row(4).fill_(-torch.inf), row(5)])
    bad[2, 7], bad[4, 0] = torch.inf, torch.nan
    asked = [Sampling(1.0, seed, 0.9, 5) for seed in range(5)]
    assert choose(bad, asked, [0] * 5).tolist() == [int(choose(bad[:1], asked[:1], [0])), -1, -1, -1, -1]


def test_draws_move_on_to_the_next_position():
    asked = [Sampling(0.5, 2**64 - 1), None, Sampling(1.0, 5, 0.5, 70)]
    made = draws(asked, [0, 1, 2], 60, CPU)
    made.advance()
    assert all(torch.equal(*pair) for pair in zip(
        vars(made).values(), vars(draws(asked, [1, 2, 3], 60, CPU)).values(), strict=True))  # fmt: skip
    assert made.top_k.tolist() == [60, 60, 60] and made.temperature.tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("given", [
    (-0.1, 0), (float("nan"), 0), (1e4, 0), (1.0, -1), (1.0, 1 << 64), (1.0, 0, 0.0), (1.0, 0, 1.5), (1.0, 0, 1.0, -1),
])  # fmt: skip
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match="a temperature is 0 to 1000"):
        Sampling(*given)


def test_answers_differ_by_seed_and_an_answer_repeats_itself(small):
    start = small.prompt(random.Random(1), 70)
    asked = [Generate(start, 12, sampling=Sampling(30.0, seed)) for seed in [*range(16), 3]]
    found = small.answers(small.make(), asked)
    assert len({text for text, *_ in found}) > 10 and found[3] == found[16]
    assert found == small.answers(small.make(slots=3), asked)


def test_repeats_share_their_prompt_but_not_their_answers(small):
    start = small.prompt(random.Random(2), 200)
    asked = [Generate(start, 6, sampling=Sampling(30.0, seed)) for seed in range(9)]
    backend = small.make()
    assert len(set(small.answers(backend, asked))) > 4
    assert (backend.tokens_asked, backend.tokens_read) == (9 * 200, 200)


def test_answers_begun_again_after_memory_ran_out_are_the_same(small, monkeypatch):
    rng = random.Random(8)
    asked = [Generate(small.prompt(rng, 20), 9, sampling=small.sampling(rng)) for _ in range(9)]
    expected = small.answers(small.make(), asked)
    backend = small.make(slots=8)
    decoding, reading = small.Limit(backend, monkeypatch, rows=3), small.Limit(backend, monkeypatch, tokens=70)
    assert small.answers(backend, asked) == expected and decoding.failures and reading.failures


def test_a_first_token_is_drawn_like_the_others(small):
    """Over many seeds, from the logits at the prompt's end."""
    start, n = small.prompt(random.Random(3), 65), 3000
    backend = small.make()
    found = small.answers(backend, [Generate(start, 1, sampling=Sampling(20.0, seed)) for seed in range(n)])
    ids = torch.from_numpy(start.ids.astype(np.int64))
    with torch.inference_mode():
        hidden, _ = backend.model(ids, Ragged([65]))
        wanted = backend.model.logits(hidden[-1:])[0].double().div(20).softmax(-1).numpy() * n
    counts = np.bincount([ord(text) - 48 if ended == "length" else 0 for text, _, _, ended, _ in found], minlength=64)
    assert likely(counts, wanted) > 0.001


def test_an_answer_that_is_decided_ends_where_it_would_be_cut(small):
    """Stopping early takes nothing from the other tokens: each token's noise is its own."""
    start, how = small.prompt(random.Random(4), 30), Sampling(30.0, 6)
    ((_, free),) = small.make().answer([Generate(start, 9, sampling=how)])
    ((_, cut),) = small.make().answer([Generate(start, 9, (), Decision((free.text[3],)), how)])
    assert cut.text == free.text[: len(cut.text)] and cut.ended == "decided" and free.text[3] in cut.text


class Drawing:
    """Several answers to each question, every one of them kept."""

    name, version, suite, has_lengths, protocols = "drawing", 1, "toy", False, ("plain",)

    def __init__(self, small):
        self._prompt, self._sampling = small.prompt, small.sampling

    def samples(self, setting, tokenizer):
        out = []
        for i in range(setting.samples):
            rng = random.Random(f"{setting.seed} {i}")
            start = self._prompt(random.Random(i), 70)
            asked = tuple(Generate(start, 5, sampling=self._sampling(rng)) for _ in range(3))
            out.append(Sample(str(i), asked, ()))
        return out

    def data_digest(self, setting):
        return "none"

    def score(self, sample, responses):
        return [Score("length", float(len(responses[0].text)), "", " ".join(one.text for one in responses))]


def test_a_run_that_goes_on_has_the_answers_of_one_that_ran_through(small, tmp_path):
    def answered(directory, counts, seed=1, **how):
        for count in counts:
            plan = make_plan(small.make(**how), [Drawing(small)], Ask((), count, seed=seed))
            assert run(plan, small.make(**how), directory, {}, lambda text: None).exit_code == 0
        return {record.sample_id: record.output for record in read_records(directory)}

    whole = answered(tmp_path / "whole", [6])
    assert answered(tmp_path / "parts", [1, 4, 6], batch_tokens=64, slots=2, share_prefixes=False) == whole
    other = answered(tmp_path / "other", [6], seed=2)
    assert other.keys() == whole.keys() and all(other[i] != whole[i] for i in whole)


def test_how_an_answer_is_drawn_is_part_of_its_key(small):
    start = small.prompt(random.Random(5), 9)
    plain = Generate(start, 5)
    ways = [None, *(Sampling(*given) for given in ((1.0, 1), (1.0, 2), (0.5, 1), (1.0, 1, 0.9), (1.0, 1, 1.0, 3)))]
    digests = [_request_digest(replace(plain, sampling=way)) for way in ways]
    assert len(set(digests)) == len(ways) and digests[0] == _request_digest(plain)


@pytest.mark.gpu
def test_a_gpu_chooses_what_a_cpu_does():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    table = torch.stack([row(seed, 32_000) for seed in range(len(WAYS) * 8)])
    asked = [replace(how, seed=seed) for seed in range(8) for how in WAYS]
    positions = list(range(len(asked)))
    found = choose(table.cuda(), asked, positions).cpu()
    assert torch.equal(found, choose(table, asked, positions))
    assert torch.equal(found[5:6], choose(table[5:6].cuda(), asked[5:6], positions[5:6]).cpu())
