"""What the kernel benchmark runs around the operator: whole layer fronts, gates, norm and convolution.

Axes as in `evalsuite.bench.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evalsuite.bench.cases import (
    CHECKED_HEADS,
    PEER_OPS,
    Job,
    Setup,
    Shape,
    draw,
    forward,
    gradient,
    operator_flops,
    size,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor

    from evalsuite.bench.cases import Rule, Tensors
    from gdn2.kernels.layer import Gates, Raw

def layer(mixer: str, shape: Shape, setup: Setup) -> Job:
    """From raw projections to the operator's output: L2 norm, gates and forward pass."""
    import torch

    from gdn2.kernels import delta_rule
    from gdn2.kernels.layer import fold_gates

    x = draw(shape, mixer, setup)
    raw, gates = raw_of(x, mixer, shape)

    def with_implementation(name: Any, raw: Raw) -> Tensor:
        with torch.no_grad():
            x = fold_gates(raw, gates, name)
            q, k, e, z = (t.unflatten(0, (shape.batch, shape.tokens)) for t in x[:4])
            g = None if x.g is None else x.g.unflatten(0, (shape.batch, shape.tokens))
            return delta_rule(q, k, e, z, g, implementation=name)[0]

    calls: dict[str, Callable[[], Any]] = {"ours": lambda: with_implementation(setup.ours, raw)}
    if setup.ours != "torch":
        calls["torch"] = lambda: with_implementation("torch", raw)
    if setup.peer is not None:
        calls["fla"] = peer_layer(setup.peer.__name__, mixer, x, raw)

    def check() -> tuple[float, float]:
        return worst([calls["ours"]()], [with_implementation("torch", first_heads(raw))], setup.dtype)

    nbytes = sum(size(t) for t in raw if t is not None) + size(x["v"])
    return Job("layer", mixer, shape, calls, check, nbytes, operator_flops(shape, False))


def raw_of(x: dict[str, Tensor], mixer: str, shape: Shape) -> tuple[Raw, Gates]:
    """The projections of `draw` without their batch axis, with decay parameters of a fresh layer."""
    import torch

    from gdn2.kernels.layer import Gates, Raw

    flat = {n: t.flatten(0, 1) for n, t in x.items()}
    rate = torch.linspace(0.0, 1.0, shape.heads, device=x["q"].device)
    bias = torch.zeros_like(flat["f"][0], dtype=torch.float32).flatten()
    raw = Raw(flat["q"], flat["k"], flat["v"], flat["b"], flat.get("w"), flat["f"], rate, bias)
    return raw, Gates(shape.width**-0.5)


def first_heads(raw: Raw) -> Raw:
    """The first heads in fp64."""
    from gdn2.kernels.layer import Raw

    heads = CHECKED_HEADS
    assert raw.A_log is not None and raw.dt_bias is not None and raw.f is not None

    def cut(x: Tensor) -> Tensor:
        return x[:, :heads].double()

    bias = raw.dt_bias.reshape(raw.f.shape[1:])[:heads].flatten().double()
    w = None if raw.w is None else cut(raw.w)
    return Raw(cut(raw.q), cut(raw.k), cut(raw.v), cut(raw.b), w, cut(raw.f), raw.A_log[:heads].double(), bias)


def gates(mixer: str, shape: Shape, setup: Setup, backward: bool = False) -> Job:
    """L2 norm and folded gates alone."""
    from gdn2.kernels.layer import Raw, fold_gates

    raw, options = raw_of(draw(shape, mixer, setup), mixer, shape)

    def with_implementation(name: Any) -> Rule:
        def call(x: Tensors) -> Sequence[Tensor]:
            folded = fold_gates(Raw(*map(x.get, Raw._fields)), options, name)  # type: ignore[arg-type]
            return tuple(t for t in folded if t is not None)

        return call

    x, few = _given(raw), _given(first_heads(raw))
    return _part("gates", mixer, shape, setup, _contenders(setup, with_implementation), x, few, backward)


def _given(raw: Raw) -> Tensors:
    return {name: x for name, x in raw._asdict().items() if x is not None}


def norm(shape: Shape, setup: Setup, backward: bool = False) -> Job:
    """RMSNorm times the gated output."""
    import torch

    from gdn2.kernels.layer import gated_norm

    drawn = draw(shape, "gdn2", setup)
    x = {"o": drawn["v"].flatten(0, 1), "gate": drawn["w"].flatten(0, 1)}
    x["weight"] = torch.rand(shape.width, device=setup.device)

    def with_implementation(name: Any) -> Rule:
        return lambda x: (gated_norm(x["o"], x["gate"], x["weight"], 1e-5, "silu", name),)

    parts = _contenders(setup, with_implementation)
    if setup.peer is not None:
        rule = import_module(f"{setup.peer.__name__}.modules.norm.fused_norm_gate").rms_norm_gated

        def theirs(x: Tensors) -> Sequence[Tensor]:
            return (rule(x["o"], x["gate"], x["weight"], None, eps=1e-5),)

        parts["fla"] = theirs

    all_heads = {name: t.double() for name, t in x.items()}  # the gradient of the weight is a sum over them
    return _part("norm", "any", shape, setup, parts, x, all_heads, backward)


def convolution(shape: Shape, setup: Setup, backward: bool = False) -> Job:
    """Short convolution and SiLU of one projection."""
    import torch

    from gdn2.mixers.conv import short_conv
    from gdn2.ragged import Ragged

    channels = shape.heads * shape.width
    x = {"x": draw(shape, "gdn2", setup)["v"].reshape(-1, channels)}
    x["weight"] = torch.rand(channels, 4, device=setup.device).to(setup.dtype) - 0.5
    ragged = Ragged([shape.tokens] * shape.batch, setup.device)

    def with_implementation(name: Any) -> Rule:
        convolve = short_conv
        if name == "triton":
            from gdn2.kernels.triton import prologue

            convolve = prologue.short_conv

        def call(x: Tensors) -> Sequence[Tensor]:
            window = x["x"].new_zeros(shape.batch, x["x"].shape[1], 3)
            return (convolve(x["x"], x["weight"], None, window, ragged)[0],)

        return call

    parts = _contenders(setup, with_implementation)
    if setup.peer is not None:
        rule = import_module(f"{setup.peer.__name__}.modules.causal_conv1d.ops").causal_conv1d

        def theirs(x: Tensors) -> Sequence[Tensor]:
            rows = x["x"].reshape(shape.batch, shape.tokens, channels)
            return (rule(rows, x["weight"], activation="silu")[0].flatten(0, 1),)

        parts["fla"] = theirs

    few = {"x": x["x"][:, :64].double(), "weight": x["weight"][:64].double()}
    return _part("convolution", "any", shape, setup, parts, x, few, backward)


def _contenders(setup: Setup, with_implementation: Callable[[Any], Rule]) -> dict[str, Rule]:
    names = {"ours": setup.ours} | ({} if setup.ours == "torch" else {"torch": "torch"})
    return {name: with_implementation(implementation) for name, implementation in names.items()}


def _part(
    op: str, mixer: str, shape: Shape, setup: Setup, parts: dict[str, Rule], x: Tensors, few: Tensors, backward: bool
) -> Job:
    """A job of one kernel: `few` is x in fp64, of the first heads where they do not see each other."""
    import torch

    exact = parts["ours" if setup.ours == "torch" else "torch"]
    outputs = forward(parts["ours"], x)()
    moved = sum(map(size, (*x.values(), *outputs)))
    if not backward:
        calls = {name: forward(f, x) for name, f in parts.items()}
        wanted = forward(exact, few)
    else:
        d_out = [torch.randn_like(t) for t in outputs]
        cut = [d[tuple(map(slice, t.shape))].double() for d, t in zip(d_out, forward(exact, few)(), strict=True)]
        calls = {name: gradient(f, x, list(x), d_out) for name, f in parts.items()}
        wanted = gradient(exact, few, list(few), cut)
        moved += sum(map(size, x.values()))
    name = f"{op}-backward" if backward else op
    return Job(name, mixer, shape, calls, lambda: worst(calls["ours"](), wanted(), setup.dtype), moved, 0)


def peer_layer(library: str, mixer: str, x: dict[str, Tensor], raw: Raw) -> Callable[[], object]:
    """The same from raw projections, with everything its kernels can take over switched on."""
    import torch

    module, name = PEER_OPS[mixer]
    rule = getattr(import_module(f"{library}.ops.{module}"), name)

    def call() -> object:
        with torch.no_grad():
            gates = (x["b"].sigmoid(), x["w"].sigmoid()) if mixer == "gdn2" else (x["b"].sigmoid(),)
            return rule(
                x["q"], x["k"], x["v"], x["f"], *gates, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                A_log=raw.A_log, dt_bias=raw.dt_bias,
            )  # fmt: skip

    return call
