"""The end of a layer: gated norm and its gradients against the torch twin in fp64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from gdn2.kernels.layer import gated_norm
from tests.gdn2.kernels.around import DEVICE, error
from tests.gdn2.kernels.memory import guarded


def u(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(*shape, generator=rng, dtype=torch.float64) - 2


@pytest.mark.parametrize("shape", [(1, 1, 16), (37, 2, 64), (130, 3, 100), (5, 2, 128), (3, 1, 256)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_norm_and_gradients_equal_torch(
    shape: tuple[int, int, int], activation: Literal["silu", "sigmoid"]
) -> None:
    tensors = (u(*shape), u(*shape, seed=1), u(shape[-1], seed=2))
    upstream = u(*shape, seed=3)
    want_inputs = [x.clone().requires_grad_() for x in tensors]
    want = gated_norm(*want_inputs, 1e-5, activation, "reference")
    want.backward(upstream)
    inputs = [guarded(x.float().to(DEVICE)).requires_grad_() for x in tensors]
    got = gated_norm(*inputs, 1e-5, activation, "triton")
    got.backward(guarded(upstream.float().to(DEVICE)))
    assert error(got, want) < 1e-6
    for mine, theirs in zip(inputs, want_inputs, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert error(mine.grad, theirs.grad) < 2e-6


def test_equation_and_empty_batch() -> None:
    o, gate, weight = u(4, 2, 8), u(4, 2, 8, seed=1), u(8, seed=2)
    want = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight * gate * gate.sigmoid()
    assert error(gated_norm(o, gate, weight, 1e-5, "silu", "torch").double(), want) < 1e-6
    empty = gated_norm(*(x.float().to(DEVICE) for x in (o[:0], gate[:0], weight)), 1e-5, "silu", "triton")
    assert empty.shape == (0, 2, 8)


def test_a_row_is_the_same_in_every_batch() -> None:
    o, gate, weight = (x.float().to(DEVICE) for x in (u(40, 3, 64), u(40, 3, 64, seed=1), u(64, seed=2)))
    together = gated_norm(o, gate, weight, 1e-5, "silu", "triton")
    assert torch.equal(gated_norm(o[7:9], gate[7:9], weight, 1e-5, "silu", "triton"), together[7:9])


def test_unknown_activation_is_refused() -> None:
    x = u(1, 1, 4)
    with pytest.raises(ValueError, match="silu or sigmoid, got 'tanh'"):
        gated_norm(x, x, x[0, 0], 1e-5, "tanh")  # type: ignore[arg-type]


def test_fp64_is_refused() -> None:
    x = u(1, 1, 4).to(DEVICE)
    with pytest.raises(ValueError, match="float64"):
        gated_norm(x, x, x[0, 0], 1e-5, "silu", "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gated_norm_at_a_models_shape_in_bf16() -> None:
    o, gate, weight = u(4096, 16, 128).bfloat16(), u(4096, 16, 128, seed=1).bfloat16(), u(128, seed=2).float()
    found = {}
    for name, dtype, implementation in (
        ("exact", torch.float64, "torch"), ("torch", torch.bfloat16, "torch"), ("kernel", torch.bfloat16, "triton"),
    ):  # fmt: skip
        inputs = [x.detach().to(DEVICE, dtype).requires_grad_() for x in (o, gate)]
        inputs.append(weight.detach().to(DEVICE, torch.float64 if name == "exact" else torch.float32).requires_grad_())
        y = gated_norm(*inputs, 1e-5, "silu", implementation)  # type: ignore[arg-type]
        y.backward(torch.ones_like(y))
        found[name] = [x.detach().cpu() for x in (y, *(i.grad for i in inputs)) if x is not None]
    for mine, torchs, exact in zip(found["kernel"], found["torch"], found["exact"], strict=True):
        assert error(mine, exact) <= 2 * error(torchs, exact) + 1e-5
