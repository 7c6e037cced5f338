"""Packed rows against plain lists, shapes by the names of their axes, functions that depend on the element alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2 import numerics
from gdn2.ragged import Ragged
from gdn2.shapes import check

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@given(LENGTHS)
def test_every_index_is_what_a_list_would_say(lengths: list[int]) -> None:
    ragged = Ragged(lengths)
    tokens = [(n, i) for n, length in enumerate(lengths) for i in range(length)]
    assert ragged.n_sequences == len(lengths) and ragged.n_tokens == len(tokens)
    assert ragged.starts == (0, *itertools.accumulate(lengths)) and ragged.cu_seqlens.tolist() == list(ragged.starts)
    assert list(zip(ragged.sequence.tolist(), ragged.position.tolist(), strict=True)) == tokens
    assert ragged.counts.tolist() == lengths
    assert ragged.begun.tolist() == [n for n, length in enumerate(lengths) if length]
    assert [tokens[i] for i in ragged.last.tolist()] == [(n, length - 1) for n, length in enumerate(lengths) if length]
    assert all(x.dtype == torch.int64 for x in (ragged.cu_seqlens, ragged.sequence, ragged.last, ragged.begun))


@given(LENGTHS, st.integers(0, 4))
def test_windows_stand_before_the_tokens_of_their_sequence(lengths: list[int], past: int) -> None:
    ragged = Ragged(lengths)
    order, here, ends = ragged.behind_windows(past)
    # What a plain program would lay out: for each sequence its earlier tokens, then its own.
    tokens, rows, places, last = 0, [], [], []
    for n, length in enumerate(lengths):
        rows += [ragged.n_tokens + n * past + i for i in range(past)]
        places += range(len(rows), len(rows) + length)
        rows += range(tokens, tokens + length)
        tokens += length
        last.append(list(range(len(rows) - past, len(rows))))
    assert order.tolist() == rows and here.tolist() == places
    assert ends.tolist() == last
    assert ragged.behind_windows(past)[0] is order  # made once


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence lengths must be >= 0, got -2"):
        Ragged([3, -2, 1])
    assert Ragged([]).n_tokens == 0 and Ragged([]).starts == (0,)


def test_an_axis_has_one_size() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(3, 4)
    assert check({"x": (x, "a b"), "y": (y, "b c"), "none": (None, "z z")}) == {"a": 2, "b": 3, "c": 4}
    assert check({}) == {} and check({"scalar": (torch.zeros(()), "")}) == {}
    with pytest.raises(ValueError, match="^axis 'b' is 4 in y but 3 in x$"):
        check({"x": (x, "a b"), "y": (y, "c b")})
    with pytest.raises(ValueError, match="^axis 'a' is 3 in x but 2 in x$"):
        check({"x": (x, "a a")})
    with pytest.raises(ValueError, match=r"^x must have axes \[a b c\], got shape \[2, 3\]$"):
        check({"x": (x, "a b c")})
    with pytest.raises(ValueError, match=r"^x must have axes \[\], got shape"):
        check({"x": (x, "")})


EDGES = [0.0, -0.0, 1e-8, -1e-8, 1e-40, 0.5, -0.5, 15.0, -15.0, 88.0, -88.0, 120.0, -120.0, 1e30, -1e30]
EXACT = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_functions_are_right_at_the_edges(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(numerics, "_compiled", lambda x: None)
    x = torch.tensor(EDGES)
    want = EXACT[name](x.double())
    with torch.no_grad():
        got = getattr(numerics, name)(x)
    assert got.isfinite().all()
    assert ((got.double() - want).abs() <= 4e-7 * want.abs() + 1e-38).all()
    if name == "softplus":  # a decay of 1e-8 a token must survive
        assert (getattr(numerics, name)(torch.tensor([-18.0, -40.0])) > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 39), st.sampled_from(list(EXACT)), st.booleans())
def test_a_number_has_one_result_wherever_it_stands(size: int, at: int, name: str, compiled: bool) -> None:
    x = torch.linspace(-9, 9, size)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(numerics, "_compiled", lambda x: None)
        whole = getattr(numerics, name)(x)
        alone = getattr(numerics, name)(x[at % size : at % size + 1])
    assert torch.equal(whole[at % size : at % size + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_have_the_length_they_say(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    with torch.no_grad():
        unit = numerics.l2_norm(x, eps=0.0)
        even = numerics.rms_norm(x, torch.ones(64, dtype=dtype), 0.0)
    assert unit.dtype == even.dtype == dtype
    assert (unit.double().norm(dim=-1) - 1).abs().max() < bound
    assert (even.double().square().mean(-1) - 1).abs().max() < 2 * bound
    assert not numerics.l2_norm(torch.zeros(2, 8, dtype=dtype)).any()  # nothing stays nothing, without NaN
    assert not numerics.rms_norm(torch.zeros(2, 64, dtype=dtype), torch.ones(64, dtype=dtype), 1e-6).any()
