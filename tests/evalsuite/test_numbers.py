"""What a run may give up of exactness: `--fast` and `--lm-eval-rounding`."""

import random

import pytest
import torch
from torch.nn import functional as F

import cli
from evalsuite import backends
from evalsuite.backends.native import describe, load
from evalsuite.backends.selfcheck import self_check
from evalsuite.store import read_records
from evalsuite.types import Generate, LogLikelihood, Numbers, Rolling
from gdn2.errors import UserError
from gdn2.mixers import linear
from gdn2.ragged import Ragged


def test_fast_makes_products_of_all_rows_and_differs_by_rounding(small, monkeypatch):
    exact, fast = small.make(), small.make()
    fast.model.fast = True
    asked = small.requests(3)
    sizes = []
    product = F.linear

    def watched(x, weight, bias=None):
        sizes.append(len(x))
        return product(x, weight, bias)

    monkeypatch.setattr(linear.F, "linear", watched)
    expected = small.answers(exact, asked)
    assert sizes == []
    found = small.answers(fast, asked)
    assert max(sizes) > 64
    for (_, mine, _, _, error), (_, theirs, _, _, _) in zip(found, expected, strict=True):
        assert error is None
        if theirs is not None:
            assert mine == pytest.approx(theirs, abs=1e-3)


def test_a_fast_model_is_checked_for_rounding_alone(small):
    model = small.make().model
    model.fast = True
    found = self_check(model)
    assert found.failures(torch.float32, exact=False) == []
    wrong = found._replace(pieces_against_whole=0.1)
    assert "pieces against whole differ by 0.1 (bound 0.001)" in wrong.failures(torch.float32, exact=False)
    assert found._replace(packed_against_single=1e-7).failures(torch.float32)


def test_steps_and_prompts_have_blocks_of_their_own(small, monkeypatch):
    model = small.make().model
    shapes = set()
    product = torch.bmm

    def watched(a, b):
        if a.shape[-1] == 32:
            shapes.add(a.shape[1])
        return product(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    with torch.inference_mode():
        model(torch.tensor([3] * 70), Ragged([70]))
        assert shapes == {64}
        shapes.clear()
        model.step(torch.tensor([3] * 5), model.new_state(5))
        assert shapes == {16}


def test_rounding_is_lm_evals(small):
    """lm-eval takes the log-softmax in the model's dtype and sums the continuation in it."""
    backend = small.make()
    backend.model.cast(torch.bfloat16)
    backend.rounding = torch.bfloat16
    rng = random.Random(4)
    requests = [LogLikelihood(small.prompt(rng, 40), small.prompt(rng, n)) for n in (1, 2, 5, 9)]
    for request, (_, response) in zip(requests, sorted(backend.answer(requests)), strict=True):
        ids = torch.tensor([*request.context.ids, *request.continuation.ids])
        begin = len(request.context.ids)
        with torch.inference_mode():
            logits = backend.model.logits(backend.model(ids, Ragged([len(ids)]))[0]).bfloat16()
            table = F.log_softmax(logits, dim=-1)[begin - 1 : -1]
            picked = table.gather(1, ids[begin:, None])[:, 0]
        close = pytest.approx(float(picked.sum()), rel=2**-7)  # token form and chunk form round on their own
        assert response.logprob == close
        assert float(torch.tensor(response.logprob).bfloat16()) == response.logprob


def test_rounded_windows_are_summed_as_lm_eval_does(small):
    backend = small.make()
    backend.rounding = torch.bfloat16
    document = small.prompt(random.Random(5), 100)
    ((_, whole),) = backend.answer([Rolling(document, 40)])
    plain = small.make()
    ((_, exact),) = plain.answer([Rolling(document, 40)])
    assert whole.logprob != exact.logprob and whole.logprob == pytest.approx(exact.logprob, rel=0.01)
    assert whole.tokens == exact.tokens == 100


def test_rounding_leaves_generations_alone(small):
    backend = small.make()
    backend.rounding = torch.bfloat16
    asked = [r for r in small.requests(6) if isinstance(r, Generate)]
    assert small.answers(backend, asked) == small.answers(small.make(), asked)


def test_both_are_part_of_what_a_run_is():
    plain, fast = (load("gdn2-tiny", numbers=numbers) for numbers in (Numbers(), Numbers(fast=True)))
    assert fast.model.fast and not plain.model.fast
    assert plain.info.details["identity"] == {"device": "cpu", "dtype": "float32"} | {
        "kernels": plain.info.details["identity"]["kernels"]
    }
    assert fast.info.details["identity"]["fast"] is True
    rounded = load("gdn2-tiny", dtype="bfloat16", numbers=Numbers(lm_eval_rounding=True))
    assert rounded.rounding == torch.bfloat16 and rounded.info.details["identity"]["lm_eval_rounding"] is True
    info = describe(plain.model, "x", "0" * 64, plain.tokenizer, Numbers(fast=True))
    assert info.details["identity"]["fast"] is True


@pytest.mark.parametrize("model", ["scripted:perfect", "transformers:somewhere"])
def test_other_models_have_neither(model):
    with pytest.raises(UserError, match="are for models of ours"):
        backends.load(model, numbers=Numbers(fast=True))


def test_the_command_keeps_fast_runs_apart(tmp_path, monkeypatch):
    command = ["run", "--model", "gdn2-tiny", "--tasks", "niah_single_1", "--lengths", "256", "--samples", "2"]
    command += ["--out", str(tmp_path)]
    assert cli.main(command) == cli.main([*command, "--fast"]) == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert {len(read_records(run)) for run in runs} == {2}
