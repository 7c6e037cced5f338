"""The chunk kernels on bf16 operands without a GPU: the interpreter keeps bf16 as raw bits, and is taught to compute.

It multiplies and adds those bits as whole numbers and cuts fp32 to bf16; a GPU rounds to the nearest. So does this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.gdn2.kernels.oracle import EXTREME, Case, assert_close, draw, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels know bf16: test_triton_gpu.py")


def wide(x: Any) -> np.ndarray:
    """The numbers of an interpreted tensor, 16-bit ones as fp32."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32) if x.dtype.scalar == tl.float16 else x.data


def rounded(x: np.ndarray) -> Any:
    """fp32 numbers as an interpreted bf16 tensor."""
    bits = torch.from_numpy(np.array(x, dtype=np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits, tl.bfloat16)


@pytest.fixture(autouse=True)
def interpreted_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    cast, binary = builder.cast_impl, builder.binary_op

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        return interpreter.TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        narrowed = x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16
        return rounded(x.data) if narrowed else cast(self, x, to)

    def binary_op(self: Any, a: Any, b: Any, op: Callable) -> Any:
        arithmetic = a.dtype.scalar == tl.bfloat16 and op in (np.add, np.subtract, np.multiply, np.maximum)
        return rounded(op(wide(a), wide(b))) if arithmetic else binary(self, a, b, op)

    for name, call in (("create_dot", dot), ("cast_impl", cast_impl), ("binary_op", binary_op)):
        monkeypatch.setattr(builder, name, call)


@pytest.mark.parametrize(
    "case",
    [
        Case(150, key=64, value=64),
        Case(150, key=48, value=32, heads=1, value_heads=2),
        Case(150, key=64, value=64, gates=EXTREME),
        Case(150, key=64, value=64, gates=(-2.0, -1e-8)),
        Case(150, key=64, value=64, decay="head"),
        Case(150, key=64, value=64, decay="none"),
        Case(150, key=32, value=32, rank=2, diag=True, erase=False),
    ],
    ids=["channel", "grouped", "extreme", "strong", "head", "none", "rank"],
)
def test_bf16_errs_as_its_operands_do(case: Case) -> None:
    """The bounds of the same test on a GPU; bf16 has 2e-3 to lose with every operand."""
    inputs = draw(case).to(torch.bfloat16)
    exact = run(inputs.to(torch.float64), "torch", backward=True)
    assert_close(run(inputs, "triton", backward=True), exact, lambda name: 2e-2 if name == "dg" else 1e-2)


def test_decays_per_channel_are_those_of_gates_of_eleven_bits() -> None:
    inputs = draw(Case(150, key=64, value=64)).to(torch.bfloat16)
    g = inputs.tensors["g"]
    assert g is not None
    scale = 256 * math.log2(math.e)
    gates = (g * scale).half().float() / scale
    assert (gates != g).any() and ((gates - g).abs() <= 2**-11 * g.abs() + 1e-9).all()
    other = replace(inputs, tensors={**inputs.tensors, "g": gates})
    found, expected = (run(x, "triton", backward=True) for x in (inputs, other))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
