"""lm-eval's tasks that sample their answers: through our engine and with lm-eval driving, on rows in GSM8K's format."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import datasets
import pytest

import cli
from evalsuite import backends
from evalsuite.backends.scripted import ScriptedBackend
from evalsuite.lm_eval_bridge.task import LmEvalTask
from evalsuite.store import read_records
from evalsuite.types import Backend, Generate, Request, Response, Setting
from gdn2.errors import UserError
from tasks.data import commands

pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "gsm8k_cot_self_consistency"
GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(6)]
PROTOCOL = "lm-eval:temperature=0.2:top_p=1:top_k=all"


def rows(*asked: object) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(GSM8K) for split in ("train", "test")}


@pytest.fixture
def consistency() -> LmEvalTask:
    return LmEvalTask(NAME, rows, str)


class Voters(ScriptedBackend):
    """Says one of three numbers, which one its request's seed knows."""

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        for index, request in reversed(list(enumerate(requests))):
            assert isinstance(request, Generate) and request.sampling is not None
            said = (request.sampling.seed >> 60) % 3 * 2
            yield index, Response(text=f" So.\nThe answer is {said}.", tokens=9, ended="stop")


def ours(task: LmEvalTask, backend: Backend, setting: Setting) -> tuple[list[list[str]], dict[str, list[float | None]]]:
    """Texts of each sample's answers, and scores by metric."""
    samples = task.samples(setting, backend.tokenizer)
    requests = [request for sample in samples for request in sample.requests]
    found = dict(backend.answer(requests))
    texts, scores, at = [], {}, 0
    for sample in samples:
        said = [found[at + i] for i in range(len(sample.requests))]
        at += len(said)
        texts.append([one.text for one in said])
        for score in task.score(sample, said):
            scores.setdefault(score.metric, []).append(score.value)
            assert len(said) == 1 or json.loads(score.output) == texts[-1]
    return texts, scores


def theirs(task: LmEvalTask, backend: Backend, seed: int, limit: int, parity: ModuleType) -> tuple[list, dict]:
    """The same by lm-eval's own loop over our `LM`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from evalsuite.lm_eval_bridge.model import Gdn2LM

    with parity.silence():
        found = lm_eval.simple_evaluate(
            model=Gdn2LM(backend), tasks=[task.task], limit=limit, bootstrap_iters=0, torch_random_seed=seed,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
    lines = [line for line in found["samples"][NAME] if line["filter"] == "score-first"]
    return [line["resps"][0] for line in lines], found["results"][NAME]


def test_votes_are_those_of_lm_evals_own_loop(consistency: LmEvalTask, parity: ModuleType) -> None:
    backend = Voters(str)
    texts, scores = ours(consistency, backend, Setting(PROTOCOL, seed=7))
    assert [len(said) for said in texts] == [64] * 6 and len({tuple(said) for said in texts}) == 6
    told, results = theirs(consistency, backend, 7, 6, parity)
    assert told == texts
    assert set(scores) == {f"exact_match,{name}" for name in ("score-first", "maj@64", "maj@8")}
    for metric, values in scores.items():
        assert sum(values) / len(values) == results[metric]
    wanted = [said.count(f" So.\nThe answer is {2 * i}.") for i, said in enumerate(texts)]
    most = [max(said.count(text) for text in said) for said in texts]
    assert [value == 1.0 for value in scores["exact_match,maj@64"]][3:] == [False] * 3  # nobody says 6, 8 or 10
    assert all(wanted[i] == most[i] for i in range(3) if scores["exact_match,maj@64"][i])


def test_a_model_says_the_same_both_ways_and_in_any_company(consistency: LmEvalTask, parity: ModuleType) -> None:
    consistency.task.config.generation_kwargs["max_gen_toks"] = 6
    backend = backends.load("gdn2-tiny", device="cpu", dtype="float32")
    protocol = "lm-eval:temperature=0.2:top_p=1:top_k=all"
    texts, _ = ours(consistency, backend, Setting(protocol, samples=2, seed=11))
    assert all(len(set(said)) > 1 for said in texts)
    assert theirs(consistency, backend, 11, 2, parity)[0] == texts
    assert ours(consistency, backend, Setting(protocol, samples=1, seed=11))[0] == texts[:1]
    other = ours(consistency, backend, Setting(protocol, samples=1, seed=12))[0]
    assert other != texts[:1]
    hot = ours(consistency, backend, Setting(protocol.replace("0.2", "3"), samples=1, seed=11))[0]
    assert len(set(hot[0])) > len(set(texts[0]))


def test_at_temperature_0_one_greedy_answer_stands_for_all(consistency: LmEvalTask) -> None:
    consistency.task.config.generation_kwargs["max_gen_toks"] = 6
    backend = backends.load("gdn2-tiny", device="cpu", dtype="float32")
    (protocol,) = consistency.expand("lm-eval:temperature=0")
    ((said,),), scores = ours(consistency, backend, Setting(protocol, samples=1))
    assert all(len(values) == 1 for values in scores.values()) and len(scores) == 3
    (sample,) = consistency.samples(Setting(protocol, samples=1), backend.tokenizer)
    ((_, greedy),) = backend.answer([Generate(sample.requests[0].prompt, 6, sample.requests[0].stop)])
    assert said == greedy.text


def test_a_run_keeps_every_answer_and_says_how_it_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked, **options: datasets.DatasetDict(rows()))
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    commands.fetch(f"lm_eval:{NAME}", tmp_path / "data", None, lambda line: None)
    base = ["run", "--model", "scripted:last", "--samples", "2", "--out", str(tmp_path / "runs")]
    keys = []
    for more in ([], ["--seed", "7"], ["--profile", "lm-eval:temperature=0.5"]):
        assert cli.main([*base, "--tasks", f"lm_eval:{NAME}", *more]) == 0, capsys.readouterr().err
    runs = sorted(found.parent for found in tmp_path.rglob("run.json"))
    for run in runs:
        records = read_records(run)
        assert len(records) == 2 * 3 and {len(json.loads(record.output)) for record in records} == {64}
        keys += sorted({record.key for record in records})
    assert len(runs) == 3 and len(set(keys)) == 6
    assert {record.protocol for run in runs for record in read_records(run)} == {
        PROTOCOL, PROTOCOL.replace("0.2", "0.5"),
    }  # fmt: skip


def test_what_is_not_followed_is_refused_by_name() -> None:
    def code(*asked: object) -> dict[str, datasets.Dataset]:
        row = {"code_tokens": ["a"], "docstring_tokens": ["b"], "code": "a", "docstring": "b"}
        return {split: datasets.Dataset.from_list([row] * 2) for split in ("train", "validation", "test")}

    beams = LmEvalTask("code2text_go", code, str)
    with pytest.raises(UserError, match="^lm_eval:code2text_go asks for num_beams=10; only do_sample"):
        beams.samples(Setting("lm-eval"), ScriptedBackend(str).tokenizer)
