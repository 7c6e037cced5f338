"""Preparing, scoring and recording cost a fraction of what they cost in lm-eval, with a model that costs nothing."""

import time
from pathlib import Path
from types import ModuleType

import pytest

import tasks
from evalsuite.backends.scripted import ScriptedBackend
from evalsuite.plan import Ask, make_plan
from evalsuite.runner import run

NAMES = ["piqa", "openbookqa", "winogrande", "lambada_openai", "boolq", "hellaswag"]
SHARE = 0.25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_quarter_of_lm_evals_time(
    parity: ModuleType, benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files to records, everything imported before; lm-eval's samples are written as its own program does."""
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker

    class Free(LM):
        def loglikelihood(self, requests: list) -> list:
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list) -> list:
            return [-1.0] * len(requests)

        def generate_until(self, requests: list) -> list:
            return [""] * len(requests)

    monkeypatch.setenv("GDN2_DATA", str(benchmarks))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    warm = ScriptedBackend(str)
    make_plan(warm, [tasks.get("openbookqa")], Ask((), 1))

    begin, cpu = time.perf_counter(), time.process_time()
    backend = ScriptedBackend(str)
    plan = make_plan(backend, [tasks.get(name) for name in NAMES], Ask(()))
    outcome = run(plan, backend, tmp_path / "ours", {}, lambda text: None)
    ours = time.perf_counter() - begin, time.process_time() - cpu
    assert outcome.failed == 0 and outcome.answered == 1838 + 500 + 1267 + 5153 + 3270 + 10042

    begin, cpu = time.perf_counter(), time.process_time()
    found = parity.evaluate(Free(), parity.lm_eval_tasks(NAMES, benchmarks, tmp_path))
    with parity.silence():
        tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for name in NAMES:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    theirs = time.perf_counter() - begin, time.process_time() - cpu
    assert sum(map(len, samples.values())) == outcome.answered
    print(f"ours {ours[0]:.1f} s ({ours[1]:.1f} of CPU), lm-eval {theirs[0]:.1f} s ({theirs[1]:.1f} of CPU)")
    assert ours[0] < SHARE * theirs[0] and ours[1] < SHARE * theirs[1]
