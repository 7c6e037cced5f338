"""The kernel benchmark's dry mode: tiny shapes, plain torch, on a CPU."""

from __future__ import annotations

import json
import math
import signal
from importlib import import_module
from pathlib import Path

import pytest
import torch

from evalsuite.bench import cases, kernels, layers, timing
from evalsuite.bench.cases import OPS, TINY, Job, Setup, Shape
from evalsuite.bench.kernels import Asked
from gdn2.errors import UserError

SETUP = Setup(torch.device("cpu"), torch.float32, "torch", None)
LIMITS = timing.Ceilings(bandwidth=1e10, rate=1e11)


def job(error: float, calls: dict | None = None) -> Job:
    return Job("norm", "any", Shape(1, 1), calls or {"ours": lambda: None}, lambda: (error, 1e-3), 10**7, 10**9)


def test_every_operation_is_checked_timed_and_written(tmp_path: Path) -> None:
    seen = []
    result = kernels.run(Asked(mixers=["gdn2", "gdn"]), "cpu", rounds=1, report=seen.append)
    assert {row.op for row in seen} == set(OPS)
    for row in seen:
        assert row.refused is None and row.error < 1e-5 and row.times["ours"].median > 0
        assert len(row.cells()) == len(kernels.HEADER)
    path = kernels.write(result, tmp_path / "bench")
    assert path.name.startswith("kernels_cpu_") and list(path.parent.iterdir()) == [path]
    kept = json.loads(path.read_text())
    assert len(kept["rows"]) == len(seen)
    assert kept["provenance"]["packages"]["torch"] and kept["device"]["before"]["name"] == "cpu"
    assert kept["ceilings"]["bandwidth"] > 0


def test_a_red_check_has_no_times() -> None:
    clock = timing.Clock(torch.device("cpu"))
    for error in (2e-3, math.inf, math.nan):
        row = kernels.measure(job(error), clock, LIMITS, 3)
        assert row.times == {} and row.refused is not None and row.refused.startswith("refused")
        assert row.refused in row.cells()
    assert kernels.measure(job(1e-4), clock, LIMITS, 3).times["ours"].rounds == 3


def test_wrong_kernels_turn_the_check_red(monkeypatch: pytest.MonkeyPatch) -> None:
    import gdn2.kernels

    right = gdn2.kernels.delta_rule

    def wrong(*inputs, **options):  # type: ignore[no-untyped-def]
        o, last = right(*inputs, **options)
        return (o if o.dtype == torch.float64 else o * 1.001), last

    monkeypatch.setattr(gdn2.kernels, "delta_rule", wrong)
    for op in ("forward", "backward", "strong"):
        error, allowed = cases.operator(op, "gdn2", TINY[0], SETUP).check()
        assert error > allowed


@pytest.mark.parametrize(("make", "module", "name"), [
    (lambda: layers.layer("gdn2", TINY[0], SETUP), "gdn2.kernels", "delta_rule"),
    (lambda: layers.gates("kda", TINY[0], SETUP), "gdn2.kernels.layer", "fold_gates"),
    (lambda: layers.norm(TINY[0], SETUP), "gdn2.kernels.layer", "gated_norm"),
    (lambda: layers.convolution(TINY[0], SETUP), "gdn2.mixers.conv", "short_conv"),
    (lambda: layers.gates("gdn", TINY[0], SETUP, True), "gdn2.kernels.layer", "fold_gates"),
    (lambda: layers.norm(TINY[0], SETUP, True), "gdn2.kernels.layer", "gated_norm"),
    (lambda: layers.convolution(TINY[0], SETUP, True), "gdn2.mixers.conv", "short_conv"),
    (lambda: cases.decode(2, TINY[0], SETUP), "gdn2.kernels", "delta_step"),
])  # fmt: skip
def test_every_check_sees_a_result_one_in_a_thousand_off(make, module, name, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    error, allowed = make().check()
    assert error <= allowed
    owner = import_module(module)
    right = getattr(owner, name)

    def scaled(x):  # type: ignore[no-untyped-def]
        if isinstance(x, torch.Tensor):
            return x if x.dtype == torch.float64 else x * 1.001
        return type(x)(*map(scaled, x)) if hasattr(x, "_fields") else type(x)(map(scaled, x)) if x is not None else None

    monkeypatch.setattr(owner, name, lambda *inputs, **options: scaled(right(*inputs, **options)))
    error, allowed = make().check()
    assert error > allowed


def test_unwritten_outputs_are_never_right() -> None:
    good = torch.ones(3, 4, dtype=torch.float64)
    bad = good.clone()
    bad[2, 3] = math.nan
    assert cases.worst([good], [good[:, :2]], torch.float32) == (0.0, 1e-5)
    assert cases.worst([bad], [good[:, :2]], torch.float32)[0] == math.inf


def test_the_plan_names_each_job_once_and_keeps_to_what_was_asked() -> None:
    names = [name for name, _ in kernels.plan(SETUP, Asked())]
    assert len(set(names)) == len(names) == 6 * 3 + 4 + 1
    assert [n for n, _ in kernels.plan(SETUP, Asked(ops=["norm", "decode"]))] == ["norm 2x48 H2 D16", "decode 2"]
    gpu = Setup(torch.device("cuda"), torch.bfloat16, "triton", None)
    forward = [name for name, _ in kernels.plan(gpu, Asked(ops=["forward"], mixers=["gdn2"], peer_shapes=True))]
    assert forward[:3] == [f"forward gdn2 {shape} H16 D128" for shape in ("8x4096", "1x32768", "1x131072")]
    assert len(forward) == 9 and "forward gdn2 1x8192 H96 D128" in forward


def test_a_row_says_what_it_cost_in_words() -> None:
    times = {"ours": timing.Timing(2.0, 1.9, 2.2, 20), "fla": timing.Timing(5.0, 4.9, 5.1, 20)}
    row = kernels.Row("forward", "gdn2", "1x1", 1e-3, 1e-2, 0.5, 1, 1, times, {}, {"torch": "RuntimeError: too large"})
    cells = dict(zip(kernels.HEADER, row.cells(), strict=True))
    assert cells["ours ms"] == "2.000" and cells["spread"] == "1.900-2.200" and cells["x fla"] == "2.50"
    assert cells["% of floor"] == "25" and cells["torch ms"].startswith("RuntimeError")


def test_results_are_never_half_written(tmp_path: Path) -> None:
    result = {"device": {"before": {"name": "NVIDIA H200"}}, "created_at": "2026-01-02T03:04:05+00:00", "rows": []}
    assert kernels.write(result, tmp_path).name == "kernels_nvidia-h200_2026-01-02T030405Z.json"
    with pytest.raises(ValueError):
        kernels.write(result | {"created_at": "2026-01-02T03:04:06+00:00", "rows": [math.inf]}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kernels_nvidia-h200_2026-01-02T030405Z.json"]


def test_a_failing_contender_is_named_and_ours_is_not_hidden() -> None:
    def fail() -> object:
        raise RuntimeError("no such\nkernel")

    clock = timing.Clock(torch.device("cpu"))
    row = kernels.measure(job(0.0, {"ours": lambda: None, "fla": fail}), clock, LIMITS, 2)
    assert row.failed == {"fla": "RuntimeError: no such"} and set(row.times) == {"ours"}
    with pytest.raises(RuntimeError):
        kernels.measure(job(0.0, {"ours": fail}), clock, LIMITS, 2)


def test_contenders_take_turns_and_slow_ones_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    timing.alternate(timing.Clock(torch.device("cpu")), calls, 4)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]

    class Slow(timing.Clock):
        def once(self, call: timing.Call) -> float:
            call()
            return 2000.0

    seen = timing.alternate(Slow(torch.device("cpu")), {"a": lambda: None}, 50)
    assert seen["a"].rounds == timing.FEWEST


def test_summary_and_floor() -> None:
    got = timing.summary([5.0, 1.0, 3.0, 2.0, 4.0, 100.0])
    assert (got.median, got.low, got.high, got.rounds) == (3.5, 2.0, 5.0, 6)
    assert LIMITS.floor_ms(10**7, 0) == pytest.approx(1.0)
    assert LIMITS.floor_ms(0, 10**9) == pytest.approx(10.0)


def test_bytes_and_operations_of_the_published_shape() -> None:
    """performance.md 1.1-1.2 of the model's shape: 182,400 operations forward with an inverse of 2,200."""
    per_row = cases.operator_flops(Shape(1, 1, 1, 128), False)
    assert per_row == 5 * 16384 + 3 * 32768
    assert cases.operator("forward", "gdn2", TINY[0], SETUP).nbytes == 2 * 48 * 2 * 16 * 4 * 6


@pytest.mark.parametrize(("device", "asked", "message"), [
    ("tpu", Asked(), "device must be cuda"), ("mps", Asked(), "device must be cuda"),
    ("cpu", Asked(ops=["prefill"]), "unknown operation 'prefill'"),
    ("cpu", Asked(mixers=["rwkv"]), "unknown mixer 'rwkv'"),
    ("cpu", Asked(only="9x9"), "no job contains '9x9'; names look like 'forward gdn2 2x48 H2 D16'"),
])  # fmt: skip
def test_wrong_requests_are_refused(device: str, asked: Asked, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kernels.run(asked, device)


def test_the_command_prints_writes_and_tells_red_from_green(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cli

    call = ["bench", "kernels", "--device", "cpu", "--rounds", "1", "--ops", "norm,decode", "--out", str(tmp_path)]
    assert cli.main(call) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["op", "norm", "decode", "written"]
    monkeypatch.setattr(cases, "worst", lambda got, want, dtype: (1.0, 0.0))
    assert cli.main([*call, "--only", "decode"]) == 5
    assert "refused: error 1.0e+00 > 0.0e+00" in capsys.readouterr().out


def test_what_was_measured_before_an_interruption_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cli

    measure, rows = kernels.measure, []

    def stopped(*args: object) -> kernels.Row:
        if len(rows) == 2:
            signal.raise_signal(signal.SIGTERM)
        rows.append(measure(*args))  # type: ignore[arg-type]
        return rows[-1]

    monkeypatch.setattr(kernels, "measure", stopped)
    call = ["bench", "kernels", "--device", "cpu", "--ops", "norm,decode,gates", "--rounds", "1"]
    call += ["--out", str(tmp_path)]
    assert cli.main(call) == 128 + signal.SIGTERM
    kept = json.loads(next((tmp_path / "bench").iterdir()).read_text())
    assert [row["op"] for row in kept["rows"]] == [row.op for row in rows] and len(rows) == 2
    assert kept["interrupted"] == signal.SIGTERM
    assert "interrupted by SIGTERM" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "measure", lambda *args: signal.raise_signal(signal.SIGTERM))
    assert cli.main(call) == 128 + signal.SIGTERM and len(list((tmp_path / "bench").iterdir())) == 1


def test_the_doctor_command(capsys: pytest.CaptureFixture[str]) -> None:
    import cli

    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("python") and "kernels" in out
    assert cli.main(["doctor", "--compile", "--only", "gdn3"]) == 2
    assert "no configuration contains 'gdn3'" in capsys.readouterr().err
    assert cli.main(["doctor", "--target", "sm_80"]) == 2
    assert "add --compile" in capsys.readouterr().err


def test_a_missing_peer_is_none() -> None:
    assert cases.find_peer("no_such_library") is None
