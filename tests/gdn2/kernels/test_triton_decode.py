"""The decoding kernel against the fp64 oracle: interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gdn2.errors import UserError
from gdn2.kernels import delta_step, delta_tokens
from tests.gdn2.kernels.memory import guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = dict[str, Tensor | None]


def draw(
    rows: int, heads: int = 2, value_heads: int = 2, key: int = 16, value: int = 16, *,
    decay: str = "channel", erase: bool = True, diag: bool = False, rank: int = 1, wide: bool = False, seed: int = 0,
) -> Call:  # fmt: skip
    """fp64 inputs of `rows` rows; `wide` gives e and g per value head."""
    rng = torch.Generator().manual_seed(seed)

    def u(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    own = value_heads if wide else heads
    k = torch.nn.functional.normalize(u(rows, heads, key) - 0.5, dim=-1)
    g = {"channel": -2 * u(rows, own, key), "head": -2 * u(rows, own), "none": None}[decay]
    if g is not None:
        g[torch.arange(rows) % rank != 0] = 0.0
    e = 2 * u(rows, own, key) * k.repeat_interleave(own // heads, 1) if erase else None
    return {
        "q": u(rows, heads, key) - 0.5, "k": k, "e": e, "z": u(rows, value_heads, value) - 0.5, "g": g,
        "diag": u(rows, value_heads) if diag else None,
    }  # fmt: skip


def pool(slots: int, value_heads: int = 2, key: int = 16, value: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(9)
    return torch.randn(slots, value_heads, key, value, generator=rng, dtype=torch.float64)


def cast(call: Call, dtype: torch.dtype) -> Call:
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: None if x is None else x.to(precise if n in ("g", "diag") else dtype) for n, x in call.items()}


def run(
    name, call: Call, state: Tensor, lengths: Sequence[int] | None, slots: Sequence[int] | None,
    dtype: torch.dtype = torch.float32, rank: int = 1, state_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and the pool afterwards of one implementation; inputs are left alone."""
    device = DEVICE if name == "triton" else "cpu"
    x = {n: None if t is None else guarded(t.to(device)) for n, t in cast(call, dtype).items()}
    after = guarded(state.to(device, torch.float64 if dtype == torch.float64 else state_dtype))
    at = None if slots is None else torch.tensor(slots, device=device)
    diag = x.pop("diag")
    assert x["q"] is not None and x["k"] is not None and x["z"] is not None
    args = (x["q"], x["k"], x["e"], x["z"], x["g"], after)
    if lengths is None:
        o = delta_step(*args, at, diag=diag, rank=rank, implementation=name)
    else:
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
        o = delta_tokens(*args, bounds, at, diag=diag, rank=rank, implementation=name)
    return o.cpu(), after.cpu()


def error(got: Tensor, want: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


VARIANTS = {
    "gdn2": {}, "gdn": {"decay": "head"}, "delta": {"decay": "none"}, "mamba2": {"decay": "head", "erase": False},
    "linear": {"decay": "none", "erase": False}, "kept": {"erase": False},
    "grouped": {"value_heads": 4}, "wide": {"value_heads": 4, "wide": True},
    "wide_head": {"value_heads": 4, "wide": True, "decay": "head"},
    "mamba3": {"decay": "head", "erase": False, "diag": True},
    "mimo": {"decay": "head", "erase": False, "rank": 4},
    "mimo_diag": {"decay": "head", "erase": False, "rank": 4, "diag": True, "value_heads": 4},
    "diag_erase": {"diag": True},
    "odd": {"key": 60, "value": 100}, "odd_small": {"key": 20, "value": 12}, "wide_value": {"key": 32, "value": 200},
}  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_the_oracle(name, variant: str) -> None:
    options = dict(VARIANTS[variant])
    rank = options.get("rank", 1)
    call = draw(3 * rank, **options)
    shape = (options.get("value_heads", 2), options.get("key", 16), options.get("value", 16))
    state = pool(5, *shape)
    slots = [4, -1, 1]
    want_o, want_state = run("reference", call, state, None, slots, torch.float64, rank)
    o, after = run(name, call, state, None, slots, rank=rank)
    assert error(o, want_o) < 1e-6 and error(after, want_state) < 1e-6
    assert torch.equal(o[rank : 2 * rank], torch.zeros_like(o[:rank]))
    for idle in (0, 2, 3):
        assert torch.equal(after[idle], state[idle].float())


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("variant", ["gdn2", "gdn", "mamba3", "mimo_diag", "wide"])
def test_several_tokens_equal_the_oracle(name, variant: str) -> None:
    options = dict(VARIANTS[variant])
    rank = options.get("rank", 1)
    lengths = [3 * rank, 0, 7 * rank, rank, 2 * rank]
    call = draw(sum(lengths), **options)
    state = pool(6, options.get("value_heads", 2))
    slots = [5, 0, 2, -1, 1]
    want_o, want_state = run("reference", call, state, lengths, slots, torch.float64, rank)
    o, after = run(name, call, state, lengths, slots, rank=rank)
    assert error(o, want_o) < 1e-6 and error(after, want_state) < 1e-6
    assert torch.equal(after[[0, 3, 4]], state[[0, 3, 4]].float())


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_row_is_the_same_in_every_batch(name) -> None:
    lengths = [3, 1, 0, 5, 2, 1, 4]
    call = draw(sum(lengths), key=20, value=24)
    state = pool(len(lengths), key=20, value=24)
    together, after = run(name, call, state, lengths, None)
    start = 0
    for n, length in enumerate(lengths):
        part = {key: None if x is None else x[start : start + length] for key, x in call.items()}
        alone, last = run(name, part, state[n : n + 1], [length], None)
        assert torch.equal(alone, together[start : start + length])
        assert torch.equal(last[0], after[n])
        start += length


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_tokens_equal_steps_bit_for_bit(name) -> None:
    call = draw(12, value_heads=4)
    state = pool(3, 4)
    o, after = run(name, call, state, [4, 4, 4], None)
    stepped, outputs = state, []
    for t in range(4):
        row = {key: None if x is None else x[t::4] for key, x in call.items()}
        out, stepped = run(name, row, stepped, None, None)
        outputs.append(out)
    assert torch.equal(torch.stack(outputs, 1).flatten(0, 1), o)
    assert torch.equal(stepped, after)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_extreme_decay_stays_exact(name) -> None:
    call = draw(6, key=20)
    assert call["g"] is not None
    pattern = torch.tensor([0.0, -1e-8, -26.0, -1e4, float("-inf")], dtype=torch.float64)
    call["g"] = pattern[torch.arange(20) % 5].expand(6, 2, 20).contiguous()
    state = pool(2, key=20)
    want_o, want_state = run("reference", call, state, [4, 2], None, torch.float64)
    o, after = run(name, call, state, [4, 2], None)
    assert error(o, want_o) < 1e-6 and error(after, want_state) < 1e-6


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_half_precision_inputs_keep_an_fp32_state(name) -> None:
    call = cast(draw(8), torch.float16)
    exact = {n: None if x is None else x.double() for n, x in call.items()}
    want_o, want_state = run("reference", exact, pool(2), [4, 4], None, torch.float64)
    o, after = run(name, call, pool(2), [4, 4], None, torch.float16)
    assert o.dtype == torch.float16 and error(o, want_o) < 5e-4
    assert after.dtype == torch.float32 and error(after, want_state) < 1e-6


def test_bf16_state_is_kept_rounded_and_refused_where_it_would_never_decay() -> None:
    call = draw(4)
    assert call["g"] is not None
    want, _ = run("reference", call, pool(4).bfloat16().double(), None, None, torch.float64)
    o, after = run("torch", call, pool(4), None, None, state_dtype=torch.bfloat16)
    assert after.dtype == torch.bfloat16 and error(o, want) < 1e-2
    call["g"][2, 1, 3] = -1e-3
    with pytest.raises(UserError, match="never decays at log-decay -0.001"):
        run("torch", call, pool(4), None, None, state_dtype=torch.bfloat16)


def test_wrong_pools_and_slots_are_refused() -> None:
    call = draw(3)
    with pytest.raises(ValueError, match=r"state must be \[3, Hv, K, V\]"):
        run("torch", call, pool(4), None, None)
    with pytest.raises(ValueError, match="slots must have one entry for each of 3"):
        run("torch", call, pool(4), None, [0, 1])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_later_token_never_changes_an_earlier_output(name) -> None:
    call = draw(6, value_heads=4, decay="head")
    before, _ = run(name, call, pool(1, 4), [6], None)
    for key, x in call.items():
        if x is not None:
            call[key] = torch.cat([x[:4], x[4:] * -3.0 if key != "g" else x[4:] - 7.0])
    after, _ = run(name, call, pool(1, 4), [6], None)
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("poison", ["q", "k", "e", "z", "g"])
def test_nan_stays_in_its_own_sequence(name, poison: str) -> None:
    call = draw(6)
    clean, clean_state = run(name, call, pool(3), [2, 2, 2], None)
    spoilt = call[poison]
    assert spoilt is not None
    spoilt[2] = float("nan")
    o, after = run(name, call, pool(3), [2, 2, 2], None)
    assert o[2].isnan().any()
    for rows, n in ((slice(0, 2), 0), (slice(4, 6), 2)):
        assert torch.equal(o[rows], clean[rows]) and torch.equal(after[n], clean_state[n])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_slots_only_name_the_state(name) -> None:
    call, state = draw(4), pool(4)
    plain_o, plain = run(name, call, state, None, None)
    order = [2, 0, 3, 1]
    place = torch.tensor(order)
    moved = torch.empty_like(state)
    moved[place] = state
    o, after = run(name, call, moved, None, order)
    assert torch.equal(o, plain_o) and torch.equal(after[place], plain)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_nothing_to_do_changes_nothing(name) -> None:
    state = pool(2)
    for lengths, slots in (([0, 0], None), ([0, 0], [1, 0]), ([], [])):
        o, after = run(name, draw(0), state, lengths, slots)
        assert o.shape == (0, 2, 16) and torch.equal(after, state.float())
    o, after = run(name, draw(2), state, None, [-1, -1])
    assert not o.any() and torch.equal(after, state.float())


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("key", [16, 60, 256])
def test_zero_and_duplicate_keys_with_the_strongest_erase(name, key: int) -> None:
    call = draw(5, key=key)
    assert call["k"] is not None
    call["k"][1:4] = call["k"][0]
    call["k"][4] = 0.0
    call["e"], call["g"] = 2.0 * call["k"], torch.zeros(5, 2, key, dtype=torch.float64)
    state = pool(1, key=key)
    want_o, want_state = run("reference", call, state, [5], None, torch.float64)
    o, after = run(name, call, state, [5], None)
    assert error(o, want_o) < 2e-6 and error(after, want_state) < 2e-6


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (128, 128), (256, 256), (60, 100), (192, 240), (4, 8)])
def test_tiles_cover_the_widths(shape: tuple[int, int], rank: int) -> None:
    from gdn2.kernels.triton.decode import tiles

    chosen = tiles(*shape, rank)
    assert chosen["BK"] >= shape[0] and chosen["BV"] >= 8
    assert chosen["BK"] * chosen["BV"] <= 8192, "a program's tile must stay in registers"


def test_the_kernel_refuses_fp64_rows() -> None:
    with pytest.raises(ValueError, match="float64"):
        run("triton", draw(2), pool(2), None, None, torch.float64)


@pytest.mark.parametrize(("changes", "message"), [
    ({"dtype": torch.float64}, "float32 or bfloat16"), ({"key": 300}, "up to 256"), ({"step": 2}, "contiguous"),
])  # fmt: skip
def test_the_kernel_refuses_pools_it_cannot_serve(changes: dict, message: str) -> None:
    from gdn2.kernels.triton.decode import delta_tokens as kernel

    key = changes.get("key", 16)
    call = cast(draw(2, key=key), torch.float32)
    state = pool(2 * changes.get("step", 1), key=key).to(changes.get("dtype", torch.float32))[:: changes.get("step", 1)]
    assert call["q"] is not None and call["k"] is not None and call["z"] is not None
    with pytest.raises(ValueError, match=message):
        kernel(call["q"], call["k"], call["e"], call["z"], call["g"], state, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_shape_in_bf16_and_graph_replay() -> None:
    call = draw(64, 16, 16, 128, 128)
    x = {n: None if t is None else t.to(DEVICE) for n, t in cast(call, torch.bfloat16).items()}
    x.pop("diag")
    exact = {n: None if t is None else t.double().cpu() for n, t in x.items()} | {"diag": None}
    want_o, want_state = run("reference", exact, pool(64, 16, 128, 128), None, None, torch.float64)
    state = pool(64, 16, 128, 128).float().to(DEVICE)
    start = state.clone()
    slots = torch.arange(64, device=DEVICE)
    args = (x["q"], x["k"], x["e"], x["z"], x["g"], state, slots)
    first = delta_step(*args, implementation="triton")
    assert error(first.cpu(), want_o) < 5e-3 and error(state.cpu(), want_state) < 1e-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = delta_step(*args, implementation="triton")
    for _ in range(50):
        state.copy_(start)
        graph.replay()
        assert torch.equal(o, first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_slots_beyond_two_to_the_31_elements() -> None:
    last = 2**31 // (16 * 128 * 128) + 7
    call = draw(2, 16, 16, 128, 128)
    state = torch.zeros(last + 1, 16, 128, 128, device=DEVICE)
    state[[3, last]] = pool(2, 16, 128, 128).float().to(DEVICE)
    want_o, want_state = run("reference", call, pool(2, 16, 128, 128), None, None, torch.float64)
    x = {n: None if t is None else t.to(DEVICE) for n, t in cast(call, torch.float32).items()}
    o = delta_step(
        x["q"],
        x["k"],
        x["e"],
        x["z"],
        x["g"],
        state,
        torch.tensor([3, last], device=DEVICE),
        implementation="triton",
    )
    assert error(o.cpu(), want_o) < 1e-6 and error(state[[3, last]].cpu(), want_state) < 1e-6
    assert int(state.flatten(1).any(1).sum()) == 2
