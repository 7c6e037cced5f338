"""What the kernel benchmark runs around the operator: whole layer fronts, gates, norm and convolution.

Axes as in `evalsuite.bench.cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evalsuite.bench.cases import CHECKED_HEADS, PEER_OPS, Job, Setup, Shape, draw, operator_flops, size, worst

if TYPE_CHECKING:
    from torch import Tensor

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

    calls: dict[str, Callable[[], object]] = {"ours": lambda: with_implementation(setup.ours, raw)}
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


def gates(mixer: str, shape: Shape, setup: Setup) -> Job:
    """L2 norm and folded gates alone."""
    import torch

    from gdn2.kernels.layer import fold_gates

    raw, options = raw_of(draw(shape, mixer, setup), mixer, shape)

    def call(name: Any, raw: Raw) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(t for t in fold_gates(raw, options, name) if t is not None)

    calls: dict[str, Callable[[], object]] = {"ours": lambda: call(setup.ours, raw)}
    if setup.ours != "torch":
        calls["torch"] = lambda: call("torch", raw)
    moved = sum(size(t) for t in raw if t is not None) + sum(size(t) for t in call(setup.ours, raw))
    return Job(
        "gates", mixer, shape, calls,
        lambda: worst(call(setup.ours, raw), call("torch", first_heads(raw)), setup.dtype), moved, 0,
    )  # fmt: skip


def norm(shape: Shape, setup: Setup) -> Job:
    """RMSNorm times the gated output."""
    import torch

    from gdn2.kernels.layer import gated_norm

    x = draw(shape, "gdn2", setup)
    o, gate, weight = x["v"].flatten(0, 1), x["w"].flatten(0, 1), torch.rand(shape.width, device=setup.device)

    def call(name: Any, o: Tensor, gate: Tensor) -> Tensor:
        with torch.no_grad():
            return gated_norm(o, gate, weight, 1e-5, "silu", name)

    calls: dict[str, Callable[[], object]] = {"ours": lambda: call(setup.ours, o, gate)}
    if setup.ours != "torch":
        calls["torch"] = lambda: call("torch", o, gate)
    if setup.peer is not None:
        theirs = import_module(f"{setup.peer.__name__}.modules.norm.fused_norm_gate").rms_norm_gated
        calls["fla"] = lambda: theirs(o, gate, weight, None, eps=1e-5)

    def check() -> tuple[float, float]:
        few = (t[:, :CHECKED_HEADS].double() for t in (o, gate))
        return worst([calls["ours"]()], [call("torch", *few)], setup.dtype)

    return Job("norm", "any", shape, calls, check, 3 * size(o), 0)


def convolution(shape: Shape, setup: Setup) -> Job:
    """Short convolution and SiLU of one projection."""
    import torch

    from gdn2.mixers.conv import short_conv
    from gdn2.ragged import Ragged

    channels = shape.heads * shape.width
    x = draw(shape, "gdn2", setup)["v"].reshape(-1, channels)
    weight = torch.rand(channels, 4, device=setup.device).to(setup.dtype) - 0.5
    window = torch.zeros(shape.batch, channels, 3, device=setup.device, dtype=setup.dtype)
    ragged = Ragged([shape.tokens] * shape.batch, setup.device)

    def plain(x: Tensor, weight: Tensor, window: Tensor) -> Tensor:
        with torch.no_grad():
            return short_conv(x, weight, None, window, ragged)[0]

    calls: dict[str, Callable[[], object]] = {"ours": lambda: plain(x, weight, window)}
    if setup.ours == "triton":
        from gdn2.kernels.triton import prologue

        calls["ours"] = lambda: prologue.short_conv(x, weight, None, window, ragged)[0]
        calls["torch"] = lambda: plain(x, weight, window)
    if setup.peer is not None:
        theirs = import_module(f"{setup.peer.__name__}.modules.causal_conv1d.ops").causal_conv1d
        rows = x.reshape(shape.batch, shape.tokens, channels)
        calls["fla"] = lambda: theirs(rows, weight, activation="silu")

    def check() -> tuple[float, float]:
        some = slice(0, 64)
        want = plain(x[:, some].double(), weight[some].double(), window[:, some].double())
        return worst([calls["ours"]()], [want], setup.dtype)

    return Job("convolution", "any", shape, calls, check, 2 * size(x), 0)


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
