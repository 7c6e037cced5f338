"""Inputs, the fp64 oracle and the tolerance rule of the kernel tests.

Axes: B batch, T rows, N sequences, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn2.kernels import Implementation, delta_rule

EXTREME = (0.0, -1e-8, -26.0, -1e4, float("-inf"))
"""Log-decays that broke kernels elsewhere: keep all, next to all, a real layer's minimum, nothing, exactly nothing."""

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error that is always allowed: half-precision kernels round their operands, torch does not."""
FACTOR = 2.0
"""Beyond the floor, a kernel may err this many times as much as the torch path on the same inputs."""


@dataclass(frozen=True)
class Case:
    """One call of the operator."""

    tokens: int
    heads: int = 1
    value_heads: int = 1
    key: int = 16
    value: int = 16
    batch: int = 1
    decay: str = "channel"  # channel, head or none
    erase: bool = True
    gates: Sequence[float] | None = None  # log-decays to draw from; None draws from (-2, 0)
    lengths: Sequence[int] | None = None  # packed sequences; their sum is `tokens`
    state: bool = True
    diag: bool = False
    rank: int = 1
    erase_max: float = 1.0
    wide: Sequence[str] = ()  # inputs among e and g that come per value head
    seed: int = 0


@dataclass
class Inputs:
    """Tensors of one call, by argument name; missing ones are None."""

    tensors: dict[str, Tensor | None]
    rank: int = 1
    cu_seqlens: Tensor | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str | None = None) -> Inputs:
        """Cast q, k, e and z to `dtype`; g, diag and the state are fp32 unless the dtype is fp64."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        cast = {
            name: None if x is None else x.to(device, precise if name in ("g", "state", "diag") else dtype)
            for name, x in self.tensors.items()
        }
        cu = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return replace(self, tensors=cast, cu_seqlens=cu)


def draw(case: Case) -> Inputs:
    """Random inputs in fp64: unit keys, erase gates up to `erase_max`, decays as the case says."""
    rng = torch.Generator().manual_seed(case.seed)
    b, t, h, hv = case.batch, case.tokens, case.heads, case.value_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    q = F.normalize(normal(b, t, h, case.key), dim=-1)
    k = F.normalize(normal(b, t, h, case.key), dim=-1)
    e = None
    if case.erase:
        spread = k.repeat_interleave(hv // h, 2) if "e" in case.wide else k
        e = case.erase_max * uniform(*spread.shape) * spread
    g = None
    if case.decay != "none":
        shape = (b, t, hv if "g" in case.wide else h, *([case.key] if case.decay == "channel" else []))
        if case.gates is None:
            g = -2.0 * uniform(*shape)
        else:
            g = torch.tensor(case.gates, dtype=torch.float64)[(uniform(*shape) * len(case.gates)).long()]
        if case.rank > 1:
            g = g * (torch.arange(t) % case.rank == 0).reshape(1, t, *[1] * (g.ndim - 2))
    sequences = len(case.lengths) if case.lengths is not None else b
    cu = None
    if case.lengths is not None:
        cu = torch.tensor([0, *case.lengths]).cumsum(0)
    tensors = {
        "q": q,
        "k": k,
        "e": e,
        "z": normal(b, t, hv, case.value),
        "g": g,
        "state": normal(sequences, hv, case.key, case.value) if case.state else None,
        "diag": uniform(b, t, hv) if case.diag else None,
    }
    return Inputs(tensors, case.rank, cu)


def run(inputs: Inputs, implementation: Implementation, backward: bool = False) -> dict[str, Tensor]:
    """Outputs "o" and "last", and with `backward` the gradients of every input under fixed random cotangents."""
    leaves = {
        name: None if x is None else x.detach().clone().requires_grad_(backward) for name, x in inputs.tensors.items()
    }
    q, k, z = leaves["q"], leaves["k"], leaves["z"]
    assert q is not None and k is not None and z is not None
    o, last = delta_rule(
        q, k, leaves["e"], z, leaves["g"], leaves["state"], inputs.cu_seqlens,
        diag=leaves["diag"], rank=inputs.rank, implementation=implementation,
    )  # fmt: skip
    out = {"o": o.detach(), "last": last.detach()}
    if backward:
        rng = torch.Generator().manual_seed(99)
        do = torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.device, o.dtype)
        dlast = torch.randn(last.shape, generator=rng, dtype=torch.float64).to(last.device, last.dtype)
        torch.autograd.backward([o, last], [do, dlast])
        for name, x in leaves.items():
            if x is not None:
                assert x.grad is not None, f"no gradient for {name}"
                out[f"d{name}"] = x.grad
        if "dg" in out:  # rows 2..R of a token have no decay of their own to differentiate
            out["dg"] = out["dg"][:, :: inputs.rank]
    return out


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over the whole tensor; NaN never passes a comparison."""
    if want.numel() == 0:
        return 0.0 if got.shape == want.shape else float("inf")
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / max(scale, 1e-30)


def device() -> str:
    """Where kernels run: on a GPU if there is one, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def allowed(inputs: Inputs, exact: dict[str, Tensor], backward: bool = False) -> Callable[[str], float]:
    """The tolerance of every kernel test: FACTOR times the torch path's error on the same inputs, plus FLOOR."""
    z = inputs.tensors["z"]
    assert z is not None
    same = run(inputs, "torch", backward)
    # dg is the difference between what each pair of rows reads and what it writes, rounded apart.
    return lambda name: FACTOR * error(same[name], exact[name]) + FLOOR[z.dtype] * (2 if name == "dg" else 1)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], allowed: Callable[[str], float]) -> None:
    """Every tensor of `want` is met within its allowed relative error."""
    assert got.keys() == want.keys()
    largest = max(max(x.double().norm().item() for x in want.values()), 1e-30)
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        # An exactly zero reference (a gradient through a decay of zero, say) is measured against the largest other one.
        reached = error(got[name], expected) if expected.abs().sum() else got[name].double().norm().item() / largest
        assert reached <= allowed(name), f"{name}: relative error {reached:.2e} > {allowed(name):.2e}"
