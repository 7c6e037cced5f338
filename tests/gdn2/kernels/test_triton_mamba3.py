"""What surrounds the operator in Mamba-3: kernels and gradients against the torch twins in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2.kernels.mamba3 import Mixing, Shared, Turning, as_units, ranked, read, turn, write
from gdn2.mixers import build
from gdn2.ragged import Ragged
from tests.gdn2.kernels.around import DEVICE, error, u
from tests.gdn2.kernels.memory import guarded

SISO = Turning(heads=4, groups=1, rank=1, width=12, pairs=3, in_halves=False, eps=1e-5)
TURNINGS = {
    "siso": SISO,
    "siso all of it": replace(SISO, pairs=6),
    "siso halves": replace(SISO, in_halves=True),
    "mimo": Turning(heads=2, groups=1, rank=4, width=32, pairs=8, in_halves=True, eps=1e-5),
    "mimo all of it": Turning(heads=2, groups=2, rank=2, width=16, pairs=8, in_halves=True, eps=1e-5),
    "groups": replace(SISO, groups=2, rank=2, width=36, pairs=9),
}
RUNS = (
    ("exact", torch.float64, "cpu", "torch"), ("torch", torch.float32, "cpu", "torch"),
    ("kernel", torch.float32, DEVICE, "triton"),
)  # fmt: skip
LENGTHS = {"siso": ([70], [0], None), "mimo": ([1, 0, 130, 2], None)}  # None is one token for each sequence
PAIRS = [(case, lengths) for case in TURNINGS for lengths in LENGTHS.get(case, ([2, 68],))]


def leaves(tensors: Mapping[str, Tensor | None], dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    return {
        name: None if x is None else guarded(x.to(device, dtype)).requires_grad_() for name, x in tensors.items()
    }  # fmt: skip


def turn_inputs(how: Turning, t: int) -> dict[str, Tensor]:
    """Numbers that fp32 holds, so that phases can be compared to the unit."""
    shared = how.rank * how.groups * how.width
    vectors = (how.heads, how.rank, how.width)
    inputs = {
        "b": u(t, shared), "c": u(t, shared, seed=1), "b_norm": 1 + u(how.width, seed=2),
        "c_norm": 1 + u(how.width, seed=3), "b_bias": u(*vectors, seed=4), "c_bias": u(*vectors, seed=5),
        "dt": 1.5 + u(t, how.heads, seed=6), "angle": 3 * u(t, how.pairs, seed=7),
    }  # fmt: skip
    return {name: x.float().double() for name, x in inputs.items()}


def turned(
    inputs: dict[str, Any], theta: Tensor, lengths: list[int] | None, how: Turning, implementation: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs
    b, c = Shared(x["b"], x["b_norm"], x["b_bias"]), Shared(x["c"], x["c_norm"], x["c_bias"])
    ragged = None if lengths is None else Ragged(lengths, x["b"].device)
    return turn(b, c, x["dt"], x["angle"], theta.to(x["b"].device), ragged, how, implementation)


def compare(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None], same: dict[str, Tensor | None]) -> None:
    """Gradients of the kernel are as good as those of torch in the same precision."""
    for name, x in mine.items():
        want, torchs = theirs[name], same[name]
        assert (x is None) == (want is None)
        if x is not None and want is not None and torchs is not None:
            assert x.grad is not None and want.grad is not None and torchs.grad is not None, name
            assert error(x.grad, want.grad) < 2 * error(torchs.grad, want.grad) + 3e-6, name


@pytest.mark.parametrize(("case", "lengths"), PAIRS, ids=str)
def test_keys_and_queries_and_gradients_equal_torch(case: str, lengths: list[int] | None) -> None:
    how = TURNINGS[case]
    t, n = (5, 5) if lengths is None else (sum(lengths), len(lengths))
    inputs = turn_inputs(how, t)
    theta = as_units(20 * u(n, how.heads, how.pairs, seed=8))
    upstream = [u(t, how.rank, how.heads, how.width, seed=seed) for seed in (10, 11)]
    found = {}
    for name, dtype, device, implementation in RUNS:
        given = leaves(inputs, dtype, device)
        k, q, after = turned(given, theta, lengths, how, implementation)
        torch.autograd.backward([k, q], [guarded(d.to(device, dtype)) for d in upstream])
        found[name] = k, q, after, given
    (k, q, after, given), (want_k, want_q, want_after, exact) = found["kernel"], found["exact"]
    assert after.dtype == torch.int32 and (after.cpu() - want_after).abs().max() <= t // 2 + 1
    if t:
        assert error(k, want_k) < 1e-6 and error(q, want_q) < 1e-6
    compare(given, exact, found["torch"][3])


@torch.no_grad()
def test_phases_are_the_integers_of_torch_in_any_pieces() -> None:
    """Also far into a sequence, where a sum in fp32 would have lost them: the pieces start anywhere on the circle."""
    how = TURNINGS["siso all of it"]
    inputs = {name: x.float() for name, x in turn_inputs(how, 210).items()}
    on_device = {name: x.to(DEVICE) for name, x in inputs.items()}
    theta = torch.tensor([2**31 - 5, -(2**31)], dtype=torch.int32).repeat(1, how.heads, how.pairs // 2)
    k, q, want = turned(inputs, theta, [210], how, "torch")
    mine_k, mine_q, after = turned(on_device, theta, [210], how, "triton")
    assert torch.equal(after.cpu(), want)
    assert error(mine_k, k.double()) < 1e-6 and error(mine_q, q.double()) < 1e-6
    for begin in range(0, 210, 70):
        piece = {n: x[begin : begin + 70] if len(x) == 210 else x for n, x in on_device.items()}
        k, q, theta = turned(piece, theta, [70], how, "triton")
        assert torch.equal(k, mine_k[begin : begin + 70]) and torch.equal(q, mine_q[begin : begin + 70])
    assert torch.equal(theta, after)


@torch.no_grad()
def test_turns_of_known_angles() -> None:
    """A unit vector in the first channel ends at the cosine in the first and the sine in the second of its pair."""
    for in_halves, second in ((False, 1), (True, 2)):
        how = Turning(heads=1, groups=1, rank=1, width=4, pairs=2, in_halves=in_halves, eps=1e-12)
        x = torch.tensor([[2.0, 0.0, 0.0, 0.0]], device=DEVICE)  # of root mean square 1
        shared = Shared(x, torch.ones(4, device=DEVICE), torch.zeros(1, 1, 4, device=DEVICE))
        for eighth in (-4, -3, 0, 1, 2):
            theta = torch.full((1, 1, 2), eighth * 2**29, dtype=torch.int32, device=DEVICE)
            zero = torch.zeros(1, 2, device=DEVICE)
            k, _, after = turn(shared, shared, zero[:, :1], zero, theta, None, how, "triton")
            want = torch.zeros(4)
            want[0], want[second] = 2 * math.cos(math.pi * eighth / 4), 2 * math.sin(math.pi * eighth / 4)
            assert torch.allclose(k.flatten().cpu(), want, atol=3e-7)
            assert torch.equal(after, theta)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(("t", "p"), [(37, 20), (0, 16), (3, 64)])
def test_writes_and_gradients_equal_torch(rank: int | None, t: int, p: int) -> None:
    inputs = {"v": u(t, 2, p), "weight": u(t, 2, seed=1), "x": None if rank is None else u(2, rank, p, seed=2)}
    upstream = u(t, rank or 1, 2, p, seed=3)
    found = {}
    for name, dtype, device, implementation in RUNS:
        given = leaves(inputs, dtype, device)
        y = write(**given, implementation=implementation)  # type: ignore[arg-type]
        y.backward(guarded(upstream.to(device, dtype)))
        found[name] = y, given
    if t:
        assert error(found["kernel"][0], found["exact"][0]) < 1e-6
    compare(found["kernel"][1], found["exact"][1], found["torch"][1])


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("t", "p"), [(37, 20), (0, 16), (3, 64)])
def test_output_and_gradients_equal_torch(rank: int | None, norm: bool, t: int, p: int) -> None:
    rows = rank or 1
    inputs = {
        "o": u(t, rows, 2, p), "v": u(t, 2, p, seed=1), "z": 6 * u(t, 2, p, seed=2), "skip": u(2, seed=3),
        **{name: None if rank is None else 1 + u(2, rank, p, seed=i) for i, name in enumerate(("x", "gate", "out"))},
        "norm": 1 + u(2, p, seed=7) if norm else None,
    }  # fmt: skip
    upstream = u(t, 2, p, seed=8)
    found = {}
    for name, dtype, device, implementation in RUNS:
        given = leaves(inputs, dtype, device)
        o, v, z, skip, x, gate, out, weight = given.values()
        y = read(o, v, z, Mixing(skip, x, gate, out, weight), 1e-5, implementation)  # type: ignore[arg-type]
        y.backward(guarded(upstream.to(device, dtype)))
        found[name] = y, given
    if t:
        assert error(found["kernel"][0], found["exact"][0]) < 1e-6
    compare(found["kernel"][1], found["exact"][1], found["torch"][1])


@torch.no_grad()
def test_inputs_may_be_slices_of_one_projection() -> None:
    how, t = TURNINGS["mimo"], 9
    width = how.rank * how.groups * how.width
    wide = u(t, 3 * width + 7, seed=9).float().to(DEVICE)
    inputs = {name: x.float().to(DEVICE) for name, x in turn_inputs(how, t).items()}
    sliced = {**inputs, "b": wide[:, 3 : 3 + width], "c": wide[:, -width:], "angle": wide[:, 1 : 1 + how.pairs]}
    theta = torch.zeros(1, how.heads, how.pairs, dtype=torch.int32)
    whole = {name: x.contiguous() for name, x in sliced.items()}
    for mine, theirs in zip(turned(sliced, theta, [t], how, "triton"), turned(whole, theta, [t], how, "triton"),
                            strict=True):  # fmt: skip
        assert error(mine, theirs.double().cpu()) < 1e-6
    v, z = wide[:, :20].unflatten(1, (2, 10)), wide[:, 21:41].unflatten(1, (2, 10))
    o = u(t, 4, 2, 10).float().to(DEVICE)[:, 2:]
    ones = torch.ones(2, 2, 10, device=DEVICE)
    mixing = Mixing(ones[0, :, 0], ones, ones, ones, None)
    got = read(o, v, z, mixing, 1e-5, "triton")
    assert torch.equal(got, read(o.contiguous(), v.contiguous(), z.contiguous(), mixing, 1e-5, "triton"))
    assert error(got, read(o, v, z, mixing, 1e-5, "torch").double().cpu()) < 1e-6
    weight = u(t, 2).float().to(DEVICE)
    assert error(write(v, weight, mixing.x, "triton"), (weight[:, None, :, None] * ranked(v, mixing.x)).cpu()) < 1e-6


@torch.no_grad()
def test_a_token_is_the_same_in_every_batch() -> None:
    how = TURNINGS["siso"]
    inputs = {name: x.float().to(DEVICE) for name, x in turn_inputs(how, 200).items()}
    theta = torch.zeros(2, how.heads, how.pairs, dtype=torch.int32)
    together = turned(inputs, theta, [77, 123], how, "triton")
    second = {n: x[77:] if len(x) == 200 else x for n, x in inputs.items()}
    alone = turned(second, theta[:1], [123], how, "triton")
    assert torch.equal(together[0][77:], alone[0]) and torch.equal(together[2][1:], alone[2])


def test_fp64_is_refused() -> None:
    x = u(2, 1, 4).to(DEVICE)
    inputs = turn_inputs(SISO, 2)
    with pytest.raises(ValueError, match="float64"):
        turned({n: y.to(DEVICE) for n, y in inputs.items()},
               torch.zeros(1, 4, 3, dtype=torch.int32), [2], SISO, "triton")  # fmt: skip
    with pytest.raises(ValueError, match="float64"):
        write(x, x[:, :, 0], None, "triton")
    with pytest.raises(ValueError, match="float64"):
        read(x[:, None], x, x, Mixing(x[0, :, 0], None, None, None, None), 1e-5, "triton")


LAYERS: dict[str, dict[str, Any]] = {
    "siso": {"rank": None},
    "siso halves, all of it": {"rank": None, "pairing": "halves", "rope_fraction": 1.0},
    "mimo": {"rank": 2, "n_groups": 2, "out_norm": True},
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer_on_kernels_equals_torch(case: str) -> None:
    """Training, prefill from a state, and decoding."""
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ragged = Ragged([9, 0, 11], DEVICE)
    more = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    found = {}
    for implementation in ("torch", "triton"):
        torch.manual_seed(1)
        mixer = build("mamba3", 32, {"n_heads": 2, "d_head": 16, "d_state": 16, **LAYERS[case]})
        mixer.reset_parameters()
        mixer.to(DEVICE).implementation = implementation
        y, state = mixer(x, ragged)
        again, state = mixer(x, ragged, {name: tensor.detach() for name, tensor in state.items()})
        (y.square().sum() + again.square().sum()).backward()
        grads = {n: p.grad for n, p in mixer.named_parameters()}
        with torch.no_grad():
            state = {n: tensor.detach().clone() for n, tensor in state.items()}
            prefilled, state = mixer(x, ragged, state)
            stepped = mixer.step(more, state)
        phase = 2 * math.pi * state.pop("theta").double() / 2**32
        state |= {"cos": phase.cos(), "sin": phase.sin()}
        found[implementation] = {
            "y": y.detach(), "again": again.detach(), "prefill": prefilled, "step": stepped, **state, **grads
        }  # fmt: skip
    for key, want in found["torch"].items():
        got = found["triton"][key]
        assert want is not None and got is not None, key
        assert float((got - want).norm()) <= 3e-5 * float(want.norm()) + 1e-7, key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [None, 4])
def test_a_models_shape_in_bf16(rank: int | None) -> None:
    """The layer at the published widths: no further from fp64 than torch in bf16 is."""
    torch.manual_seed(0)
    mixer = build("mamba3", 512, {"n_heads": 16, "d_head": 64, "d_state": 128, "rank": rank})
    mixer.reset_parameters()
    x = torch.randn(2048, 512)
    found = {}
    for name, dtype, implementation in (
        ("exact", torch.float64, "torch"), ("torch", torch.bfloat16, "torch"), ("kernel", torch.bfloat16, "triton"),
    ):  # fmt: skip
        here = build("mamba3", 512, {"n_heads": 16, "d_head": 64, "d_state": 128, "rank": rank})
        here.load_state_dict(mixer.state_dict())
        here = here.to(DEVICE, torch.float64 if name == "exact" else torch.float32)
        here.implementation = implementation  # type: ignore[assignment]
        with torch.autocast(DEVICE, dtype, enabled=name != "exact"):
            y, _ = here(
                x.to(DEVICE, torch.float64 if name == "exact" else torch.float32), Ragged([1024, 0, 1024], DEVICE)
            )
        y.double().square().sum().backward()
        found[name] = {"y": y.detach().cpu(), **{n: p.grad.cpu() for n, p in here.named_parameters()}}  # type: ignore[union-attr]
    for key, want in found["exact"].items():
        assert error(found["kernel"][key], want.double()) <= 1.5 * error(found["torch"][key], want.double()) + 1e-5, key
