"""The precision of the inverse inside a chunk: what a caller chooses, and what is taken unasked."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from gdn2.kernels import delta_rule, solve_precision
from gdn2.kernels.contract import SOLVE, Solve
from tests.gdn2.kernels.oracle import Case, Inputs, device, draw, error, run


def hard(dtype: torch.dtype, decay: str = "channel", tokens: int = 130, width: int = 16, heads: int = 1) -> Inputs:
    """Keys near one another and erased up to twice, for an inverse that is far from the identity."""
    case = Case(tokens, heads, heads, width, width, decay=decay, gates=(-1e-2, -1e-8), erase_max=2.0)
    inputs = draw(case).to(torch.float64, device())
    k, e = inputs.tensors["k"], inputs.tensors["e"]
    assert k is not None and e is not None
    near = torch.nn.functional.normalize(k + k[:, :1], dim=-1)
    inputs.tensors |= {"k": near, "e": e / k * near}
    return inputs.to(dtype)


def exact_and_unasked(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients in fp64, and those of the kernels where nothing is chosen."""
    return run(inputs.to(torch.float64), "torch", backward=True), run(inputs, "triton", backward=True)


@pytest.mark.parametrize("decay", ["channel", "head"])
def test_fp32_inputs_are_solved_in_fp32_unless_less_is_asked_for(decay: str) -> None:
    inputs = hard(torch.float32, decay)
    exact, unasked = exact_and_unasked(inputs)
    with solve_precision("tf32x3"):
        accurate = run(inputs, "triton", backward=True)
    with solve_precision("fp16"):
        coarse = run(inputs, "triton", backward=True)
    for name, want in exact.items():
        assert torch.equal(unasked[name], accurate[name]), name
        assert error(unasked[name], want) < 5e-5, name
        assert 10 * error(unasked[name], want) < error(coarse[name], want) < 0.1, name


def test_the_backward_pass_takes_the_precision_of_its_call() -> None:
    inputs = hard(torch.float32)
    tensors = {name: None if x is None else x.requires_grad_() for name, x in inputs.tensors.items()}

    def gradients(precision: Solve, around: Solve) -> list[Tensor]:
        q, k, e, z, g, state = (tensors[name] for name in ("q", "k", "e", "z", "g", "state"))
        assert q is not None and k is not None and z is not None
        with solve_precision(precision):
            o, last = delta_rule(q, k, e, z, g, state, implementation="triton")
        with solve_precision(around):
            return list(torch.autograd.grad(o.sum() + last.sum(), [q, k, z]))

    want, got, coarse = (gradients(*how) for how in (("fp16", "fp16"), ("fp16", "tf32x3"), ("tf32x3", "fp16")))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(want, coarse, strict=True))


def test_the_choice_ends_with_its_context() -> None:
    with pytest.raises(ZeroDivisionError), solve_precision("refined"):
        assert SOLVE.get() == "refined"
        raise ZeroDivisionError
    assert SOLVE.get() is None


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="^solve precision must be one of fp16, refined, tf32x3, got 'bf16'$"):
        solve_precision("bf16").__enter__()  # type: ignore[arg-type]


def test_the_torch_path_always_solves_in_fp32() -> None:
    inputs = hard(torch.float32)
    with solve_precision("fp16"):
        chosen = run(inputs, "torch")
    assert all(torch.equal(x, chosen[name]) for name, x in run(inputs, "torch").items())


@pytest.mark.parametrize("decay", ["channel", "head"])
def test_refined_products_of_fp16_are_as_accurate_as_those_of_fp32(decay: str) -> None:
    inputs = hard(torch.float32, decay)
    exact, accurate = exact_and_unasked(inputs)
    with solve_precision("refined"):
        refined = run(inputs, "triton", backward=True)
    for name, want in exact.items():
        assert not torch.equal(refined[name], accurate[name]), name
        assert error(refined[name], want) < 4 * error(accurate[name], want) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_inputs_of_16_bits_lose_nothing_by_what_is_taken_unasked(decay: str, dtype: torch.dtype) -> None:
    inputs = hard(dtype, decay, 600, 128, heads=16)  # in one head the error of dg is a matter of luck
    taken = "fp16" if dtype == torch.bfloat16 else "refined"
    exact, unasked = exact_and_unasked(inputs)
    errors = {}
    for precision in get_args(Solve):
        with solve_precision(precision):
            asked = run(inputs, "triton", backward=True)
        errors[precision] = {name: error(asked[name], want) for name, want in exact.items()}
        assert all(torch.equal(unasked[name], asked[name]) for name in exact) == (precision == taken)
    for name, least in errors["tf32x3"].items():
        allowed = 1.1 if name == "dg" else 1.05  # of dg per head, a sum over channels, there are few numbers
        assert max(errors["refined"][name], errors[taken][name]) <= allowed * least, (name, errors)
