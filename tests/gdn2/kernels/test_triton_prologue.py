"""The start of a layer: short convolution and folded gates, kernels and gradients against the torch twins in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdn2.kernels.layer import Folded, Gates, Raw, fold_gates
from gdn2.kernels.triton import prologue
from gdn2.mixers.conv import ShortConv, short_conv
from gdn2.ragged import Ragged
from tests.gdn2.kernels.around import DEVICE, error, u
from tests.gdn2.kernels.memory import guarded

LENGTHS = ([40], [1, 0, 3, 2, 70], [0], [33, 31, 1, 1])


def leaves(*tensors: Tensor | None, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    return [None if x is None else guarded(x.detach().to(device, dtype)).requires_grad_() for x in tensors]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("bias", "activate", "taps"), [(False, True, 4), (True, True, 4), (True, False, 3)])
def test_convolution_and_gradients_equal_torch(lengths: list[int], bias: bool, activate: bool, taps: int) -> None:
    t, n, c = sum(lengths), len(lengths), 130
    x, weight, b = u(t, c), u(c, taps, seed=1), u(c, seed=2) if bias else None
    window, upstream = u(n, c, taps - 1, seed=3), u(t, c, seed=4)
    want_leaves = leaves(x, weight, b, dtype=torch.float64, device="cpu")
    want, want_window = short_conv(*want_leaves, window, Ragged(lengths), activate)  # type: ignore[arg-type]
    want.backward(upstream)
    got_leaves = leaves(x, weight, b, dtype=torch.float32, device=DEVICE)
    got, got_window = prologue.short_conv(
        *got_leaves,
        guarded(window.float().to(DEVICE)),
        Ragged(lengths, DEVICE),
        activate,  # type: ignore[arg-type]
    )
    got.backward(guarded(upstream.float().to(DEVICE)))
    assert torch.equal(got_window.cpu(), want_window.float())
    if t:
        assert error(got, want) < 1e-6
    for mine, theirs in zip(got_leaves, want_leaves, strict=True):
        if mine is not None and theirs is not None:
            assert mine.grad is not None and theirs.grad is not None
            assert error(mine.grad, theirs.grad) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_convolution_step_moves_its_window_on_in_place(bias: bool) -> None:
    conv = ShortConv(300, 4, bias)
    torch.nn.init.uniform_(conv.weight)
    if conv.bias is not None:
        torch.nn.init.uniform_(conv.bias)
    window = u(5, 300, 3).float().to(DEVICE)
    slots = [3, -1, 0]
    pool, dense = window.clone(), window[[3, 1, 0]].clone().cpu()
    with torch.no_grad():
        for step in range(5):
            x = u(3, 300, seed=step).float()
            want = conv.step(x, dense)
            b = None if conv.bias is None else conv.bias.to(DEVICE)
            y = prologue.conv_step(
                x.to(DEVICE), conv.weight[:, 0].to(DEVICE), b, pool, torch.tensor(slots, device=DEVICE)
            )
            assert error(y[[0, 2]], want[[0, 2]].double()) < 1e-6
            assert not y[1].any()
    assert torch.equal(pool[[3, 0]].cpu(), dense[[0, 2]])
    assert torch.equal(pool[[1, 2, 4]], window[[1, 2, 4]])


def test_convolution_of_a_token_ignores_its_neighbours() -> None:
    x, weight = u(45, 8).float().to(DEVICE), u(8, 4, seed=1).float().to(DEVICE)
    window = torch.zeros(3, 8, 3, device=DEVICE)
    together, _ = prologue.short_conv(x, weight, None, window, Ragged([7, 33, 5], DEVICE))
    alone, _ = prologue.short_conv(x[7:40], weight, None, window[:1], Ragged([33], DEVICE))
    assert torch.equal(together[7:40], alone)


def test_a_window_with_gradient_is_refused() -> None:
    x, window = u(3, 8).float().to(DEVICE), torch.zeros(1, 8, 3, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for its window"):
        prologue.short_conv(x, x.new_zeros(8, 4), None, window, Ragged([3], DEVICE))


def draw(heads: int, value_heads: int, gate_heads: int, decay_heads: int, kind: str, decay: int, t: int = 37) -> Raw:
    key, value = (20, 24) if kind != "wide" else (16, 16)
    tied = kind == "tied"
    b = u(t, gate_heads, seed=3) if tied else u(t, gate_heads, key, seed=3)
    f = {0: None, 1: 8 * u(t, decay_heads, seed=5), 2: 8 * u(t, decay_heads, key, seed=5)}[decay]
    if f is not None:
        f.flatten()[:3] = torch.tensor([-40.0, 40.0, 0.0])
    return Raw(
        u(t, heads, key), u(t, heads, key, seed=1), u(t, value_heads, value, seed=2), 6 * b,
        None if tied else 6 * u(t, value_heads, value, seed=4), f,
        None if f is None else 2 * u(decay_heads, seed=6), None if f is None else u(f[0].numel(), seed=7),
    )  # fmt: skip


FOLDS = {
    "gdn2": (draw(2, 2, 2, 2, "channel", 2), Gates(0.25)),
    "negative": (draw(2, 2, 2, 2, "channel", 2), Gates(0.25, erase_max=2.0)),
    "grouped": (draw(2, 4, 2, 2, "channel", 2), Gates(0.25)),
    "means": (draw(1, 2, 1, 1, "channel", 2), Gates(0.25, mean_erase=True, mean_write=True)),
    "kda": (draw(2, 4, 4, 4, "tied", 2), Gates(0.25)),
    "kda_bounded": (draw(2, 2, 2, 2, "tied", 2), Gates(0.25, lower_bound=-5.0, erase_max=2.0)),
    "gdn": (draw(2, 4, 4, 4, "tied", 1), Gates(0.25)),
    "gdn_bounded": (draw(1, 1, 1, 1, "tied", 1), Gates(1.0, lower_bound=-5.0)),
    "delta": (draw(2, 2, 2, 2, "tied", 0), Gates(0.25)),
    "wide": (draw(1, 2, 2, 2, "wide", 2), Gates(0.25)),
    "one_token": (draw(2, 2, 2, 2, "channel", 2, t=1), Gates(0.25)),
}


def folded(raw: Raw, gates: Gates, name, dtype: torch.dtype, device: str) -> tuple[Folded, list[Tensor | None]]:
    inputs = leaves(*raw, dtype=dtype, device=device)
    return fold_gates(Raw(*inputs), gates, name), inputs  # type: ignore[arg-type]


@pytest.mark.parametrize("case", FOLDS)
def test_folded_gates_and_gradients_equal_torch(case: str) -> None:
    raw, gates = FOLDS[case]
    want, want_inputs = folded(raw, gates, "torch", torch.float64, "cpu")
    got, inputs = folded(raw, gates, "triton", torch.float32, DEVICE)
    same, same_inputs = folded(raw, gates, "torch", torch.float32, "cpu")
    upstream = [None if x is None else u(*x.shape, seed=10 + i) for i, x in enumerate(want)]
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert error(mine, theirs) < 1e-6
    for outputs in (want, got, same):
        pairs = [(x, d) for x, d in zip(outputs, upstream, strict=True) if x is not None and d is not None]
        torch.autograd.backward([x for x, _ in pairs], [guarded(d.to(x.device, x.dtype)) for x, d in pairs])
    for name, mine, torchs, theirs in zip(Raw._fields, inputs, same_inputs, want_inputs, strict=True):
        if mine is not None and torchs is not None and theirs is not None:
            assert mine.grad is not None and torchs.grad is not None and theirs.grad is not None
            assert error(mine.grad, theirs.grad) < 2 * error(torchs.grad, theirs.grad) + 3e-6, name


def test_weak_decay_survives_and_g_is_fp32() -> None:
    raw, gates = draw(1, 1, 1, 1, "channel", 2), Gates(1.0)
    assert raw.f is not None
    raw.f.fill_(-18.0)
    got, _ = folded(raw, gates, "triton", torch.float32, DEVICE)
    want, _ = folded(raw, gates, "torch", torch.float64, "cpu")
    assert got.g is not None and want.g is not None and got.g.dtype == torch.float32
    assert float((got.g.detach().cpu() / want.g.detach() - 1).abs().max()) < 1e-5
    half, _ = folded(raw, gates, "triton", torch.float16, DEVICE)
    assert half.g is not None and half.g.dtype == torch.float32 and half.e.dtype == torch.float16


def test_zero_keys_stay_finite() -> None:
    raw, gates = draw(1, 1, 1, 1, "channel", 2), Gates(1.0)
    raw.k.zero_()
    got, inputs = folded(raw, gates, "triton", torch.float32, DEVICE)
    got.k.sum().backward()
    assert not got.k.any() and not got.e.any()
    assert inputs[1] is not None and inputs[1].grad is not None and inputs[1].grad.isfinite().all()


def test_gates_that_do_not_go_together_are_refused() -> None:
    raw, gates = FOLDS["gdn"]
    with pytest.raises(ValueError, match="b must be"):
        fold_gates(raw._replace(w=raw.v), gates)


def test_torch_twin_is_the_layer_of_the_published_equations() -> None:
    raw, _ = FOLDS["gdn2"]
    got = fold_gates(raw, Gates(0.5, erase_max=2.0), "torch")
    assert raw.w is not None and raw.f is not None and got.g is not None
    assert raw.A_log is not None and raw.dt_bias is not None
    k = raw.k / (raw.k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q = 0.5 * raw.q / (raw.q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    rate = torch.log1p((raw.f + raw.dt_bias.reshape(2, 20)).exp())
    want = (q, k, 2 * raw.b.sigmoid() * k, raw.w.sigmoid() * raw.v, -raw.A_log.exp()[:, None] * rate)
    assert all(error(x, y) < 1e-12 for x, y in zip((got.q, got.k, got.e, got.z, got.g), want, strict=True))


def test_fp64_is_refused_and_no_sequences_are_fine() -> None:
    raw, gates = FOLDS["gdn2"]
    with pytest.raises(ValueError, match="float64"):
        folded(raw, gates, "triton", torch.float64, DEVICE)
    x, weight, window = (t.to(DEVICE) for t in (u(3, 8), u(8, 4), u(1, 8, 3)))
    with pytest.raises(ValueError, match="float64"):
        prologue.short_conv(x, weight, None, window, Ragged([3], DEVICE))
    with pytest.raises(ValueError, match="float64"):
        prologue.conv_step(x[:1], weight, None, window)
    y, after = prologue.short_conv(x[:0].float(), weight.float(), None, window[:0].float(), Ragged([], DEVICE))
    assert y.shape == (0, 8) and after.shape == (0, 8, 3)
    assert prologue.conv_step(x[:0].float(), weight.float(), None, window[:0].float()).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tied", [False, True])
def test_gates_at_a_models_shape_in_bf16(tied: bool) -> None:
    t, h, d = 4096, 16, 128
    raw = Raw(
        u(t, h, d), u(t, h, d, seed=1), u(t, h, d, seed=2), u(t, h, seed=3) if tied else u(t, h, d, seed=3),
        None if tied else u(t, h, d, seed=4), 8 * u(t, h, d, seed=5), u(h, seed=6), u(h * d, seed=7),
    )  # fmt: skip
    rounded = Raw(*(x if x is None or n in ("A_log", "dt_bias") else x.bfloat16() for n, x in raw._asdict().items()))
    found = {}
    for name, dtype, implementation in (
        ("exact", torch.float64, "torch"), ("torch", torch.bfloat16, "torch"), ("kernel", torch.bfloat16, "triton"),
    ):  # fmt: skip
        inputs = [
            None if x is None else x.detach().to(DEVICE, torch.float32 if i > 5 and dtype != torch.float64 else dtype)
            for i, x in enumerate(rounded)
        ]
        inputs = [None if x is None else x.requires_grad_() for x in inputs]
        out = fold_gates(Raw(*inputs), Gates(0.1), implementation)  # type: ignore[arg-type]
        torch.autograd.backward(list(out), [torch.ones_like(x) for x in out])
        found[name] = [x.detach().cpu() for x in (*out, *(x.grad for x in inputs if x is not None))]
    for mine, torchs, exact in zip(found["kernel"], found["torch"], found["exact"], strict=True):
        assert error(mine, exact) <= 2 * error(torchs, exact) + 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_convolution_at_a_models_shape_in_bf16() -> None:
    lengths = [4096, 1, 0, 3000, 1095]
    ragged, c = Ragged(lengths, DEVICE), 2048
    x, weight, window = u(8192, c).bfloat16(), u(c, 4, seed=1).bfloat16(), u(5, c, 3, seed=2).bfloat16()
    found = {}
    for name, dtype, run in (
        ("exact", torch.float64, short_conv), ("torch", torch.bfloat16, short_conv),
        ("kernel", torch.bfloat16, prologue.short_conv),
    ):  # fmt: skip
        a, w = (t.detach().to(DEVICE, dtype).requires_grad_() for t in (x, weight))
        y, _ = run(a, w, None, window.to(DEVICE, dtype), ragged)
        y.backward(torch.ones_like(y))
        found[name] = [t.detach().cpu() for t in (y, a.grad, w.grad) if t is not None]
    for mine, torchs, exact in zip(found["kernel"], found["torch"], found["exact"], strict=True):
        assert error(mine, exact) <= 2 * error(torchs, exact) + 1e-5
