"""The doctor's findings for machines we do not have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gdn2.kernels import numba
from gdn2.kernels.doctor import Finding, Machine, examine, look, release

H200 = Machine("2.13.0", "13.0", "3.9.0", "NVIDIA H200", (9, 0), 141 << 30, False, ())
CPU = Machine("2.13.0+cpu", None, "3.9.0", None, None, 0, False, ("fla",))


def by_subject(machine: Machine) -> dict[str, Finding]:
    """The last finding of each subject."""
    return {finding.subject: finding for finding in examine(machine)}


def test_a_sound_gpu_machine_has_no_remarks() -> None:
    findings = examine(H200)
    assert {f.kind for f in findings} == {"ok"}
    assert "sm_90, 141 GiB" in by_subject(H200)["device"].text


@pytest.mark.parametrize(
    ("triton", "remarked"), [("3.6.0", True), ("3.7.1", True), ("3.9.0", False), ("3.10.0", False)]
)
def test_triton_that_miscompiles_hopper_is_named(triton: str, remarked: bool) -> None:
    found = by_subject(replace(H200, triton=triton))["triton"]
    assert (found.kind == "note" and "Hopper" in found.text) == remarked
    blackwell = by_subject(replace(H200, triton=triton, capability=(10, 0)))["triton"]
    assert blackwell.kind == "ok"


def test_a_cpu_machine_is_told_why() -> None:
    found = by_subject(CPU)
    assert found["device"].kind == "note" and "built for CPU only" in found["device"].text
    assert found["kernels"].text.startswith("numba:" if numba.available() else "torch:")
    assert "bench kernels" in found["fla"].text
    assert "sees no GPU" in by_subject(replace(CPU, torch_cuda="13.0"))["device"].text


def test_problems() -> None:
    assert by_subject(replace(H200, triton=None))["triton"].kind == "problem"
    assert by_subject(replace(H200, capability=(7, 5)))["device"].kind == "problem"
    assert by_subject(replace(H200, interpreted=True))["interpreter"].kind == "problem"
    assert by_subject(replace(CPU, interpreted=True))["interpreter"].kind == "note"


def test_this_machine_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    machine = look()
    assert machine.interpreted and examine(machine)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not look().interpreted


def test_versions_are_read_by_number() -> None:
    assert release("3.10.0+git1a") > release("3.7.1") > release("3.7.0rc1") > release("3.6")
