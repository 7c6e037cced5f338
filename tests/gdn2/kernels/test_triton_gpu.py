"""The chunk kernels on a GPU, where alone they are compiled and large: widths, lengths and offsets of real models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gdn2.kernels import delta_rule, delta_tokens
from gdn2.kernels.triton import tuning
from tests.gdn2.kernels.oracle import EXTREME, Case, assert_close, draw, error, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def rows(lengths: Sequence[int], heads: int, width: int) -> list[Tensor]:
    """bf16 q, k, e and z and fp32 g of packed sequences, drawn on the GPU: [T, heads, width]."""
    rng = torch.Generator("cuda").manual_seed(0)
    shape = (sum(lengths), heads, width)

    def unit() -> Tensor:
        x = torch.randn(shape, generator=rng, device="cuda", dtype=torch.bfloat16)
        return x.div_(x.norm(dim=-1, keepdim=True))

    q, k, z = unit(), unit(), unit()
    return [q, k, k * 0.5, z, torch.rand(shape, generator=rng, device="cuda").mul_(-0.1)]


def chunks(x: list[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    q, k, e, z, g = (t[None] for t in x)
    o, last = delta_rule(q, k, e, z, g, None, bounds, implementation="triton")
    return o[0], last


@pytest.mark.parametrize("decay", ["channel", "head", "none"])
@pytest.mark.parametrize("key,value", [(192, 200), (256, 256), (64, 64), (128, 256)])
def test_widths_in_bf16(key: int, value: int, decay: str) -> None:
    inputs = draw(Case(300, heads=2, value_heads=2, key=key, value=value, decay=decay)).to(torch.bfloat16, "cuda")
    exact = run(inputs.to(torch.float64), "torch", backward=True)
    assert_close(run(inputs, "triton", backward=True), exact, lambda name: 2e-2 if name == "dg" else 1e-2)


@pytest.mark.parametrize("gates", [(-2.0, -1e-8), (-3.0,), (-6.0, -1e-8), EXTREME], ids=str)
def test_strong_decay_in_bf16(gates: tuple[float, ...]) -> None:
    case = Case(300, heads=2, value_heads=2, key=128, value=128, gates=gates)
    inputs = draw(case).to(torch.bfloat16, "cuda")
    exact = run(inputs.to(torch.float64), "torch", backward=True)
    assert_close(run(inputs, "triton", backward=True), exact, lambda name: 2e-2 if name == "dg" else 1e-2)


@pytest.mark.parametrize("strong", [-3.0, -20.0, -1e4])
@pytest.mark.parametrize("cut", [20, 63, 100, 130])
def test_a_later_strong_decay_never_changes_an_earlier_output(cut: int, strong: float) -> None:
    inputs = draw(Case(192, heads=4, value_heads=4, key=128, value=128, gates=(-0.1, -0.3))).to(torch.bfloat16, "cuda")
    before = run(inputs, "triton")["o"]
    g = inputs.tensors["g"]
    assert g is not None
    g[:, cut:, :, 5:] = strong
    assert torch.equal(run(inputs, "triton")["o"][:, :cut], before[:, :cut])


@pytest.mark.parametrize("decay", ["channel", "head", "none"])
@pytest.mark.parametrize("key,value", [(128, 128), (256, 64), (64, 200)])
def test_a_split_sequence_in_bf16(key: int, value: int, decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SEGMENT", 128)
    tuning._plan.cache_clear()
    case = Case(1500, heads=2, value_heads=2, key=key, value=value, decay=decay, lengths=(1300, 1, 199))
    inputs = draw(case).to(torch.bfloat16, "cuda")
    exact = run(inputs.to(torch.float64), "torch", backward=True)
    got = run(inputs, "triton", backward=True)
    tuning._plan.cache_clear()
    assert_close(got, exact, lambda name: 2e-2 if name == "dg" else 1e-2)


def test_rows_beyond_2_to_the_31_elements() -> None:
    lengths = (2**31 // (16 * 128), 100)
    if torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("needs 70 GiB of GPU memory")
    x = rows(lengths, 16, 128)
    with torch.no_grad():
        o, last = chunks(x, lengths)
        alone, alone_last = chunks([t[lengths[0] :].contiguous() for t in x], lengths[1:])
    assert torch.equal(o[lengths[0] :], alone)
    assert torch.equal(last[1], alone_last[0])


def test_chunks_agree_with_decoding_over_100_000_tokens() -> None:
    lengths = (100_000,)
    x = rows(lengths, 2, 128)
    with torch.no_grad():
        o, last = chunks(x, lengths)
        state = torch.zeros_like(last)
        bounds = torch.tensor([0, lengths[0]], device="cuda")
        steps = delta_tokens(*x, state, bounds, implementation="triton")
    assert error(o[-1000:], steps[-1000:]) < 1e-2
    assert error(last, state) < 1e-2
