"""The teacher-forced score of a needle: the value's own tokens, after the very prompt, from the state it left."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cli
import tasks
from evalsuite.plan import Ask, settings
from evalsuite.store import read_records
from evalsuite.types import LogLikelihood, Prompt, Response, Setting
from tasks.ruler import niah
from tasks.ruler.splice import continued
from tests.evalsuite.small import make
from tests.tasks.conftest import PUBLIC, TRAINED
from tests.tasks.test_splice import Letters

NAMES = [spec.name for spec in niah.NIAH_TASKS]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_sample_gets_a_request_for_each_value(trained: Callable, name: str) -> None:
    tokenizer = trained("plain")
    plain = tasks.get(name).samples(Setting("exact", 2048, 3), tokenizer)
    forced = tasks.get(name).samples(Setting("exact:forced=yes", 2048, 3), tokenizer)
    assert len(plain) == len(forced) == 3
    for one, other in zip(plain, forced, strict=True):
        assert (one.id, one.target, one.depth) == (other.id, other.target, other.depth)
        generated, *likelihoods = other.requests
        assert generated.prompt.ids.tolist() == one.requests[0].prompt.ids.tolist()
        assert len(likelihoods) == len(one.target)
        for request, value in zip(likelihoods, one.target, strict=True):
            assert isinstance(request, LogLikelihood) and request.ranked
            assert request.context is generated.prompt and request.continuation.text == f" {value}"


@pytest.mark.parametrize("kind", [*(kind for kind in TRAINED if kind != "greedy"), *PUBLIC])
def test_the_value_s_tokens_are_those_of_the_whole_text(request: pytest.FixtureRequest, kind: str) -> None:
    source = "trained" if kind in TRAINED else "public"
    tokenizer = request.getfixturevalue(source)(kind)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    sample = tasks.get("niah_single_3").samples(Setting("exact:forced=yes", 3000, 1), tokenizer)[0]
    generated, forced = sample.requests
    whole = bos + tokenizer.encode(generated.prompt.text + forced.continuation.text)
    assert [*forced.context.ids.tolist(), *forced.continuation.ids.tolist()] == whole


@pytest.mark.parametrize("profile", niah.PROFILES)
def test_every_profile_has_the_field(trained: Callable, profile: str) -> None:
    task = tasks.get("niah_single_1")
    assert task.expand(profile) == (profile,)
    assert task.expand(f"{profile}:forced=yes") == (f"{profile}:forced=yes",)
    sample = task.samples(Setting(f"{profile}:forced=yes", 1024, 1), trained("plain"))[0]
    assert len(sample.requests) == 2 and sample.facts["profile"] == profile
    both = settings([task], Ask((1024,), 5, f"{profile}:forced=no/yes"))
    assert [one.protocol for _, one in both] == [profile, f"{profile}:forced=yes"]


def test_four_scores_of_one_sample() -> None:
    task = tasks.get("niah_multivalue")
    sample = task.samples(Setting("exact:forced=yes", 4000, 1), Letters())[0]
    ranks, logprobs = (1, 4, 1, 2), (-1.0, -9.0, -0.5, -3.5)
    forced = [Response(logprob=p, rank=r, greedy=r == 1) for p, r in zip(logprobs, ranks, strict=True)]
    scores = task.score(sample, [Response(text=", ".join(sample.target[:2])), *forced])
    assert [(one.metric, one.value, one.outcome) for one in scores] == [
        ("string_match_all", 0.5, "partial"),
        ("value_logprob", -3.5, "partial"),
        ("value_rank", 2.0, "partial"),
        ("value_greedy", 0.5, "partial"),
    ]
    assert task.score(sample, [Response(error="oom"), *forced])[0].error == "oom"
    good = [Response(logprob=-0.1, rank=1, greedy=True)] * 4
    assert [one.outcome for one in task.score(sample, [Response(), *good])] == ["nothing", *["target"] * 3]


def test_a_model_s_forced_score_is_one_pass_from_the_prompt() -> None:
    """Greedy values are those that decoding gives, and their likelihoods do not depend on what else is asked."""
    backend, rng = make(), random.Random(0)
    context = Prompt(np.array([rng.randrange(1, 64) for _ in range(300)], dtype=np.int32), "")
    sample = niah.Sample("0", (niah.Generate(context, 6),), ("x",))
    ((_, generated),) = backend.answer(sample.requests)
    tokens = [ord(letter) - 48 for letter in generated.text]
    value = Prompt(np.array(tokens, dtype="int32"), "")
    ((_, forced),) = backend.answer([LogLikelihood(context, value, True)])
    assert forced.greedy and forced.rank == 1 and forced.logprob <= 0
    assert backend.report()["tokens_asked"] >= len(context.ids)


def test_texts_that_cannot_be_joined_are_still_scored(trained: Callable) -> None:
    prompt = Prompt(np.array(trained("greedy").encode("the value is"), dtype="int32"), "the value is")
    made = continued(trained("greedy"), prompt, " 12")
    assert trained("greedy").decode(made.ids.tolist()).strip() == "12"


def test_records_hold_the_generated_and_the_forced_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "scripted:perfect", "--tasks", "niah_single_1@exact:forced=yes", "--lengths", "1k"]
    assert cli.main([*command, "--samples", "4"]) == 0
    (run,) = (tmp_path / "results" / "runs").iterdir()
    records = read_records(run)
    assert len(records) == 16 and {one.protocol for one in records} == {"exact:forced=yes"}
    by_metric = {one.metric: one for one in records if one.sample_id == "2"}
    assert set(by_metric) == {niah.METRIC, *niah.FORCED} and len({one.key for one in by_metric.values()}) == 1
    assert by_metric["value_rank"].score >= 1 and by_metric["value_logprob"].score < 0
    capsys.readouterr()
    assert cli.main(["show", run.name, "--sample", "2"]) == 0
    shown = capsys.readouterr().out
    assert "special magic number" in shown and f"| {by_metric['value_rank'].target}"[2:] in shown
