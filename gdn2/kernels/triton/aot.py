"""What each kernel compiles to, without a GPU: registers, shared memory, spills and tensor-core instructions.

The launches are not described a second time: the real calls run on tensors without storage, and every kernel they
would launch is compiled for the wanted device instead. The wheel of Triton carries the assembler and disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from gdn2.errors import UserError
from gdn2.kernels import delta_rule, delta_step, delta_tokens, solve_precision
from gdn2.kernels.contract import Solve
from gdn2.kernels.layer import Gates, Raw, fold_gates, gated_norm
from gdn2.kernels.mamba3 import Mixing, Shared, Turning, read, turn, write
from gdn2.ragged import Ragged

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
"""Bytes of shared memory one program may have (CUDA programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Compiled:
    """One kernel of one configuration on one target."""

    config: str
    kernel: str
    target: str
    warps: int
    registers: int  # a thread
    shared: int  # bytes a program
    local_loads: int  # LDL in the machine code: registers that did not fit
    local_stores: int  # STL
    hgmma: int  # matrix instructions: Hopper's, ...
    hmma: int  # ... Ampere's, ...
    utcmma: int  # ... Blackwell's
    nbytes: int  # of all its arguments: what it moves if it touches each once
    unset: int = 0  # on sm_90: reads of uniform registers that nothing wrote, the assembler's fault

    @property
    def spills(self) -> int:
        return self.local_loads + self.local_stores

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.target]


class _NoDevice:
    """A Triton driver that only names the device to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # Triton caches kernels by device number; no real one is negative

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(capability: int) -> Iterator[list[tuple[Any, int]]]:
    """Within this context kernels are compiled for `capability` and not launched; yields (kernel, argument bytes).

    Raises:
        UserError: Triton runs interpreted in this process.
    """
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    launches: list[tuple[Any, int]] = []
    jit, config = triton.runtime.jit.JITFunction, triton.runtime.driver
    launch = jit.run
    before = config._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        tensors = {id(x): x.numel() * x.element_size() for x in args if isinstance(x, Tensor)}
        launches.append((kernel, sum(tensors.values())))
        return kernel

    jit.run = compile_only
    config.set_active(_NoDevice(capability))
    try:
        yield launches
    finally:
        jit.run = launch
        config._active = before


def compile_config(name: str, target: str) -> list[Compiled]:
    """Compile every kernel that configuration `name` launches, each distinct one once.

    Raises:
        UserError: an unknown configuration or target, or Triton runs interpreted.
    """
    if name not in CONFIGS:
        raise UserError(f"unknown configuration {name!r}; known: {', '.join(CONFIGS)}")
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    with recording(TARGETS[target]) as launches:
        CONFIGS[name]()
    seen: dict[str, Compiled] = {}
    for kernel, nbytes in launches:
        seen.setdefault(kernel.hash, inspect(name, target, kernel, nbytes))
    return list(seen.values())


def inspect(config: str, target: str, kernel: Any, nbytes: int) -> Compiled:
    """Read a compiled kernel's resources from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(path))
        sass = _tool("nvdisasm", "-c", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Compiled(
        config=config, kernel=kernel.metadata.name, target=target, warps=kernel.metadata.num_warps,
        registers=int(registers[1]), shared=kernel.metadata.shared,
        local_loads=_count(r"LDL", sass), local_stores=_count(r"STL", sass),
        hgmma=_count(r"HGMMA", sass), hmma=_count(r"HMMA", sass), utcmma=_count(r"UTC\w*MMA", sass), nbytes=nbytes,
        unset=unset_reads(sass) if target == "sm_90" else 0,
    )  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _count(instruction: str, sass: str) -> int:
    return len(re.findall(rf"\s{instruction}(?=[\s.])", sass))


def unset_reads(sass: str) -> int:
    """Reads of uniform registers before any instruction, in program order, has written them; of Hopper's machine code.

    ptxas 12.8 lost the first half of the descriptor of a Hopper matrix product so: the product then reads anywhere.
    """
    written: set[int] = set()
    found = 0
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w[^;]*);", sass):
        name, _, rest = instruction.partition(" ")
        operands = [x.strip() for x in rest.split(",")]
        target = re.fullmatch(r"UR(\d+)", operands[0])
        for operand in operands[1:] if target else operands:
            for kind, number, pair in re.findall(r"(g?desc)?\[?UR(\d+)(\.64)?", operand):
                first, count = int(number), 2 if kind or pair else 1
                if kind == "gdesc":  # descriptors of both operands; of the second one alone where R holds the first
                    first, count = (first + 2, 2) if operands[1].startswith("R") else (first, 4)
                found += sum(i not in written for i in range(first, first + count))
        if target:
            size = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written.update(range(int(target[1]), int(target[1]) + size))
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _operator(
    heads: int = 16, value_heads: int = 16, key: int = 128, value: int = 128, *, decay: str = "channel",
    erase: bool = True, diag: bool = False, rank: int = 1, batch: int = 8, tokens: int = 4096,
    dtype: torch.dtype = torch.bfloat16, backward: bool = True,
) -> None:  # fmt: skip
    """Forward and backward of the operator at a model's shape."""
    t = tokens * rank
    q, k = (_meta(batch, t, heads, key, dtype=dtype, grad=backward) for _ in "qk")
    e = _meta(batch, t, heads, key, dtype=dtype, grad=backward) if erase else None
    z = _meta(batch, t, value_heads, value, dtype=dtype, grad=backward)
    width = {"channel": [key], "head": []}.get(decay)
    g = None if width is None else _meta(batch, t, heads, *width, dtype=torch.float32, grad=backward)
    own = _meta(batch, t, value_heads, dtype=torch.float32, grad=backward) if diag else None
    o, _ = delta_rule(q, k, e, z, g, None, None, diag=own, rank=rank, implementation="triton")
    if backward:
        o.backward(torch.empty_like(o))


def _solved(precision: Solve, decay: str = "channel") -> None:
    """Forward with an inverse of another precision than bf16 inputs take unasked."""
    with solve_precision(precision):
        _operator(decay=decay, backward=False)


def _decode(
    heads: int = 16, value_heads: int = 16, key: int = 128, value: int = 128, *, decay: str = "channel",
    erase: bool = True, diag: bool = False, rank: int = 1, n: int = 64, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """One token and several tokens for each of n sequences."""
    for rows in (1, 16):
        t = n * rows * rank
        q, k = (_meta(t, heads, key, dtype=dtype) for _ in "qk")
        e = _meta(t, heads, key, dtype=dtype) if erase else None
        z = _meta(t, value_heads, value, dtype=dtype)
        width = {"channel": [key], "head": []}.get(decay)
        g = None if width is None else _meta(t, heads, *width, dtype=torch.float32)
        own = _meta(t, value_heads, dtype=torch.float32) if diag else None
        state = _meta(n, value_heads, key, value, dtype=torch.float32)
        slots, bounds = _meta(n, dtype=torch.int64), _meta(n + 1, dtype=torch.int64)
        if rows == 1:
            delta_step(q, k, e, z, g, state, slots, diag=own, rank=rank, implementation="triton")
        else:
            delta_tokens(q, k, e, z, g, state, bounds, slots, diag=own, rank=rank, implementation="triton")


def _prologue(tied: bool, decay: int, key: int = 128, value: int = 128, heads: int = 16, tokens: int = 32768) -> None:
    """Convolution, folded gates and gated norm, forward and backward, and the convolution's decoding step."""
    from gdn2.kernels.triton import prologue

    ragged = Ragged([4096] * (tokens // 4096), "meta")
    channels = heads * key
    x, weight = _meta(tokens, channels, grad=True), _meta(channels, 4, grad=True)
    y, _ = prologue.short_conv(x, weight, None, _meta(ragged.n_sequences, channels, 3), ragged)
    y.backward(torch.empty_like(y))
    prologue.conv_step(_meta(64, channels), weight.detach(), None, _meta(64, channels, 3), _meta(64, dtype=torch.int64))
    f = {0: None, 1: _meta(tokens, heads, grad=True), 2: _meta(tokens, heads, key, grad=True)}[decay]
    fp32 = torch.float32
    raw = Raw(
        _meta(tokens, heads, key, grad=True), _meta(tokens, heads, key, grad=True),
        _meta(tokens, heads, value, grad=True),
        _meta(tokens, heads, grad=True) if tied else _meta(tokens, heads, key, grad=True),
        None if tied else _meta(tokens, heads, value, grad=True), f,
        None if f is None else _meta(heads, dtype=fp32, grad=True),
        None if f is None else _meta(f[0].numel(), dtype=fp32, grad=True),
    )  # fmt: skip
    out = [t for t in fold_gates(raw, Gates(key**-0.5), "triton") if t is not None]
    torch.autograd.backward(out, [torch.empty_like(t) for t in out])
    o, gate = (_meta(tokens, heads, value, grad=True) for _ in "og")
    y = gated_norm(o, gate, _meta(value, dtype=fp32, grad=True), 1e-5, "silu", "triton")
    y.backward(torch.empty_like(y))


def _mamba3(rank: int | None, norm: bool = False, heads: int = 64, width: int = 64, key: int = 128) -> None:
    """What surrounds the operator in Mamba-3, forward and backward."""
    rows, tokens, fp32 = rank or 1, 32768, torch.float32
    how = Turning(heads, 1, rows, key, key // 4, rank is not None, 1e-5)
    b, c = (
        Shared(_meta(tokens, rows * key, grad=True), _meta(key, dtype=fp32, grad=True),
               _meta(heads, rows, key, dtype=fp32, grad=True))
        for _ in "bc"
    )  # fmt: skip
    ragged = Ragged([4096] * (tokens // 4096), "meta")
    theta = _meta(ragged.n_sequences, heads, how.pairs, dtype=torch.int32)
    dt = _meta(tokens, heads, dtype=fp32, grad=True)
    k, q, _ = turn(b, c, dt, _meta(tokens, how.pairs, grad=True), theta, ragged, how, "triton")
    torch.autograd.backward([k, q], [torch.empty_like(k), torch.empty_like(q)])
    v, z = (_meta(tokens, heads, width, grad=True) for _ in "vz")
    x, gate, out = (None if rank is None else _meta(heads, rank, width, dtype=fp32, grad=True) for _ in range(3))
    y = write(v, _meta(tokens, heads, dtype=fp32, grad=True), x, "triton")
    y.backward(torch.empty_like(y))
    weight = _meta(heads, width, dtype=fp32, grad=True) if norm else None
    mixing = Mixing(_meta(heads, dtype=fp32, grad=True), x, gate, out, weight)
    y = read(_meta(tokens, rows, heads, width, grad=True), v, z, mixing, 1e-5, "triton")
    y.backward(torch.empty_like(y))


def _attention() -> None:
    """A window's attention in a hybrid of 1.3B, for prompts and for steps of decoding."""
    from gdn2.kernels.triton import attention

    heads, width, window = 18, 128, 2048
    q, k, v = (_meta(8192, heads, width) for _ in "qkv")
    caches = _meta(4, heads, window, width), _meta(4, heads, window, width)
    position, starts = _meta(4, dtype=torch.int64), _meta(5, dtype=torch.int64)
    attention.attend(q, k, v, *caches, position, starts, (2048,) * 4, window)
    attention.cached(k, v, *caches, position, starts, window, ring=True)
    attention.attend_cached(q[:4], *caches, position)


def _rows() -> None:
    """The norm and the MLP's activation of a 1.3B model, and the norm of its heads."""
    from gdn2.kernels.triton import rows

    for width in (2304, 128):
        rows.rms_norm(_meta(8192, width), _meta(width), 1e-5)
    rows.silu_times(_meta(8192, 7008), _meta(8192, 7008))


def _noise() -> None:
    """The noise of 64 drawn tokens."""
    from gdn2.kernels.triton import noise

    noise.gumbel(_meta(64, dtype=torch.int64), 32000)


CONFIGS: dict[str, Callable[[], None]] = {
    "gdn2": lambda: _operator(),
    "gdn2 fp32": lambda: _operator(dtype=torch.float32),
    "gdn2 fp16": lambda: _operator(dtype=torch.float16),
    "gdn2 tf32x3": lambda: _solved("tf32x3"),
    "gdn2 refined": lambda: _solved("refined"),
    "gdn2 1x131072": lambda: _operator(batch=1, tokens=131072, backward=False),
    "gdn2 grouped": lambda: _operator(heads=8, value_heads=16),
    "gdn2 64": lambda: _operator(key=64, value=64),
    "gdn": lambda: _operator(decay="head"),
    "gdn tf32x3": lambda: _solved("tf32x3", decay="head"),
    "gdn refined": lambda: _solved("refined", decay="head"),
    "gdn 256": lambda: _operator(heads=6, value_heads=6, key=256, value=256, decay="head"),
    "gdn 256 1x32768": lambda: _operator(6, 6, 256, 256, decay="head", batch=1, tokens=32768),
    "deltanet": lambda: _operator(decay="none"),
    "mamba2": lambda: _operator(1, 64, 64, 64, decay="head", erase=False),
    "mamba3": lambda: _operator(1, 64, 64, 64, decay="head", erase=False, diag=True),
    "mamba3 mimo": lambda: _operator(1, 64, 64, 64, decay="head", erase=False, diag=True, rank=4, tokens=1024),
    "decode gdn2": lambda: _decode(),
    "decode gdn2 fp32": lambda: _decode(dtype=torch.float32),
    "decode gdn": lambda: _decode(decay="head"),
    "decode gdn 256": lambda: _decode(6, 6, 256, 256, decay="head"),
    "decode deltanet": lambda: _decode(decay="none"),
    "decode mamba2": lambda: _decode(1, 64, 64, 64, decay="head", erase=False),
    "decode mamba3": lambda: _decode(1, 64, 64, 64, decay="head", erase=False, diag=True),
    "decode mamba3 mimo": lambda: _decode(1, 64, 64, 64, decay="head", erase=False, diag=True, rank=4),
    "layer gdn2": lambda: _prologue(tied=False, decay=2),
    "layer kda": lambda: _prologue(tied=True, decay=2),
    "layer gdn": lambda: _prologue(tied=True, decay=1, key=256, value=256, heads=6),
    "layer deltanet": lambda: _prologue(tied=True, decay=0),
    "layer mamba3": lambda: _mamba3(None),
    "layer mamba3 norm": lambda: _mamba3(None, norm=True),
    "layer mamba3 mimo": lambda: _mamba3(4),
    "rows": lambda: _rows(),
    "attention": lambda: _attention(),
    "noise": _noise,
}
"""Everything that ships: the mixers at the widths of the published models, KDA being GDN-2 with tied gates."""

HEADER = (
    "configuration", "kernel", "target", "warps", "registers", "shared KiB", "LDL + STL", "HGMMA", "HMMA", "UTCMMA",
    "MB",
)  # fmt: skip


def cells(compiled: Compiled) -> tuple[object, ...]:
    """One line of the table, in the order of `HEADER`. MB is what the kernel moves if it touches each argument once."""
    return (
        compiled.config, compiled.kernel, compiled.target, compiled.warps, compiled.registers,
        f"{compiled.shared / 1024:.1f}{'' if compiled.fits else ' too much'}", compiled.spills,
        compiled.hgmma, compiled.hmma, compiled.utcmma, f"{compiled.nbytes / 1e6:.1f}",
    )  # fmt: skip
