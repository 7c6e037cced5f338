"""The operator's two CPU implementations: the token loop is the equation, the chunk form equals the loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn2.kernels import delta_rule, delta_step
from tests.gdn2.kernels.oracle import EXTREME, Case, assert_close, draw, error, run

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 130)
VARIANTS = {
    "gdn2": Case(70, heads=2, value_heads=2),
    "gdn2 range 2": Case(70, erase_max=2.0),
    "grouped": Case(40, heads=2, value_heads=4, value=12),
    "grouped wide": Case(40, heads=2, value_heads=4, wide=("e", "g")),
    "grouped wide decay, head": Case(70, heads=2, value_heads=4, decay="head", wide=("g",)),
    "head": Case(130, decay="head"),
    "undecayed": Case(130, decay="none"),
    "write only": Case(70, erase=False),
    "mamba2": Case(130, decay="head", erase=False),
    "linear attention": Case(70, decay="none", erase=False),
    "odd widths": Case(37, key=60, value=100),
    "odd widths, head": Case(70, key=20, value=52, decay="head"),
    "diag": Case(70, decay="head", erase=False, diag=True),
    "rank 4": Case(132, decay="head", erase=False, diag=True, rank=4),
    "rank 3 without diag": Case(99, decay="head", erase=False, rank=3),
    "rank 3 per channel": Case(99, erase=False, diag=True, rank=3),
    "batch": Case(33, batch=3, heads=2, value_heads=2),
    "packed": Case(100, lengths=(0, 1, 40, 0, 59), heads=2, value_heads=2),
    "packed, head": Case(150, lengths=(70, 0, 1, 79), decay="head"),
    "no state": Case(40, state=False),
}


def within(bound: float):
    return lambda name: bound


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS.keys())
def test_chunk_form_equals_loop_with_gradients(case: Case) -> None:
    inputs = draw(case)
    want, got = (run(inputs, name, backward=True) for name in ("reference", "torch"))
    assert_close(got, want, within(1e-12))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("decay", ["channel", "head", "none"])
def test_every_length(tokens: int, decay: str) -> None:
    inputs = draw(Case(tokens, decay=decay))
    want, got = (run(inputs, name, backward=tokens > 0) for name in ("reference", "torch"))
    assert_close(got, want, within(1e-12))
    if tokens == 0:
        state = inputs.tensors["state"]
        assert state is not None
        assert torch.equal(got["last"], state)


@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_extreme_decay(decay: str, dtype: torch.dtype, bound: float) -> None:
    inputs = draw(Case(130, decay=decay, gates=EXTREME, heads=2, value_heads=2))
    want = run(inputs, "reference", backward=True)
    got = run(inputs.to(dtype), "torch", backward=True)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, want, within(bound))


@pytest.mark.parametrize("gate", [0.0, -1e-8, -26.0, -1e4, float("-inf")])
def test_one_gate_everywhere(gate: float) -> None:
    inputs = draw(Case(70, gates=(gate,)))
    want, got = (run(inputs, name) for name in ("reference", "torch"))
    assert_close(got, want, within(1e-12))


@pytest.mark.parametrize("case", [Case(200, heads=2, value_heads=2), Case(200, decay="head")], ids=["channel", "head"])
def test_fp32_error_is_at_most_twice_that_of_the_loop(case: Case) -> None:
    one_bit = torch.finfo(torch.float32).eps
    inputs = draw(case).to(torch.float32)
    exact = run(inputs.to(torch.float64), "reference", backward=True)
    loop, chunk = (run(inputs, name, backward=True) for name in ("reference", "torch"))
    assert_close(chunk, exact, lambda name: 2 * error(loop[name], exact[name]) + one_bit)


def test_duplicate_and_zero_keys() -> None:
    inputs = draw(Case(80))
    k = inputs.tensors["k"]
    assert k is not None
    k[:, 10:40] = k[:, 10:11]
    k[:, 50:60] = 0.0
    inputs.tensors["e"] = k.clone()
    inputs.tensors["g"] = torch.zeros_like(k)
    want, got = (run(inputs, name, backward=True) for name in ("reference", "torch"))
    assert_close(got, want, within(1e-12))


@pytest.mark.parametrize("case", [Case(130), Case(130, decay="head"), Case(132, decay="head", erase=False, rank=4)])
@pytest.mark.parametrize("cut", [1, 15, 60, 68, 128])
def test_a_later_token_never_changes_an_earlier_output(case: Case, cut: int) -> None:
    cut -= cut % case.rank
    inputs = draw(case).to(torch.float32)
    before = run(inputs, "torch")["o"]
    for name in ("q", "k", "e", "z", "g"):
        x = inputs.tensors[name]
        if x is not None:
            x[:, cut:] = -x[:, cut:].abs() * 3 if name == "g" else x[:, cut:] + 1
    assert torch.equal(run(inputs, "torch")["o"][:, :cut], before[:, :cut])


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_a_sequence_does_not_feel_its_neighbours(name, decay: str) -> None:
    lengths = (17, 0, 70, 1, 40)
    inputs = draw(Case(sum(lengths), lengths=lengths, decay=decay)).to(torch.float32)
    together = run(inputs, name)
    start = 0
    for n, length in enumerate(lengths):
        rows = {
            key: None if x is None else x[n : n + 1] if key == "state" else x[:, start : start + length]
            for key, x in inputs.tensors.items()
        }
        alone = run(replace(inputs, tensors=rows, cu_seqlens=None), name)
        assert torch.equal(alone["o"], together["o"][:, start : start + length])
        assert torch.equal(alone["last"], together["last"][n : n + 1])
        start += length


@pytest.mark.parametrize("decay", ["channel", "head", "none"])
def test_pieces_equal_one_pass(decay: str) -> None:
    inputs = draw(Case(100, decay=decay))
    whole = run(inputs, "torch")
    state, outputs = inputs.tensors["state"], []
    for begin, end in ((0, 1), (1, 50), (50, 50), (50, 100)):
        rows = {key: None if x is None else x[:, begin:end] for key, x in inputs.tensors.items()}
        part = run(replace(inputs, tensors=rows | {"state": state}), "torch")
        state = part["last"]
        outputs.append(part["o"])
    assert_close({"o": torch.cat(outputs, 1), "last": part["last"]}, whole, within(1e-12))


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("decay", ["channel", "head", "none"])
@pytest.mark.parametrize("erase", [True, False])
def test_steps_equal_the_rule(name, decay: str, erase: bool) -> None:
    inputs = draw(Case(9, batch=3, heads=2, value_heads=4, decay=decay, erase=erase))
    want = run(inputs, "reference")
    rows = inputs.tensors
    assert rows["state"] is not None
    state = rows["state"].clone()
    for t in range(9):
        q, k, e, z, g = (None if rows[n] is None else rows[n][:, t] for n in "qkezg")
        assert q is not None and k is not None and z is not None
        o = delta_step(q, k, e, z, g, state, implementation=name)
        assert error(o, want["o"][:, t]) < 1e-12
    assert error(state, want["last"]) < 1e-12


# The identities of DESIGN.md. Each loop is written from the mixer's own recurrence, not through e and z.


def mixer_inputs(tokens: int = 40, key: int = 8, value: int = 12) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)

    def u(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    k = torch.nn.functional.normalize(u(tokens, key) - 0.5, dim=-1)
    return {
        "q": u(tokens, key) - 0.5, "k": k, "v": u(tokens, value) - 0.5, "alpha": u(tokens, key), "b": u(tokens, key),
        "w": u(tokens, value), "scalar": u(tokens), "beta": u(tokens), "lam": u(tokens), "dt": u(tokens),
    }  # fmt: skip


def one_head(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[None, :, None]


def operator(name, q, k, e, z, g, **more) -> tuple[Tensor, Tensor]:
    """One sequence, one head, no start state: o [T, V], S [K, V]."""
    o, last = delta_rule(one_head(q), one_head(k), one_head(e), one_head(z), one_head(g), implementation=name, **more)
    return o[0, :, 0], last[0, 0]


def check(name, want: tuple[list[Tensor], Tensor], *call, **more) -> None:
    o, last = operator(name, *call, **more)
    assert (o - torch.stack(want[0])).abs().max() < 2e-14
    assert (last - want[1]).abs().max() < 2e-14


IMPLEMENTATIONS = pytest.mark.parametrize("name", ["reference", "torch"])


@IMPLEMENTATIONS
def test_gdn2_is_equation_10(name) -> None:
    x = mixer_inputs()
    s, out = torch.zeros(8, 12, dtype=torch.float64), []
    for q, k, v, a, b, w in zip(*(x[n] for n in ("q", "k", "v", "alpha", "b", "w")), strict=True):
        s = (torch.eye(8) - torch.outer(k, b * k)) @ torch.diag(a) @ s + torch.outer(k, w * v)
        out.append(s.T @ q)
    check(name, (out, s), x["q"], x["k"], x["b"] * x["k"], x["w"] * x["v"], x["alpha"].log())


@IMPLEMENTATIONS
def test_kda_gdn_and_deltanet(name) -> None:
    x = mixer_inputs()
    decays = {"kda": x["alpha"], "gdn": x["scalar"][:, None].expand(-1, 8), "deltanet": torch.ones_like(x["alpha"])}
    for mixer, alpha in decays.items():
        s, out = torch.zeros(8, 12, dtype=torch.float64), []
        for q, k, v, a, beta in zip(x["q"], x["k"], x["v"], alpha, x["beta"], strict=True):
            s = a[:, None] * s
            s = s - beta * torch.outer(k, k @ s) + beta * torch.outer(k, v)
            out.append(q @ s)
        g = {"kda": x["alpha"].log(), "gdn": x["scalar"].log(), "deltanet": None}[mixer]
        beta = x["beta"][:, None]
        check(name, (out, s), x["q"], x["k"], beta * x["k"], beta * x["v"], g)


@IMPLEMENTATIONS
def test_mamba2(name) -> None:
    x = mixer_inputs()
    rate = -0.7
    s, out = torch.zeros(8, 12, dtype=torch.float64), []
    for c, b, v, dt in zip(x["q"], x["k"], x["v"], x["dt"], strict=True):
        s = torch.exp(rate * dt) * s + dt * torch.outer(b, v)
        out.append(s.T @ c)
    check(name, (out, s), x["q"], x["k"], None, x["dt"][:, None] * x["v"], rate * x["dt"])


@IMPLEMENTATIONS
def test_mamba3_siso(name) -> None:
    x = mixer_inputs()
    s, out, previous = torch.zeros(8, 12, dtype=torch.float64), [], None
    columns = (x[n] for n in ("q", "k", "v", "scalar", "lam", "dt"))
    for q, k, v, a, lam, dt in zip(*columns, strict=True):
        s = a * s + lam * dt * torch.outer(k, v)
        if previous is not None:
            s = s + (1 - lam) * dt * a * previous
        previous = torch.outer(k, v)
        out.append(s.T @ q)
    own = x["lam"] * x["dt"]
    weight = own + torch.cat([((1 - x["lam"]) * x["dt"])[1:], own.new_zeros(1)])
    check(
        name, (out, s), x["q"], x["k"], None, weight[:, None] * x["v"], x["scalar"].log(), diag=one_head(own / weight)
    )


@IMPLEMENTATIONS
def test_mamba3_mimo(name) -> None:
    rank, tokens = 4, 21
    x = mixer_inputs(tokens)
    rng = torch.Generator().manual_seed(6)
    q, k = (torch.randn(tokens, rank, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    v = torch.randn(tokens, rank, 12, generator=rng, dtype=torch.float64)
    s, out, previous = torch.zeros(8, 12, dtype=torch.float64), [], None
    for t in range(tokens):
        lam, dt, a = x["lam"][t], x["dt"][t], x["scalar"][t]
        write = sum(torch.outer(k[t, r], v[t, r]) for r in range(rank))
        s = a * s + lam * dt * write
        if previous is not None:
            s = s + (1 - lam) * dt * a * previous
        previous = write
        out.extend(s.T @ q[t, r] for r in range(rank))
    own = x["lam"] * x["dt"]
    weight = own + torch.cat([((1 - x["lam"]) * x["dt"])[1:], own.new_zeros(1)])
    g = torch.zeros(tokens, rank, dtype=torch.float64)
    g[:, 0] = x["scalar"].log()
    o, last = operator(
        name, q.flatten(0, 1), k.flatten(0, 1), None, (weight[:, None, None] * v).flatten(0, 1), g.flatten(),
        diag=one_head((own / weight).repeat_interleave(rank)), rank=rank,
    )  # fmt: skip
    assert (o - torch.stack(out)).abs().max() < 5e-13
    assert (last - s).abs().max() < 5e-13


def test_a_step_minimises_equation_13() -> None:
    """S_t is the minimiser of |S - S'|^2 - 2 <S^T k, z - S'^T e>: its gradient vanishes there and only there."""
    inputs = draw(Case(1, key=8, value=8))
    rows = {n: x[0, 0, 0] for n, x in inputs.tensors.items() if x is not None and n != "state"}
    state = inputs.tensors["state"]
    assert state is not None
    decayed = rows["g"].exp()[:, None] * state[0, 0]

    def objective(s: Tensor) -> Tensor:
        return ((s - decayed) ** 2).sum() - 2 * (s.T @ rows["k"]) @ (rows["z"] - decayed.T @ rows["e"])

    best = run(inputs, "reference")["last"][0, 0].requires_grad_()
    (slope,) = torch.autograd.grad(objective(best), best)
    assert slope.abs().max() < 1e-13
    moved = best.detach() + 1e-3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert objective(moved) > objective(best.detach())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"z": torch.zeros(1, 5, 2, 4)}, "axis 't' is 5 in z but 4 in q"),
        ({"g": torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)}, "g must be float32"),
        ({"e": torch.zeros(1, 4, 3, 8)}, "e must be per key head or per value head"),
        ({"state": torch.zeros(1, 2, 8, 5)}, r"state must be \[N, Hv, K, V\] = \[1, 2, 8, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must rise from 0 to 4"),
        ({"rank": 2}, "erase with several rows a token"),
        ({"implementation": "cuda"}, "implementation must be one of reference, torch, triton, numba"),
    ],
)
def test_a_wrong_call_names_what_is_wrong(change: dict, message: str) -> None:
    good = {"q": torch.zeros(1, 4, 2, 8), "k": torch.zeros(1, 4, 2, 8), "e": torch.zeros(1, 4, 2, 8),
            "z": torch.zeros(1, 4, 2, 4), "g": torch.zeros(1, 4, 2, 8)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        delta_rule(**(good | change))
