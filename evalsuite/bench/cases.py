"""What the kernel benchmark runs: inputs of one shape, the calls of every contender, and the check they must pass.

Axes: B batch, T tokens, N sequences, H heads, D key and value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Tensors = dict[str, Tensor]
    Rule = Callable[[Tensors], Sequence[Tensor]]

CHUNK = 64
CHECKED_HEADS = 2  # heads do not see each other, so the exact reference runs on the first ones only
PEER_ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError, ValueError, TypeError, AssertionError, ImportError, AttributeError, KeyError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """B x T tokens of H heads of width D."""

    batch: int
    tokens: int
    heads: int = 16
    width: int = 128

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.tokens} H{self.heads} D{self.width}"


SHAPES = (Shape(8, 4096), Shape(1, 32768), Shape(1, 131072))
PEER_SHAPES = (
    Shape(1, 8192, 96), Shape(2, 16384), Shape(4, 2048), Shape(4, 4096, 64), Shape(8, 2048, 32, 256),
    Shape(8, 1024, 8, 64),
)  # fmt: skip
"""fla's own benchmark shapes."""
DECODE_SEQUENCES = (1, 16, 64, 256)
TINY = (Shape(2, 48, 2, 16),)

OWN_LEAVES = tuple("qkezg")
PEER_OPS = {
    "gdn2": ("gdn2", "chunk_gdn2"), "kda": ("kda", "chunk_kda"), "gdn": ("gated_delta_rule", "chunk_gated_delta_rule"),
}  # fmt: skip
MIXERS = ("gdn2", "kda", "gdn")
OPS = (
    "forward", "backward", "strong", "layer", "decode",
    "convolution", "gates", "norm", "convolution-backward", "gates-backward", "norm-backward",
)  # fmt: skip
WEAK, STRONG = -4.0, 2.0  # mean logit of a decay: e^-0.02 and e^-2.1 a token


@dataclass(frozen=True)
class Job:
    """One row to measure."""

    op: str
    mixer: str
    shape: Shape
    calls: Mapping[str, Callable[[], object]]  # implementation -> timed call; "ours" first
    check: Callable[[], tuple[float, float]]  # relative error of ours, and what is allowed
    nbytes: int  # each input read once, each output written once
    flops: int
    graph: bool = False  # time a CUDA graph's replay: the call is shorter than its launch


@dataclass(frozen=True)
class Setup:
    """Where and with what the jobs run."""

    device: torch.device
    dtype: torch.dtype
    ours: Any  # implementation the product would use: "triton", or "torch" without a GPU
    peer: ModuleType | None  # fla, where importable


def find_peer(name: str = "fla") -> ModuleType | None:
    """The peer library, or None where it is not installed or does not import."""
    try:
        return import_module(name)
    except PEER_ERRORS:
        return None


def draw(shape: Shape, mixer: str, setup: Setup, seed: int = 0, decay: float = WEAK) -> dict[str, Tensor]:
    """Random inputs: unit q and k, v, gate logits b and w, decay logits f, and the folded e, z, g, [B, T, H, D]."""
    import torch
    from torch.nn import functional as F

    rng = torch.Generator(device=setup.device).manual_seed(seed)

    def normal(*tail: int) -> Tensor:
        return torch.randn(shape.batch, shape.tokens, shape.heads, *tail, generator=rng, device=setup.device)

    d, dtype = shape.width, setup.dtype
    x = {"q": F.normalize(normal(d), dim=-1), "k": F.normalize(normal(d), dim=-1), "v": normal(d)}
    x |= {"b": normal(d), "w": normal(d)} if mixer == "gdn2" else {"b": normal()}
    x["f"] = decay + (normal() if mixer == "gdn" else normal(d))
    x = {name: t.to(dtype) for name, t in x.items()}
    erase, write = x["b"].sigmoid(), x["w"].sigmoid() if mixer == "gdn2" else x["b"].sigmoid()
    if mixer != "gdn2":
        erase, write = erase[..., None], write[..., None]
    x |= {"e": erase * x["k"], "z": write * x["v"], "g": -F.softplus(x["f"].float())}
    x["erase"], x["write"] = x["b"].sigmoid(), write
    return x


def operator(op: str, mixer: str, shape: Shape, setup: Setup) -> Job:
    """Forward; the same where decays leave nothing after a chunk (strong); or the gradients of q, k, e, z, g alone (the
    outputs are made before)."""
    import torch

    from gdn2.kernels import delta_rule, solve_precision

    x = draw(shape, mixer, setup, decay=STRONG if op == "strong" else WEAK)
    backward = op == "backward"
    d_out = torch.randn_like(x["z"])

    def with_implementation(name: Any) -> Rule:
        return lambda inputs: delta_rule(*(inputs[n] for n in "qkezg"), implementation=name)[:1]

    def accurate(inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        with solve_precision("refined"):
            return with_implementation(setup.ours)(inputs)

    run = {"ours": with_implementation(setup.ours)}
    if setup.ours != "torch":
        run["ours, solve refined"] = accurate
        run["torch"] = with_implementation("torch")
    if setup.peer is not None:
        run["fla"] = peer_rule(setup.peer.__name__, mixer)
    theirs = (*"qkvg", "erase", *(["write"] if mixer == "gdn2" else []))
    leaves = {n: theirs if n == "fla" else OWN_LEAVES for n in run}
    calls = {n: gradient(f, x, leaves[n], [d_out]) if backward else forward(f, x) for n, f in run.items()}

    def check() -> tuple[float, float]:
        few = {n: t[:, :, :CHECKED_HEADS].double() for n, t in x.items()}
        if not backward:
            return worst(calls["ours"](), run["ours" if setup.ours == "torch" else "torch"](few), setup.dtype)
        exact = gradient(with_implementation("torch"), few, OWN_LEAVES, [d_out[:, :, :CHECKED_HEADS].double()])
        return worst(calls["ours"](), exact(), setup.dtype)

    gates = sum(size(x[n]) for n in "qkezg")
    nbytes = (2 * gates if backward else gates) + size(d_out)
    return Job(op, mixer, shape, calls, check, nbytes, operator_flops(shape, backward))


def decode(n: int, shape: Shape, setup: Setup) -> Job:
    """One token for each of n sequences from an fp32 state.

    fla returns new states. "fla in place" copies them back to where a CUDA graph reads them next time; with a pool of
    states, "fla pool" fetches and puts back the sequences' own, as "ours pool" does itself.
    """
    import torch

    from gdn2.kernels import delta_step

    shape = Shape(n, 1, shape.heads, shape.width)
    x = draw(shape, "gdn2", setup)
    rows = {name: t[:, 0] for name, t in x.items()}
    start = torch.randn(n, shape.heads, shape.width, shape.width, device=setup.device)
    state = start.clone()

    pool, slots = state.repeat(2, 1, 1, 1), torch.randperm(2 * n, device=setup.device)[:n].clone()

    def call(name: Any, inputs: dict[str, Tensor], state: Tensor, slots: Tensor | None = None) -> Tensor:
        q, k, e, z, g = (inputs[i] for i in "qkezg")
        return delta_step(q, k, e, z, g, state, slots, implementation=name)

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: call(setup.ours, rows, state),
        "ours pool": lambda: call(setup.ours, rows, pool, slots),
    }
    if setup.ours != "torch":
        calls["torch"] = lambda: call("torch", rows, state)
    if setup.peer is not None:
        theirs = import_module(f"{setup.peer.__name__}.ops.gdn2").fused_recurrent_gdn2
        inputs = [x[i] for i in ("q", "k", "v", "g", "erase", "write")]

        def step(before: Tensor) -> Tensor:
            after: Tensor = theirs(*inputs, scale=1.0, initial_state=before, output_final_state=True)[1]
            return after

        calls["fla"] = lambda: step(state)
        calls["fla in place"] = lambda: state.copy_(step(state))
        calls["fla pool"] = lambda: pool.index_copy_(0, slots, step(pool.index_select(0, slots)))

    def check() -> tuple[float, float]:
        few = {name: t[:, :CHECKED_HEADS].double() for name, t in rows.items()}
        mine, exact = start.clone(), start[:, :CHECKED_HEADS].double()
        o, want = call(setup.ours, rows, mine), call("torch", few, exact)
        return worst([o, mine], [want, exact], setup.dtype)

    moved = 2 * size(state) + sum(size(rows[i]) for i in "qkezg") + size(rows["z"])
    return Job("decode", "gdn2", shape, calls, check, moved, 6 * state.numel(), graph=setup.device.type == "cuda")


def forward(run: Rule, x: Tensors) -> Callable[[], Sequence[Tensor]]:
    """The forward pass without a graph of gradients."""
    import torch

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return run(x)

    return call


def gradient(
    run: Rule, x: Tensors, leaves: Sequence[str], d_out: Sequence[Tensor]
) -> Callable[[], Sequence[Tensor]]:
    """The backward pass alone; the forward pass runs at the first call."""
    import torch

    kept: list[tuple[Sequence[Tensor], list[Tensor]]] = []

    def call() -> Sequence[Tensor]:
        if not kept:
            own = {n: t.detach().requires_grad_() for n, t in x.items()}
            kept.append((run(own), [own[n] for n in leaves]))
        return torch.autograd.grad(kept[0][0], kept[0][1], d_out, retain_graph=True)

    return call


def worst(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative error of `got`, cut to the heads of `want`, and what is allowed; not finite is infinite."""
    import torch

    limit = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    largest = 0.0
    for mine, exact in zip(got, want, strict=True):
        cut = mine[tuple(slice(0, n) for n in exact.shape)]
        if not bool(mine.isfinite().all()):
            return math.inf, limit
        largest = max(largest, float((cut.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)))
    return largest, limit


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def operator_flops(shape: Shape, backward: bool) -> int:
    """Operations of the chunk form with 64-row chunks (a multiply-add is 2)."""
    d, rows = shape.width, shape.batch * shape.tokens * shape.heads
    score, state = 2 * CHUNK * d, 2 * d * d
    return rows * ((13 * score + 6 * state) if backward else (5 * score + 3 * state))


def peer_rule(library: str, mixer: str) -> Rule:
    """fla's forward for a mixer: unit keys and finished gates in, no scale."""
    module, name = PEER_OPS[mixer]
    rule = getattr(import_module(f"{library}.ops.{module}"), name)

    def call(x: Tensors) -> Sequence[Tensor]:
        gates = (x["erase"], x["write"]) if mixer == "gdn2" else (x["erase"],)
        return (rule(x["q"], x["k"], x["v"], x["g"], *gates, scale=1.0)[0],)

    return call
