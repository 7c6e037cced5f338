"""The loop learns, and an interrupted run ends with the bits of one that was not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gdn2.checkpoints import native
from gdn2.errors import UserError
from gdn2.models import PRESETS, Decoder
from gdn2.models.decoder import FP32_PARAMETERS
from gdn2.models.presets import SCALES
from gdn2.train import loop
from gdn2.train.data import Batch, make_batch
from gdn2.train.loop import train
from tests.gdn2.train.sources import TOKENIZER, open_copies

SOURCES = {"copies": open_copies}
WEIGHTS = Path("model") / native.WEIGHTS


def log(out: Path, kind: str) -> list[dict]:
    return [r for line in (out / loop.LOG).read_text().splitlines() if (r := json.loads(line))["kind"] == kind]


def digest(out: Path) -> str:
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_loss_falls_and_the_checkpoint_loads(tiny, tmp_path: Path) -> None:
    evaluation = {"name": "copies", "source": "copies", "length": 12, "documents": 20}
    config = tiny(run={"steps": 60, "evaluate_every": 30}, evaluate=[evaluation])
    lines: list[str] = []
    outcome = train(config, tmp_path / "out", SOURCES, say=lines.append)
    assert outcome.signal is None and outcome.position.step == 60
    losses = [record["loss"] for record in log(tmp_path / "out", "train")]
    assert len(losses) == 60 and losses[-1] < 0.8 * losses[0]
    held_out = log(tmp_path / "out", "held-out")
    assert [record["step"] for record in held_out] == [30, 60, 60]
    assert held_out[1]["loss"] < losses[0] and 0 <= held_out[1]["exact"] <= 1
    model, header = native.load(outcome.model)
    assert model.config == config.model and header.extra["training"]["step"] == 60
    assert any("exact" in line for line in lines)


@pytest.mark.parametrize("name", [f"{model}-tiny" for model in SCALES["tiny"].d_ff])
def test_every_model_of_the_line_up_trains_and_is_stored_small(tiny, tmp_path: Path, name: str) -> None:
    config = replace(tiny(run={"steps": 2, "stored": "float16", "seed": 5}), model=PRESETS[name]())
    model, header = native.load(train(config, tmp_path / "out", SOURCES).model)
    assert header.config == config.model and header.extra["training"]["seed"] == 5
    kinds = {key.rsplit(".", 1)[-1]: p.dtype for key, p in model.named_parameters()}
    assert {kinds.pop(rate, torch.float32) for rate in FP32_PARAMETERS} == {torch.float32}
    assert set(kinds.values()) == {torch.float16}
    fresh = Decoder(config.model)
    fresh.reset_parameters(5)
    moved = [not torch.equal(a, b.to(a.dtype)) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)]
    assert all(moved)


def test_accumulation_equals_one_large_batch(tiny, tmp_path: Path) -> None:
    """Weights of both halves are normalised together, so two small batches make the step of their union."""
    config = tiny(run={"steps": 1}, optimizer={"accumulate": 2})
    run = loop._Run(config, tmp_path / "a", SOURCES, torch.device("cpu"), lambda line: None)
    halves = [run._take(), run._take()]
    whole = loop._Run(tiny(run={"steps": 1}), tmp_path / "b", SOURCES, torch.device("cpu"), lambda line: None)
    whole._take = lambda: loop._joined(halves)  # type: ignore[method-assign]
    queue = iter(halves)
    run._take = lambda: next(queue)  # type: ignore[method-assign]
    run._step()
    whole._step()
    assert log(tmp_path / "a", "train")[0]["loss"] == pytest.approx(log(tmp_path / "b", "train")[0]["loss"], rel=1e-6)
    for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_fixed_stage_fills_documents_up_without_weight(tiny, tmp_path: Path) -> None:
    """Filling changes no gradient: a step on the same documents, filled up or not, leaves the same weights."""
    source = open_copies(None, {"bare": 0.0, "length": (10, 14)}, 0, "train")
    filled = make_batch(source, 0, 70, fill=14)
    assert filled.lengths == (14,) * 5
    plain = loop._joined([Batch(*source.document(i), (len(source.document(i)[0]),)) for i in range(5)])
    assert plain.lengths != filled.lengths and plain.weights.sum() == pytest.approx(filled.weights.sum())
    ends = []
    for batch in (filled, plain):
        run = loop._Run(
            tiny(run={"steps": 1}), tmp_path / str(len(ends)), SOURCES, torch.device("cpu"), lambda line: None
        )
        run._take = lambda batch=batch: batch  # type: ignore[method-assign]
        run._step()
        ends.append(list(run.model.parameters()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_captured_step_is_the_step(tiny, tmp_path: Path) -> None:
    """On a GPU a fixed stage is replayed from a capture; its losses are those of the same run without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    losses = []
    for fixed, again in ((True, False), (False, False), (True, True)):
        stage = {"source": "copies", "length": [14, 14], "batch_tokens": 70, "fixed": fixed}
        out = tmp_path / f"{fixed}-{again}"
        train(tiny(run={"steps": 30, "recompute": again}, stages=[stage]), out, SOURCES, "cuda")
        losses.append([record["loss"] for record in log(out, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0][-1] < losses[0][0]
    assert losses[2] == pytest.approx(losses[0], rel=2e-2)


def test_layers_that_run_again_train_the_same_model(tiny, tmp_path: Path) -> None:
    for again in (True, False):
        config = tiny(run={"steps": 8, "recompute": again})
        train(config, tmp_path / str(again), SOURCES)
        assert config.digest == tiny(run={"steps": 8}).digest  # a run may go on either way
    assert digest(tmp_path / "True") == digest(tmp_path / "False")


def test_stages_end_by_steps_or_by_what_was_learnt(tiny, tmp_path: Path) -> None:
    stage = {"source": "copies", "length": [10, 12], "batch_tokens": 60}
    stages = [{**stage, "steps": 3}, {**stage, "steps": 100, "until": 0.0}, {**stage, "batch_tokens": 90}]
    train(tiny(run={"steps": 8}, stages=stages), tmp_path / "out", SOURCES)
    assert [record["stage"] for record in log(tmp_path / "out", "train")] == [0, 0, 0, 1, 2, 2, 2, 2]


def test_time_ends_a_run_on_the_cosine(tiny, tmp_path: Path) -> None:
    config = tiny(run={"steps": 10**6, "max_seconds": 0.5, "log_every": 1}, optimizer={"min_lr": 1e-3})
    outcome = train(config, tmp_path / "out", SOURCES)
    assert 0 < outcome.position.step < 10**4 and outcome.position.seconds >= 0.5
    assert log(tmp_path / "out", "train")[-1]["lr"] < 3e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tiny, tmp_path: Path, workers: int) -> None:
    stages = [
        {"source": "copies", "length": [10, 14], "batch_tokens": 60, "steps": 6},
        {"source": "copies", "length": [10, 14], "batch_tokens": 90},
    ]
    plain = tiny(run={"steps": 20}, stages=stages)
    train(plain, tmp_path / "whole", SOURCES)
    again = tiny(run={"steps": 20, "workers": workers}, stages=stages)
    seen = 0

    def interrupt(line: str) -> None:
        nonlocal seen
        seen += line.startswith("step")
        if line.startswith("step") and seen in (4, 11):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    signals = [train(again, tmp_path / "cut", SOURCES, say=interrupt).signal for _ in range(3)]
    assert signals == [signal.SIGINT, signal.SIGINT, None]
    assert signal.getsignal(signal.SIGINT) is before
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    steps = [record["step"] for record in log(tmp_path / "cut", "train")]
    assert steps == list(range(1, 21))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from gdn2.train.config import load_config
from gdn2.train.loop import train
from tests.gdn2.train.sources import open_copies
train(load_config(Path(sys.argv[1])), Path(sys.argv[2]), {"copies": open_copies})
"""
CONFIG = """
name = "killed"
tokenizer = "tokenizer.json"
[model]
d_model = 16
vocab_size = 32
pattern = ["a"]
mixers = { a = { mixer = "gdn2", n_heads = 1, d_key = 16, d_value = 16 } }
[optimizer]
lr = 1e-2
[run]
steps = 120
log_every = 1
checkpoint_every = 7
[[stages]]
source = "copies"
length = [10, 14]
batch_tokens = 60
"""


def test_kill_9_in_the_middle_and_resume_ends_with_the_same_bits(tmp_path: Path, root: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "c.toml").write_text(CONFIG)

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "c.toml"), str(tmp_path / out)]
        return subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})

    assert start("whole").wait(60) == 0
    for step in (20, 60):  # a kill wherever the run happens to be beyond this step
        process = start("cut")
        while process.poll() is None and not any(
            record["step"] > step for record in _records(tmp_path / "cut" / loop.LOG)
        ):
            time.sleep(0.005)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    assert start("cut").wait(60) == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert [r["step"] for r in log(tmp_path / "cut", "train")] == list(range(1, 121))


def _records(path: Path) -> list[dict]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_a_torn_log_and_an_unfinished_save_are_repaired(tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = tiny(run={"steps": 10, "checkpoint_every": 5})
    train(config, tmp_path / "whole", SOURCES)
    train(config, out, SOURCES)
    (out / loop.SAVES / ".step-00000099").mkdir()
    with (out / loop.LOG).open("a") as file:
        file.write('{"kind": "train", "st')
    train(config, out, SOURCES)
    assert [r["step"] for r in log(out, "train")] == list(range(1, 11))
    assert digest(out) == digest(tmp_path / "whole")


def test_another_run_s_directory_and_unknown_sources_are_refused(tiny, tmp_path: Path) -> None:
    train(tiny(run={"steps": 2}), tmp_path / "out", SOURCES)
    with pytest.raises(UserError, match="holds a run of another configuration"):
        train(tiny(run={"steps": 3}), tmp_path / "out", SOURCES)
    with pytest.raises(UserError, match="source 'copies' is not one of text, episodes"):
        train(tiny(run={"steps": 2}), tmp_path / "new", {"episodes": open_copies})


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path: Path) -> None:
    run = loop._Run(tiny(run={"steps": 5}), tmp_path / "out", SOURCES, torch.device("cpu"), lambda line: None)
    with torch.no_grad():
        run.model.embed.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 1: lower optimizer.lr"):
        run.go()
