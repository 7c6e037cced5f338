"""The adapter against recurrences written from fla's documented definitions, and its signatures against fla's own."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.peer_fla import adapter
from tests.peer_fla.adapter import REPLACED, chunk_gated_delta_rule, chunk_gdn2, chunk_kda, fused_recurrent_gdn2

# Positional order of fla 0.6.0; what fla takes as open keywords follows after it.
ORDER = {
    "chunk_gdn2": "q k v g b w scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "cu_seqlens cu_seqlens_cpu safe_gate lower_bound disable_recompute return_intermediate_states state_v_first "
    "cp_context",
    "fused_recurrent_gdn2": "q k v g b w A_log dt_bias scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel use_gate_in_kernel lower_bound state_v_first cu_seqlens",
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states "
    "state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs",
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context",
}


def draw(b: int = 2, t: int = 70, h: int = 2, hv: int = 2, d: int = 16) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)

    def n(*shape: int) -> Tensor:
        return torch.randn(b, t, *shape, generator=rng)

    return {
        "q": n(h, d), "k": n(h, d), "v": 0.5 * n(hv, d), "g": n(hv, d), "b": n(hv, d).sigmoid(),
        "w": n(hv, d).sigmoid(), "beta": n(hv).sigmoid(), "h0": torch.randn(b, hv, d, d, generator=rng),
        "A_log": torch.rand(hv, generator=rng), "dt_bias": torch.randn(hv * d, generator=rng),
    }  # fmt: skip


def loop(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, b: Tensor, w: Tensor, s: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S <- (I - k (b k)^T) Diag(decay) S + k (w v)^T; o = scale S^T q, all heads equal, fp64."""
    q, k, v, decay, b, w, s = (x.double() for x in (q, k, v, decay, b, w, s))
    outputs = []
    for t in range(q.shape[1]):
        s = decay[:, t, :, :, None] * s
        seen = torch.einsum("bhkv,bhk->bhv", s, b[:, t] * k[:, t])
        s = s + k[:, t, :, :, None] * (w[:, t] * v[:, t] - seen)[:, :, None]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
    return torch.stack(outputs, 1), s


def close(got: Tensor | None, want: Tensor) -> None:
    assert got is not None and got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < 2e-5


@pytest.mark.parametrize("run", [chunk_gdn2, fused_recurrent_gdn2])
def test_gdn2_with_everything_inside(run) -> None:
    x = draw()
    unit = {n: F.normalize(x[n].double(), dim=-1) for n in "qk"}
    rate = x["A_log"].double().exp()[:, None] * F.softplus(x["g"].double() + x["dt_bias"].double().reshape(2, 16))
    want, last = loop(unit["q"], unit["k"], x["v"], (-rate).exp(), x["b"], x["w"], x["h0"], 16**-0.5)
    o, ht = run(
        x["q"], x["k"], x["v"], x["g"], x["b"], x["w"], initial_state=x["h0"], output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=x["A_log"], dt_bias=x["dt_bias"],
    )  # fmt: skip
    close(o, want)
    close(ht, last)
    o, ht = run(
        x["q"], x["k"], x["v"], x["g"], x["b"], x["w"], initial_state=x["h0"].transpose(-1, -2),
        output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=x["A_log"],
        dt_bias=x["dt_bias"], state_v_first=True,
    )  # fmt: skip
    close(o, want)
    close(ht, last.transpose(-1, -2))


def test_kda_with_grouped_heads_and_a_bounded_gate() -> None:
    x = draw(hv=4)
    k = F.normalize(x["k"].double(), dim=-1).repeat_interleave(2, 2)
    q = F.normalize(x["q"].double(), dim=-1).repeat_interleave(2, 2)
    g = -5 * torch.sigmoid(x["A_log"].double().exp()[:, None] * (x["g"] + x["dt_bias"].reshape(4, 16)).double())
    beta = 2 * x["beta"].double().sigmoid()[..., None]
    want, last = loop(q, k, x["v"], g.exp(), beta, beta, x["h0"], 0.5)
    o, ht = chunk_kda(
        x["q"], x["k"], x["v"], x["g"], x["beta"], scale=0.5, initial_state=x["h0"], output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True, safe_gate=True, lower_bound=-5.0, A_log=x["A_log"], dt_bias=x["dt_bias"],
    )  # fmt: skip
    close(o, want)
    close(ht, last)


def test_gated_delta_rule_and_packed_sequences() -> None:
    x = draw(b=1)
    q, k = (F.normalize(x[n], dim=-1) for n in "qk")
    g = F.logsigmoid(x["g"][..., 0])
    bounds = torch.tensor([0, 15, 15, 70])
    h0 = x["h0"].expand(3, 2, 16, 16).contiguous()
    o, ht = chunk_gated_delta_rule(
        q, k, x["v"], g, x["beta"], scale=1.0, initial_state=h0, output_final_state=True, cu_seqlens=bounds
    )
    assert o is not None and ht is not None
    decay, beta = g.exp()[..., None].expand(-1, -1, -1, 16), x["beta"][..., None]
    for n, (begin, end) in enumerate(((0, 15), (15, 15), (15, 70))):
        if begin == end:
            assert torch.equal(ht[n], h0[n])
            continue
        rows = [t[:, begin:end] for t in (q, k, x["v"], decay, beta, beta)]
        want, last = loop(*rows, h0[n : n + 1], 1.0)
        close(o[:, begin:end], want)
        close(ht[n : n + 1], last)


def test_states_before_chunks_are_those_of_shorter_runs() -> None:
    x = draw(t=130)
    args = [x[n] for n in ("q", "k", "v")] + [-x["g"].abs(), x["b"], x["w"]]
    with torch.inference_mode():
        _, _, h = chunk_gdn2(
            *args, initial_state=x["h0"], return_intermediate_states=True, use_qk_l2norm_in_kernel=True
        )
        _, at_128 = chunk_gdn2(
            *(a[:, :128] for a in args), initial_state=x["h0"], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    assert h is not None and at_128 is not None and h.shape == (2, 3, 2, 16, 16)
    assert torch.equal(h[:, 0], x["h0"])
    close(h[:, 2], at_128.double())
    with pytest.raises(ValueError, match="inference mode"):
        chunk_gdn2(*args, return_intermediate_states=True)


def test_gradients_reach_every_argument() -> None:
    x = {n: t.requires_grad_() for n, t in draw(t=9).items()}
    o, _ = chunk_gdn2(
        x["q"], x["k"], x["v"], x["g"], x["b"], x["w"], initial_state=x["h0"], use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True, A_log=x["A_log"], dt_bias=x["dt_bias"],
    )  # fmt: skip
    assert o is not None
    o.square().sum().backward()
    for name in ("q", "k", "v", "g", "b", "w", "h0", "A_log", "dt_bias"):
        assert x[name].grad is not None and float(x[name].grad.abs().sum()) > 0, name  # type: ignore[union-attr]


def test_what_fla_refuses_is_refused() -> None:
    x = draw(t=3)
    args = (x["q"], x["k"], x["v"], x["g"], x["b"], x["w"])
    for size in (16, 32):
        with pytest.raises(ValueError, match="chunk_size"):
            chunk_gdn2(*args, chunk_size=size)
    with pytest.raises(ValueError, match="lower_bound"):
        chunk_gdn2(*args, safe_gate=True, use_gate_in_kernel=True, lower_bound=-6.0)
    with pytest.raises(ValueError, match="A_log"):
        chunk_gdn2(*args, use_gate_in_kernel=True)
    with pytest.raises(ValueError, match="allow_neg_eigval"):
        chunk_kda(*args[:4], x["beta"], allow_neg_eigval=True)
    with pytest.raises(ValueError, match="batch of 1"):
        chunk_gdn2(*args, cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("name", ORDER)
def test_signatures_are_fla_s(name: str) -> None:
    mine = list(inspect.signature(getattr(adapter, name)).parameters)
    assert mine[: len(ORDER[name].split())] == ORDER[name].split()


@pytest.mark.parametrize("module", REPLACED)
def test_signatures_match_an_installed_fla(module: str) -> None:
    peer = pytest.importorskip("fla", reason="fla is not installed") and import_module(module)
    for function in REPLACED[module]:
        theirs = inspect.signature(inspect.unwrap(getattr(peer, function.__name__))).parameters
        named = [n for n, p in theirs.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        assert list(inspect.signature(function).parameters)[: len(named)] == named
