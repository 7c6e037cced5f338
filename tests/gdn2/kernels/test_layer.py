"""The plain-torch functions around the operator: their equations, dtypes, batch invariance and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdn2.kernels.layer import Folded, Gates, Raw, fold_gates, gated_norm

T, H, HV, K, V = 37, 2, 4, 12, 20


def u(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2


def raw(tied: bool = False, decay: str = "channel", heads: int = H) -> Raw:
    f = {"channel": u(T, heads, K, seed=5), "head": u(T, heads, seed=5), "none": None}[decay]
    return Raw(
        u(T, H, K), u(T, H, K, seed=1), u(T, HV, V, seed=2), u(T, HV, seed=3) if tied else u(T, H, K, seed=3),
        None if tied else u(T, HV, V, seed=4), f, None if f is None else u(heads, seed=6),
        None if f is None else u(f[0].numel(), seed=7),
    )  # fmt: skip


def close(got: Tensor | None, want: Tensor) -> None:
    assert got is not None and got.shape == want.shape
    assert float((got.double() - want).norm()) < 1e-12 * float(want.norm()) + 1e-15


def test_one_beta_a_head_gates_erase_and_write() -> None:
    x = raw(tied=True, decay="head", heads=HV)
    got = fold_gates(x, Gates(1.0, erase_max=2.0))
    beta = 2 * x.b.sigmoid()[..., None]
    k = x.k / (x.k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    close(got.e, beta * k.repeat_interleave(2, 1))
    close(got.z, beta * x.v)
    assert x.f is not None and x.A_log is not None and x.dt_bias is not None
    close(got.g, -x.A_log.exp() * F.softplus(x.f + x.dt_bias))


def test_a_lower_bound_is_never_crossed() -> None:
    x = raw()
    assert x.f is not None and x.A_log is not None and x.dt_bias is not None
    got = fold_gates(x._replace(f=100 * x.f), Gates(1.0, lower_bound=-5.0))
    assert got.g is not None and float(got.g.min()) >= -5.0 and float(got.g.max()) <= 0.0
    inside = fold_gates(x, Gates(1.0, lower_bound=-5.0))
    close(inside.g, -5 * torch.sigmoid(x.A_log.exp()[:, None] * (x.f + x.dt_bias.reshape(H, K))))


def test_means_broadcast_one_number_over_the_channels() -> None:
    x = raw()
    got = fold_gates(x, Gates(1.0, mean_erase=True, mean_write=True))
    assert x.w is not None
    ratio = got.z / x.v
    close(ratio, x.w.sigmoid().mean(-1, keepdim=True).expand_as(ratio))
    ratio = got.e / got.k
    close(ratio, x.b.sigmoid().mean(-1, keepdim=True).expand_as(ratio))


def test_no_decay_gives_none() -> None:
    got = fold_gates(raw(tied=True, decay="none"), Gates(1.0))
    assert got.g is None and isinstance(got, Folded)


def test_decay_is_fp32_whatever_the_inputs_are() -> None:
    x = Raw(*(None if t is None else t.bfloat16() for t in raw()))
    got = fold_gates(x._replace(A_log=raw().A_log, dt_bias=raw().dt_bias), Gates(1.0))
    assert got.g is not None and got.g.dtype == torch.float32
    assert {t.dtype for t in (got.q, got.k, got.e, got.z)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    x = Raw(*(None if t is None else t.to(dtype) for t in raw()))
    with torch.no_grad():
        together = fold_gates(x, Gates(0.3))
        for at in (0, 1, 17, T - 1):
            alone = fold_gates(Raw(*(None if t is None else t[at : at + 1] for t in x[:6]), *x[6:]), Gates(0.3))
            for one, many in zip(alone, together, strict=True):
                assert one is not None and many is not None and torch.equal(one, many[at : at + 1])
        o, gate, weight = x.v, u(T, HV, V, seed=9).to(dtype), u(V, seed=10).to(dtype)
        norms = gated_norm(o, gate, weight, 1e-5, "silu")
        assert torch.equal(gated_norm(o[5:6], gate[5:6], weight, 1e-5, "silu"), norms[5:6])


def test_gradients_are_those_of_the_equations() -> None:
    x = Raw(*(None if t is None else t.requires_grad_() for t in raw()))

    def fold(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in fold_gates(Raw(*tensors), Gates(0.5, 2.0)) if t is not None)

    few = tuple(t[:2].detach().requires_grad_() if i < 6 else t for i, t in enumerate(x) if t is not None)
    assert torch.autograd.gradcheck(fold, few)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_norm_keeps_the_dtype_of_its_input(activation) -> None:
    o, gate, weight = u(3, HV, V), u(3, HV, V, seed=1), u(V, seed=2)
    want = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight * gate.sigmoid()
    want = want * gate if activation == "silu" else want
    close(gated_norm(o, gate, weight, 1e-5, activation), want)
    half = gated_norm(o.half(), gate.half(), weight.float(), 1e-5, activation)
    assert half.dtype == torch.float16 and float((half.double() - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_plain_implementations_are_one(implementation) -> None:
    x = raw()
    for mine, theirs in zip(fold_gates(x, Gates(1.0), implementation), fold_gates(x, Gates(1.0)), strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine, theirs)


def test_unknown_implementations_and_unmatched_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="implementation must be one of"):
        fold_gates(raw(), Gates(1.0), "cuda")  # type: ignore[arg-type]
    for wrong in (raw()._replace(w=None), raw(tied=True)._replace(w=u(T, HV, V))):
        with pytest.raises(ValueError, match=r"b must be \[T, heads, K\] with w, or \[T, Hv\] without"):
            fold_gates(wrong, Gates(1.0))
