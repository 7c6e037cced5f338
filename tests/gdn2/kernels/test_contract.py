"""What the operator receives, which implementation gets it, and the pool of states, at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.errors import UserError
from gdn2.kernels import delta_step, delta_tokens, numba, reference, tokens
from gdn2.kernels.contract import Rows, packed, sequence_lengths
from gdn2.kernels.dispatch import choose, default, rule, step
from gdn2.kernels.tokens import BF16_STUCK, check_state_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@given(LENGTHS)
def test_boundaries_are_running_sums(lengths: list[int]) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    total = bounds[-1]
    assert sequence_lengths(1, total, bounds) == sequence_lengths(1, total, torch.tensor(bounds)) == tuple(lengths)
    rows = Rows(*[torch.zeros(total, 1, 1)] * 2, None, torch.zeros(total, 1, 1), None, None, tuple(lengths))
    assert list(rows.starts) == bounds


@pytest.mark.parametrize("bounds", [[], [1, 4], [0, 3], [0, 5], [0, 3, 2, 4], [0, -1, 4], [4], [0, 4, 4, 3]])
def test_boundaries_that_do_not_cover_the_rows_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 4"):
        sequence_lengths(1, 4, bounds)


def test_boundaries_go_with_one_row_and_may_be_empty() -> None:
    with pytest.raises(ValueError, match="axis 'b' must be 1 with cu_seqlens, got 2"):
        sequence_lengths(2, 4, [0, 4])
    assert sequence_lengths(3, 4, None) == (4, 4, 4) and sequence_lengths(0, 4, None) == ()
    assert sequence_lengths(1, 0, [0, 0, 0]) == (0, 0) and sequence_lengths(1, 0, [0]) == ()


def call(**change: object) -> Rows:
    q = torch.zeros(2, 6, 2, 4)
    given_ = {"q": q, "k": q, "e": q, "z": torch.zeros(2, 6, 4, 3), "g": q, "diag": None, "cu_seqlens": None, "rank": 1}
    return packed(**{**given_, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 2, 4)}, r"q must have axes \[b t h k\], got shape \[6, 2, 4\]"),
        ({"k": torch.zeros(2, 6, 2, 5)}, "axis 'k' is 5 in k but 4 in q"),
        ({"z": torch.zeros(2, 6, 3, 3)}, "value heads must be a multiple of key heads, got 3 and 2"),
        ({"q": torch.zeros(2, 6, 0, 4), "k": torch.zeros(2, 6, 0, 4)}, "got 4 and 0"),
        ({"e": torch.zeros(2, 6, 2, 3)}, "e must be per key head or per value head"),
        ({"e": torch.zeros(2, 6, 2)}, "e must be per key head or per value head"),
        ({"g": torch.zeros(2, 6, 3)}, "g must be per key head or per value head"),
        ({"g": torch.zeros(2, 6, 2, 3)}, "g must be per key head or per value head"),
        ({"g": torch.zeros(2, 6, 2, 4, dtype=torch.float16)}, "g must be float32 .* got torch.float16"),
        ({"diag": torch.zeros(2, 6, 2)}, r"diag must have axes \[b t hv\] = \[2, 6, 4\]"),
        ({"rank": 4, "e": None}, r"rank 4 must divide the rows of every sequence, got lengths \(6, 6\)"),
        ({"rank": 2}, "erase with several rows a token is not defined"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_gates_of_either_head_count_are_taken() -> None:
    for gate in (torch.zeros(2, 6, 2, 4), torch.zeros(2, 6, 4, 4)):
        assert call(g=gate).per_channel and call(e=gate).e is not None
    for gate in (torch.zeros(2, 6, 2), torch.zeros(2, 6, 4), torch.zeros(2, 6, 4, dtype=torch.float64), None):
        assert not call(g=gate).per_channel
    assert call(rank=3, e=None, diag=torch.zeros(2, 6, 4)).lengths == (6, 6)


def test_repeating_gives_each_value_head_the_key_head_it_shares() -> None:
    q = torch.arange(2.0)[None, None, :, None].expand(1, 3, 2, 4)  # head h holds h
    per_value = torch.arange(4.0)[None, None, :].expand(1, 3, 4)
    rows = packed(q, q, None, torch.zeros(1, 3, 4, 5), per_value, None, None, 1).repeated(torch.float64)
    assert rows.q[0, :, 0].tolist() == [0, 0, 1, 1] and rows.g is not None
    assert rows.g[0].tolist() == [0, 1, 2, 3] and rows.e is None and rows.diag is None
    assert {x.dtype for x in (rows.q, rows.k, rows.z, rows.g)} == {torch.float64}


def test_the_device_and_the_wish_decide() -> None:
    assert default("cuda", (8, 0)) == default("cuda", (12, 1)) == "triton"
    assert default("cuda", (7, 5)) == default("cuda", None) == default("cuda", (9, 0), torch.float64) == "torch"
    assert default("cpu", None) == default("mps", None) == "torch"  # gradients are on here
    with torch.no_grad():
        assert choose(CPU) == ("numba" if numba.available() else "torch")
        assert choose(CPU, "reference") == "reference" and choose(CPU, "torch") == "torch"
        assert choose(GPU, "triton") == "triton"


def test_wishes_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of reference, torch, triton, numba, got 'cuda'"):
        choose(CPU, "cuda")  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="numba needs a CPU and numba installed; device is cuda"):
        choose(GPU, "numba")
    if numba.available():
        with pytest.raises(ValueError, match="numba has no gradients"):
            choose(CPU, "numba")
    for value in ("", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        with pytest.raises(ValueError, match="triton needs a GPU, or TRITON_INTERPRET=1; device is cpu"):
            choose(CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU, "triton") == "triton"


@pytest.mark.parametrize("weak", [-BF16_STUCK * (1 - 1e-6), -1e-30, -1e-3])
def test_a_bf16_state_refuses_decays_it_would_round_away(weak: float) -> None:
    g = torch.tensor([[-1.0, weak, 0.0]])
    with pytest.raises(UserError, match="a bf16 state never decays at log-decay -"):
        check_state_dtype(torch.bfloat16, g)
    check_state_dtype(torch.float32, g)


def test_a_bf16_state_takes_what_it_can_follow() -> None:
    for g in (None, torch.zeros(3), torch.tensor([-BF16_STUCK, -1.0, float("-inf")]), torch.zeros(0)):
        check_state_dtype(torch.bfloat16, g)
    # The bound is where the state is first moved: one step of bf16 below 1 is 2^-8.
    one = torch.ones((), dtype=torch.bfloat16)
    assert one * float(torch.tensor(-(2.0**-7)).exp()) != one and one * float(torch.tensor(-(2.0**-10)).exp()) == one


def some_rows(lengths: list[int], erase: bool, decay: bool, rank: int = 1) -> Rows:
    made = torch.Generator().manual_seed(sum(lengths) + 7)
    total = rank * sum(lengths)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    k = torch.nn.functional.normalize(draw(total, 2, 4), dim=-1)
    g = -draw(total, 2, 4).abs()
    if rank > 1:
        g.view(-1, rank, 2, 4)[:, 1:] = 0
    return Rows(
        draw(total, 2, 4), k, 0.5 * k if erase else None, draw(total, 2, 3), g if decay else None, None,
        tuple(rank * n for n in lengths), rank,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, erase=st.booleans(), decay=st.booleans(), data=st.data())
def test_tokens_in_a_pool_are_the_loop(lengths: list[int], erase: bool, decay: bool, data: st.DataObject) -> None:
    rows = some_rows(lengths, erase, decay, 1 if erase else data.draw(st.integers(1, 3)))
    pool = len(lengths) + 2
    free = data.draw(st.permutations(range(pool)))
    idle = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    slots = torch.tensor([-1 if n in idle else free[n] for n in range(len(lengths))])
    before = torch.randn(pool, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want, got = before.clone(), before.clone()
    assert torch.allclose(
        tokens.delta_tokens(rows, got, slots), reference.delta_tokens(rows, want, slots), rtol=0, atol=1e-12
    )
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    for slot in set(range(pool)) - {int(s) for s, n in zip(slots, lengths, strict=True) if s >= 0 and n}:
        assert torch.equal(got[slot], before[slot])  # nobody's, an idle row's, or that of an empty sequence


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, erase=st.booleans())
def test_the_pool_ends_as_the_rule_does(lengths: list[int], erase: bool) -> None:
    rows = some_rows(lengths, erase, True)
    state = torch.randn(len(lengths), 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want, last = rule("torch")(rows, state, torch.float64)
    moved = state.clone()
    got = tokens.delta_tokens(rows, moved, None)
    assert torch.allclose(got, want, atol=1e-12) and torch.allclose(moved, last, atol=1e-12)


def test_a_pool_in_half_precision_is_rounded_after_each_call() -> None:
    rows = some_rows([2, 0, 3], erase=True, decay=True)
    before = torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    want, got = before.double(), before.clone()
    tokens.delta_tokens(rows, want, None)
    tokens.delta_tokens(rows, got, None)
    assert torch.equal(got, want.to(torch.bfloat16)) and torch.equal(got[1], before[1])


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_rows_of_a_token_are_never_split(name: str) -> None:
    rows = some_rows([2, 1], erase=False, decay=True, rank=2)
    state = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    run = step(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank 2 must divide the rows of every sequence, got lengths \(3, 3\)"):
        run(rows, torch.tensor([0, 3, 6]), state, None)
    assert run(rows, torch.tensor([0, 4, 6]), state, None).shape == (6, 2, 3)


def test_pools_of_the_wrong_shape_are_refused() -> None:
    q = torch.zeros(3, 2, 4)
    z, pool = torch.zeros(3, 2, 5), torch.zeros(3, 2, 4, 5)
    for state in (torch.zeros(2, 2, 4, 5), torch.zeros(3, 2, 5, 4), torch.zeros(2, 4, 5), torch.zeros(4, 2, 4, 5)):
        with pytest.raises(ValueError, match=r"state must be \[3, Hv, K, V\] with \[2, 4, 5\] last"):
            delta_step(q, q, None, z, None, state)
    with pytest.raises(ValueError, match=r"state must be \[P, Hv, K, V\]"):
        delta_step(q, q, None, z, None, torch.zeros(9, 2, 5, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"slots must have one entry for each of 3 sequences, got shape \[2\]"):
        delta_step(q, q, None, z, None, pool, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 3"):
        delta_tokens(q, q, None, z, None, torch.zeros(2, 2, 4, 5), torch.tensor([0, 1, 2]), implementation="torch")


def test_nothing_to_do_changes_nothing() -> None:
    none = torch.zeros(0, 2, 4)
    pool = torch.ones(2, 2, 4, 5)
    out = delta_step(none, none, None, torch.zeros(0, 2, 5), None, pool, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 2, 5) and torch.equal(pool, torch.ones(2, 2, 4, 5))
    q, z = torch.ones(2, 2, 4), torch.ones(2, 2, 5)
    for name in ("reference", "torch"):
        out = delta_step(q, q, None, z, None, pool, torch.tensor([-1, -1]), implementation=name)  # type: ignore[arg-type]
        assert not out.any() and torch.equal(pool, torch.ones(2, 2, 4, 5))
