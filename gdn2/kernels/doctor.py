"""What would run on this machine, and why: versions, device, chosen implementation, known trouble, missing pieces."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch

from gdn2 import env
from gdn2.kernels.dispatch import default

OPTIONAL = (
    ("transformers", "other models (--model hf:...): pip install 'gdn2-eval[hf]'"),
    ("fla", "the peer of `bench kernels`: pip install flash-linear-attention"),
)
SOUND_ON_HOPPER = (3, 9)
"""Older ones assemble for Hopper with a ptxas that miscompiles matrix products (triton pull request 11781)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. A problem stops or spoils work, a note is good to know."""

    kind: Literal["ok", "note", "problem"]
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What the findings are drawn from."""

    torch: str
    torch_cuda: str | None  # CUDA version torch was built for; None is a CPU build
    triton: str | None
    device: str | None  # name of the GPU
    capability: tuple[int, int] | None
    memory: int  # bytes of the GPU
    interpreted: bool  # TRITON_INTERPRET is set
    missing: tuple[str, ...]  # optional packages that are not installed
    packages: tuple[tuple[str, str], ...] = ()


def look() -> Machine:
    """The machine this process runs on."""
    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return Machine(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        triton=_version("triton"),
        device=properties.name if properties else None,
        capability=(properties.major, properties.minor) if properties else None,
        memory=properties.total_memory if properties else 0,
        interpreted=env.get("TRITON_INTERPRET") not in ("", "0"),
        missing=tuple(name for name, _ in OPTIONAL if find_spec(name) is None),
        packages=tuple((name, found) for name in ("gdn2-eval", "numpy", "lm-eval") if (found := _version(name))),
    )


def examine(machine: Machine) -> list[Finding]:
    """What would run on `machine` and why."""
    own = ", ".join(f"{name} {found}" for name, found in machine.packages)
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}; {own}")]
    build = f"built for CUDA {machine.torch_cuda}" if machine.torch_cuda else "built for CPU only"
    findings.append(Finding("ok", "torch", f"{machine.torch}, {build}"))
    findings += [_triton(machine), _device(machine), _implementation(machine)]
    findings += _hopper(machine)
    if machine.interpreted:
        kind: Literal["note", "problem"] = "problem" if machine.device else "note"
        findings.append(
            Finding(kind, "interpreter", "TRITON_INTERPRET is set: kernels run interpreted, thousands of times slower")
        )
    for name, why in OPTIONAL:
        if name in machine.missing:
            findings.append(Finding("note", name, f"not installed; needed for {why}"))
    return findings


def _triton(machine: Machine) -> Finding:
    if machine.triton is None:
        return Finding("problem" if machine.device else "note", "triton", "not installed; GPU kernels need it")
    return Finding("ok", "triton", machine.triton)


def _device(machine: Machine) -> Finding:
    if machine.device is None:
        why = "torch sees no GPU or driver" if machine.torch_cuda else "this torch is built for CPU only"
        return Finding("note", "device", f"cpu, {torch.get_num_threads()} threads: {why}")
    assert machine.capability is not None
    major, minor = machine.capability
    text = f"{machine.device}, sm_{major}{minor}, {machine.memory / 2**30:.0f} GiB"
    if major < 8:
        return Finding("problem", "device", f"{text}: the kernels are compiled for sm_80 and newer")
    return Finding("ok", "device", text)


def _implementation(machine: Machine) -> Finding:
    with torch.no_grad():
        name = default("cuda" if machine.device else "cpu", machine.capability if machine.triton else None)
    why = {
        "triton": "fused kernels on the GPU",
        "numba": "compiled loops on the CPU, plain torch for training",
        "torch": "chunks of matrix products in plain torch",
        "reference": "token by token",
    }[name]
    return Finding("ok", "kernels", f"{name}: {why}; chosen from the device, an explicit choice wins")


def _hopper(machine: Machine) -> list[Finding]:
    if machine.triton is None or machine.capability is None or machine.capability[0] != 9:
        return []
    if release(machine.triton) >= SOUND_ON_HOPPER:
        return []
    text = (
        f"{machine.triton} on Hopper: its ptxas, older than 13.3, compiles some kernels wrongly; check with `gdn2-eval "
        "bench kernels`, which refuses wrong results, or set TRITON_PTXAS_PATH to a newer ptxas"
    )
    return [Finding("note", "triton", text)]


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: "3.7.1+git12" is (3, 7, 1)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
