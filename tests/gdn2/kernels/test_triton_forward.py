"""Forward chunk kernels, interpreted where there is no GPU, against the token loop in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn2.kernels import delta_rule
from gdn2.kernels.triton import segments, tuning
from tests.gdn2.kernels.oracle import EXTREME, Case, allowed, assert_close, device, draw, run

LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 300)
VARIANTS = {
    "gdn2": Case(70, heads=2, value_heads=2),
    "head": Case(70, decay="head"),
    "undecayed": Case(70, decay="none"),
    "write only": Case(70, erase=False),
    "mamba2": Case(70, decay="head", erase=False),
    "linear attention": Case(70, decay="none", erase=False),
    "grouped": Case(40, heads=2, value_heads=4, value=12),
    "grouped wide": Case(40, value_heads=2, wide=("e", "g")),
    "grouped wide decay": Case(40, value_heads=3, wide=("g",), decay="head"),
    "diag": Case(70, decay="head", erase=False, diag=True, value_heads=2),
    "diag per channel": Case(70, diag=True),
    "rank 4": Case(132, decay="head", erase=False, diag=True, rank=4, value_heads=2),
    "rank 3 per channel": Case(99, erase=False, rank=3),
    "rank 40": Case(120, decay="head", erase=False, diag=True, rank=40),
    "rank 64 per channel": Case(128, erase=False, rank=64),
    "no state": Case(40, state=False),
    "batch": Case(33, batch=2),
    "range 2": Case(70, erase_max=2.0),
}


def check(case: Case, dtype: torch.dtype, backward: bool = False) -> None:
    inputs = draw(case).to(dtype, device())
    exact = run(inputs.to(torch.float64), "reference", backward)
    assert_close(run(inputs, "triton", backward), exact, allowed(inputs, exact, backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_lengths(tokens: int, decay: str) -> None:
    check(Case(tokens, decay=decay), torch.float32)


@pytest.mark.parametrize("key,value", [(60, 100), (192, 200), (256, 16), (16, 256), (4, 8)])
def test_widths(key: int, value: int) -> None:
    check(Case(20, key=key, value=value), torch.float32)


@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("gates", [EXTREME, *((gate,) for gate in EXTREME)], ids=str)
def test_extreme_decay(decay: str, gates: tuple[float, ...]) -> None:
    check(Case(70, decay=decay, gates=gates), torch.float32)


def test_equal_keys_and_full_erasure() -> None:
    inputs = draw(Case(70)).to(torch.float32, device())
    k = inputs.tensors["k"]
    assert k is not None
    k[:, 5:60] = k[:, 5:6]
    k[:, 62:66] = 0.0
    for erase in (1.0, 2.0):
        inputs.tensors |= {"e": erase * k, "g": torch.zeros_like(k)}
        exact = run(inputs.to(torch.float64), "reference")
        # 55 reflections about one key: a rounding error of the inverse comes back 55 times.
        assert_close(run(inputs, "triton"), exact, lambda name: 1e-5)


@pytest.mark.parametrize("case", [Case(130), Case(130, decay="head"), Case(132, decay="head", erase=False, rank=4)])
@pytest.mark.parametrize("cut", [17, 60, 100])
def test_a_later_token_never_changes_an_earlier_output(case: Case, cut: int) -> None:
    cut -= cut % case.rank
    inputs = draw(case).to(torch.float32, device())
    before = run(inputs, "triton")["o"]
    rows = {n: x if x is None or n == "state" else x[:, :cut].contiguous() for n, x in inputs.tensors.items()}
    shorter = run(replace(inputs, tensors=rows), "triton")["o"]
    for name in ("q", "k", "e", "z", "g"):
        x = inputs.tensors[name]
        if x is not None:
            x[:, cut:] = 30 * x[:, cut:] if name == "g" else x[:, cut:].flip(-1)
    assert torch.equal(run(inputs, "triton")["o"][:, :cut], before[:, :cut])
    assert torch.equal(shorter, before[:, :cut])


def test_repeats_are_bit_identical() -> None:
    inputs = draw(Case(70, heads=1, value_heads=2)).to(torch.float32, device())
    first, second = (run(inputs, "triton", backward=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_need_not_be_contiguous() -> None:
    inputs = draw(Case(40, heads=2, value_heads=2)).to(torch.float32, device())
    plain = run(inputs, "triton")
    for name in ("q", "k", "e", "z", "g"):
        x = inputs.tensors[name]
        assert x is not None
        inputs.tensors[name] = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    spaced = run(inputs, "triton")
    assert all(torch.equal(spaced[name], plain[name]) for name in plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_bf16_at_model_width(decay: str) -> None:
    case = Case(9000, heads=2, value_heads=2, key=128, value=128, decay=decay)
    inputs = draw(case).to(torch.bfloat16, "cuda")
    exact = run(inputs.to(torch.float64), "torch", backward=True)
    first = run(inputs, "triton", backward=True)
    # dg is a difference of the two halves of each pair, which are rounded apart.
    assert_close(first, exact, lambda name: 2e-2 if name == "dg" else 1e-2)
    for _ in range(50):
        again = run(inputs, "triton", backward=True)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_segments_have_fixed_length_and_never_straddle_sequences() -> None:
    cut = segments.layout((0, 130, 1, 300), 64, 128, torch.device("cpu"))
    assert cut.segment_row.tolist() == [0, 0, 128, 130, 131, 259, 387]
    assert cut.segment_end.tolist() == [0, 128, 130, 131, 259, 387, 431]
    assert cut.segment_chunk.tolist() == [0, 0, 2, 3, 4, 6, 8]
    assert cut.chunk_row.tolist() == [0, 64, 128, 130, 131, 195, 259, 323, 387]
    assert cut.chunk_rows.tolist() == [64, 64, 2, 1, 64, 64, 64, 64, 44]
    assert (cut.first.tolist(), cut.count.tolist(), cut.last.tolist()) == ([0, 1, 3, 4], [1, 2, 1, 3], [0, 2, 3, 6])
    assert not segments.layout((130, 300), 64, 0, torch.device("cpu")).split


def test_segments_grow_with_their_place_alone() -> None:
    cut = segments.layout((700, 2900), 64, 64, torch.device("cpu"))
    lengths = (cut.segment_end - cut.segment_row).tolist()
    assert lengths == [64] * 4 + [128] * 3 + [60] + [64] * 4 + [128] * 6 + [256] * 7 + [84]
    longest = cut.longest.tolist()
    assert sorted(longest) == [*range(26)]
    assert [lengths[i] for i in longest] == sorted(lengths, reverse=True)
    assert cut.but_first.tolist() == [i for i in longest if i not in (0, 8)]
    assert cut.but_last.tolist() == [i for i in longest if i not in (7, 25)]


@pytest.mark.parametrize(
    "case",
    [
        Case(200, lengths=(0, 130, 1, 69)), Case(200, lengths=(0, 130, 1, 69), decay="head"),
        Case(200, lengths=(0, 130, 1, 69), decay="none"), Case(200, key=132),
    ],
    ids=["channel", "head", "none", "wide"],
)  # fmt: skip
def test_a_split_sequence_equals_the_loop(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SEGMENT", 64)
    tuning._plan.cache_clear()
    try:
        check(case, torch.float32, backward=True)
    finally:
        tuning._plan.cache_clear()


def test_the_plan_knows_no_length_and_refuses_what_the_kernels_cannot_do() -> None:
    few, many = (tuning.plan(torch.device("cpu"), heads, 128, 128, "channel", torch.bfloat16, 1) for heads in (16, 512))
    assert few.segment == tuning.SEGMENT
    assert many.segment == 0
    x = torch.zeros(1, 4, 1, 300, device=device())
    with pytest.raises(ValueError, match="K and V up to 256"):
        delta_rule(x, x, x, x, x, implementation="triton")
    x = torch.zeros(1, 4, 1, 8, dtype=torch.float64, device=device())
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got torch.float64"):
        delta_rule(x, x, x, x, x, implementation="triton")
    x = torch.zeros(1, 65, 1, 8, device=device())
    with pytest.raises(ValueError, match="takes up to 64 rows a token, got rank 65"):
        delta_rule(x, x, None, x, None, rank=65, implementation="triton")
