"""Each mixer's equations once more, token by token in fp64 with torch's own functions: independent of the package.

Axes: T tokens, D model width, H key heads, Hv value heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn2.mixers import Mixer


class Weights:
    """The parameters of a mixer in fp64, by name."""

    def __init__(self, mixer: Mixer) -> None:
        self.by_name = {name: p.detach().double() for name, p in mixer.named_parameters()}

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def linear(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = F.linear(x, self.by_name[f"{name}.weight"], self.by_name.get(f"{name}.bias"))
        return x

    def conv(self, x: Tensor, name: str) -> Tensor:
        """Causal depthwise convolution of x [T, C] with whatever taps and bias there are."""
        weight = self.by_name[f"{name}.weight"]
        padded = F.pad(x.T, (weight.shape[-1] - 1, 0))[None]
        return F.conv1d(padded, weight, self.by_name.get(f"{name}.bias"), groups=x.shape[1])[0].T


def normed(o: Tensor, weight: Tensor, eps: float) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_loop(q: Tensor, k: Tensor, e: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Outputs [T, Hv, V]; all inputs per value head, g [T, Hv, K] or [T, Hv, 1]."""
    state = torch.zeros(*k.shape[1:], z.shape[-1], dtype=torch.float64)
    out = []
    for t in range(q.shape[0]):
        state = g[t].exp()[..., None] * state
        recalled = torch.einsum("hkv,hk->hv", state, e[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], z[t] - recalled)
        out.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(out)


def delta_family(name: str, mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """GDN-2, KDA, Gated DeltaNet and DeltaNet on tokens x [T, D] in fp64: y [T, D]."""
    w, heads, width = Weights(mixer), options["n_heads"], options["d_key"]
    value_heads = options.get("n_value_heads") or heads
    group = value_heads // heads
    q, k, v = (F.silu(w.conv(w.linear(x, f"{n}_proj"), f"{n}_conv1d")) for n in "qkv")
    q = (unit(q.unflatten(-1, (heads, -1))) * width**-0.5).repeat_interleave(group, 1)
    k = unit(k.unflatten(-1, (heads, -1))).repeat_interleave(group, 1)
    v = v.unflatten(-1, (value_heads, -1))
    top = options.get("beta_max", options.get("erase_max", 1))
    if name == "gdn2":
        erase = top * w.linear(x, "b_proj").sigmoid().unflatten(-1, (heads, -1)).repeat_interleave(group, 1)
        write = w.linear(x, "w_proj").sigmoid().unflatten(-1, (value_heads, -1))
    else:
        erase = write = top * w.linear(x, "b_proj").sigmoid()[..., None]
    if name == "gdn2":
        f = F.softplus(w.linear(x, "f_proj.0", "f_proj.1") + w["dt_bias"]).unflatten(-1, (heads, -1))
        g = (-w["A_log"].exp()[:, None] * f).repeat_interleave(group, 1)
    elif name == "kda":
        f = (w.linear(x, "f_proj.0", "f_proj.1") + w["dt_bias"]).unflatten(-1, (value_heads, -1))
        rate = w["A_log"].exp()[:, None]
        bound = options.get("lower_bound")
        g = -rate * F.softplus(f) if bound is None else bound * torch.sigmoid(rate * f)
    elif name == "gdn":
        g = (-w["A_log"].exp() * F.softplus(w.linear(x, "a_proj") + w["dt_bias"]))[..., None]
    else:
        g = torch.zeros(x.shape[0], heads, 1, dtype=torch.float64)
    o = delta_loop(q, k, erase * k, write * v, g)
    y = normed(o, w["o_norm.weight"], options.get("norm_eps", 1e-5)).flatten(1)
    if name == "gdn":
        gate = w.linear(x, "g_proj")
        y = y * (torch.sigmoid(gate) if options.get("gate") == "sigmoid" else F.silu(gate))
    elif name != "deltanet":
        gate = w.linear(x, "g_proj.0", "g_proj.1")
        y = y * (F.silu(gate) if name == "gdn2" and options.get("gate") != "sigmoid" else torch.sigmoid(gate))
    return w.linear(y, "o_proj")


def turned(x: Tensor, rotary: int, base: float) -> Tensor:
    """x [T, heads, d] with channel i of the first `rotary` turned against channel i + rotary/2 as complex numbers."""
    half = rotary // 2
    at = torch.arange(x.shape[0], dtype=torch.float64)[:, None]
    angle = at / base ** (torch.arange(half, dtype=torch.float64) * 2 / max(rotary, 1))
    pairs = torch.complex(x[..., :half], x[..., half:rotary]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([pairs.real, pairs.imag, x[..., rotary:]], -1)


def attention(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Softmax attention on tokens x [T, D] in fp64, query by query: y [T, D]."""
    w, heads, width = Weights(mixer), options["n_heads"], options["d_head"]
    kv_heads = options.get("n_kv_heads") or heads
    projected = [w.linear(x, f"{n}_proj") for n in "qkv"]
    if options.get("conv_taps"):
        projected = [w.conv(p, f"{n}_conv1d") for p, n in zip(projected, "qkv", strict=True)]
    norm = options.get("qk_norm", "none")
    if norm == "all":
        projected[:2] = [normed(p, w[f"{n}_norm.weight"], 1e-6) for p, n in zip(projected[:2], "qk", strict=True)]
    q, k, v = (p.unflatten(-1, (-1, width)) for p in projected)
    if norm == "head":
        q, k = normed(q, w["q_norm.weight"], 1e-6), normed(k, w["k_norm.weight"], 1e-6)
    rotary = options.get("rotary")
    rotary = width if rotary is None else rotary
    q, k = (turned(p, rotary, options.get("rotary_base", 1e4)) for p in (q, k))
    k, v = (p.repeat_interleave(heads // kv_heads, 1) for p in (k, v))
    out = []
    for t in range(x.shape[0]):
        first = max(0, t + 1 - (options.get("window") or t + 1))
        scores = torch.einsum("hd,shd->hs", q[t], k[first : t + 1]) / width**0.5
        out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[first : t + 1]))
    y = torch.stack(out).flatten(1)
    if options.get("gate"):
        y = y * w.linear(x, "g_proj").sigmoid()
    return w.linear(y, "o_proj")



def mla(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Latent attention on tokens x [T, D] with every key and value written out: y [T, D]."""
    w, heads, own, shared = Weights(mixer), options["n_heads"], options["d_key"], options["d_shared"]
    q = w.linear(x, "q_proj").unflatten(-1, (heads, -1))
    latent, common = w.linear(x, "kv_a_proj_with_mqa").split([options["d_latent"], shared], -1)
    latent = normed(latent, w["kv_a_layernorm.weight"], options.get("norm_eps", 1e-6))
    k, v = w.linear(latent, "kv_b_proj").unflatten(-1, (heads, -1)).split([own, options["d_value"]], -1)
    k = torch.cat([k, common[:, None].expand(-1, heads, -1)], -1)
    scores = torch.einsum("thd,shd->hts", q, k) / (own + shared) ** 0.5
    later = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return w.linear(torch.einsum("hts,shd->thd", weights, v).flatten(1), "o_proj")



def mamba1(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Mamba-1 on tokens x [T, D]: y [T, D]."""
    w, inner, states = Weights(mixer), options["d_inner"], options["d_state"]
    u, z = w.linear(x, "in_proj").chunk(2, -1)
    u = F.silu(w.conv(u, "conv1d"))
    rank = options.get("dt_rank") or -(-x.shape[1] // 16)
    dt, b, c = w.linear(u, "x_proj").split([rank, states, states], -1)
    dt, a = F.softplus(w.linear(dt, "dt_proj")), -w["A_log"].exp()
    memory, out = torch.zeros(inner, states, dtype=torch.float64), []
    for t in range(x.shape[0]):
        memory = (a * dt[t, :, None]).exp() * memory + torch.outer(dt[t] * u[t], b[t])
        out.append(memory @ c[t] + w["D"] * u[t])
    return w.linear(torch.stack(out) * F.silu(z), "out_proj")


def mamba2(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Mamba-2 on tokens x [T, D] in fp64, token by token: y [T, D]."""
    w, heads, width, states = Weights(mixer), options["n_heads"], options["d_head"], options["d_state"]
    groups = options.get("n_groups", 1)
    inner, shared = heads * width, groups * states
    z, u, dt = w.linear(x, "in_proj").split([inner, inner + 2 * shared, heads], -1)
    u = F.silu(w.conv(u, "conv1d"))
    v, b, c = u.split([inner, shared, shared], -1)
    v, b, c = v.unflatten(-1, (heads, width)), b.unflatten(-1, (groups, states)), c.unflatten(-1, (groups, states))
    dt = F.softplus(dt + w["dt_bias"])
    if options.get("dt_limit"):
        dt = dt.clamp(*options["dt_limit"])
    states_of_heads = [torch.zeros(width, states, dtype=torch.float64)] * heads
    out = []
    for t in range(x.shape[0]):
        row = []
        for h in range(heads):
            g = h * groups // heads
            kept = torch.exp(-w["A_log"][h].exp() * dt[t, h]) * states_of_heads[h]
            states_of_heads[h] = kept + dt[t, h] * torch.outer(v[t, h], b[t, g])
            row.append(states_of_heads[h] @ c[t, g] + w["D"][h] * v[t, h])
        out.append(torch.cat(row))
    y = torch.stack(out)
    if not options.get("norm", True):
        return w.linear(y * F.silu(z), "out_proj")
    y = y if options.get("norm_before_gate") else y * F.silu(z)
    parts = options.get("norm_groups") or groups
    y = normed(y.unflatten(-1, (parts, -1)), w["norm.weight"].view(parts, -1), 1e-5).flatten(-2)
    return w.linear(y * F.silu(z) if options.get("norm_before_gate") else y, "out_proj")


def mamba3(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Mamba-3 on tokens x [T, D] in fp64, token by token with a running angle: y [T, D]."""
    w, heads, width, states = Weights(mixer), options["n_heads"], options["d_head"], options["d_state"]
    groups, rank = options.get("n_groups", 1), options.get("rank") or 1
    mimo = options.get("rank") is not None
    pairs = int(states * options.get("rope_fraction", 0.5)) // 2
    shared, inner = states * groups * rank, heads * width
    halves = (options.get("pairing") or ("halves" if mimo else "neighbours")) == "halves"
    first = torch.arange(pairs) if halves else 2 * torch.arange(pairs)
    second = first + (states // 2 if halves else 1)
    parts = w.linear(x, "in_proj").split([inner, inner, shared, shared, heads, heads, heads, pairs], -1)
    z, v, b, c, dd_dt, dd_a, trap, angle = parts
    one = torch.ones(heads, 1, width, dtype=torch.float64)
    mimo_x, mimo_z, mimo_o = (w[f"mimo_{n}"] if mimo else one for n in "xzo")
    state = torch.zeros(heads, states, width, dtype=torch.float64)
    theta, k_last, v_last = torch.zeros(heads, pairs, dtype=torch.float64), None, None

    def key(row: Tensor, name: str) -> Tensor:
        row = normed(row.view(rank, groups, states), w[f"{name}_norm.weight"], 1e-5)
        row = torch.stack([row[:, h * groups // heads] for h in range(heads)]) + w[f"{name}_bias"]  # [H, R, K]
        turned = row.clone()
        cos, sin = theta.cos()[:, None], theta.sin()[:, None]
        turned[..., first] = cos * row[..., first] - sin * row[..., second]
        turned[..., second] = sin * row[..., first] + cos * row[..., second]
        return turned

    out = []
    for t in range(x.shape[0]):
        dt = F.softplus(dd_dt[t] + w["dt_bias"])
        if options.get("a_activation") == "heavy_tail":
            a = torch.where(dd_a[t] >= 0, 1 + dd_a[t], 1 / (1 - dd_a[t]))
        else:
            a = F.softplus(dd_a[t])
        alpha = torch.exp(-a.clamp_min(1e-4) * dt)[:, None, None]
        mix = torch.sigmoid(trap[t])
        theta = theta + dt[:, None] * torch.pi * torch.tanh(angle[t])
        k, q, now = key(b[t], "B"), key(c[t], "C"), v[t].view(heads, 1, width) * mimo_x
        state = alpha * state
        if k_last is not None:
            back = ((1 - mix) * dt)[:, None, None] * alpha
            state = state + back * torch.einsum("hrk,hrv->hkv", k_last, v_last)
        state = state + (mix * dt)[:, None, None] * torch.einsum("hrk,hrv->hkv", k, now)
        k_last, v_last = k, now
        y = torch.einsum("hkv,hrk->hrv", state, q) + w["D"][:, None, None] * now
        if options.get("out_norm"):
            y = normed(y, w["norm.weight"].view(heads, 1, width), 1e-5)
        y = (mimo_o * y * F.silu(z[t].view(heads, 1, width) * mimo_z)).sum(1)
        out.append(y.flatten())
    return w.linear(torch.stack(out), "out_proj")
