"""Training throughput: real steps on small presets, and a file that Figure 2 reads."""

import json

import pytest

from evalsuite.bench import engine, training
from evalsuite.reports import throughput
from gdn2.errors import UserError


@pytest.fixture(scope="module")
def result():
    told = []
    asked = training.Asked(("gdn2-hybrid-tiny", "mamba3-mimo-tiny"), ((64, 2), (128, 1)), 2, "cpu")
    training.check(asked)
    return training.run(asked, told.append, pytest.fail), told


def test_rows_are_tokens_over_time(result):
    made, told = result
    assert [(row.model, row.length, row.batch) for row in told] == [
        ("gdn2-hybrid-tiny", 64, 2), ("gdn2-hybrid-tiny", 128, 1),
        ("mamba3-mimo-tiny", 64, 2), ("mamba3-mimo-tiny", 128, 1),
    ]  # fmt: skip
    for row in told:
        assert row.tokens_per_s == pytest.approx(128_000 / row.milliseconds.median)
        assert row.milliseconds.rounds == 2
        assert len(row.cells()) == len(training.HEADER)
    assert made["refused"] == []
    assert "commit" in json.dumps(made["provenance"])


def test_the_file_is_read_by_figure_2(result, tmp_path):
    made, _ = result
    path = engine.write(made, tmp_path / "bench")
    assert path.name.startswith("training_cpu_")
    speeds = throughput.load([tmp_path])
    assert [(s.kind, s.family, s.listed) for s in speeds] == [
        ("training", "hybrid", "gdn2"), ("training", "hybrid", "gdn2"),
        ("training", "recurrent", "mamba3_mimo"), ("training", "recurrent", "mamba3_mimo"),
    ]  # fmt: skip
    assert throughput.grid(speeds, "all").lines[-1].labels[0] == "gdn2"  # none of the paper's shapes


def test_layers_that_run_again_are_told_apart(tmp_path):
    told = []
    asked = training.Asked(("gdn2-tiny",), ((64, 2),), 1, "cpu", recompute=True)
    engine.write(training.run(asked, told.append, pytest.fail), tmp_path / "bench")
    assert [row.model for row in told] == ["gdn2-tiny"]
    assert [s.model for s in throughput.load([tmp_path])] == ["gdn2-tiny, recomputed"]


def test_a_step_trains(monkeypatch):
    import torch

    from gdn2.train import loss

    losses = []
    whole = loss.weighted_loss

    def watched(model, batch):
        total, right = whole(model, batch)
        losses.append(float(total.detach()))
        return total, right

    monkeypatch.setattr(loss, "weighted_loss", watched)
    device = torch.device("cpu")
    training.measure("gdn2-tiny", training._model("gdn2-tiny", device, None), (32, 2), 6, device)
    assert len(losses) == 6 + training.WARM_UP
    assert losses[-1] < losses[0]


def test_shapes_are_read_and_wrong_wishes_refused():
    assert training.parse_shapes("2048x8, 16x1") == ((2048, 8), (16, 1))
    assert training.parse_shapes("2x1, 16777216x65536") == ((2, 1), (1 << 24, 1 << 16))
    wrong = ("", "2048", "2048x", "x8", "1x8", "2048x0", "2kx8", "2048x8,", "16777217x1", "2x65537", "2x1x1", "-2x1")
    for text in (*wrong, "2 x1", "²x1", "9" * 5000 + "x1", "2x" + "9" * 5000):
        with pytest.raises(UserError, match="is not LENGTHxSEQUENCES"):
            training.parse_shapes(text)
    with pytest.raises(UserError, match="preset 'gdn2-tny' is unknown; did you mean gdn2-tiny"):
        training.check(training.Asked(("gdn2-tny",)))


def test_kernels_that_the_device_has_not_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="^--kernels: implementation triton needs a GPU"):
        training.check(training.Asked(("gdn2-tiny",), device="cpu", kernels="triton"))
    for kernels in (None, "torch", "reference"):
        training.check(training.Asked(("gdn2-tiny",), device="cpu", kernels=kernels))


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    import torch

    whole = training.measure

    def measure(name, model, shape, rounds, device):
        if shape == (64, 1):
            raise torch.OutOfMemoryError("no memory")
        return whole(name, model, shape, rounds, device)

    monkeypatch.setattr(training, "measure", measure)
    refused, told = [], []
    made = training.run(training.Asked(("gdn2-tiny",), ((64, 1), (32, 1)), 1, "cpu"), told.append, refused.append)
    assert refused == made["refused"] == ["gdn2-tiny at 64x1: out of memory"]
    assert [row.length for row in told] == [32]


def test_the_default_models_are_presets():
    from gdn2.models.presets import PRESETS

    assert set(training.MODELS) <= set(PRESETS)
