"""Our operator behind fla's function signatures, so that fla's own test files can be pointed at it (see plugin.py).

Axes: B batch, T tokens, N sequences, H key heads, HV value heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2.kernels import Implementation, delta_rule, delta_tokens
from gdn2.numerics import l2_norm, sigmoid, softplus

CHUNK = 64


@dataclass
class Call:
    """One call, gates folded in: q, k [B, T, H, K]; e, g per head; z [B, T, HV, V]."""

    q: Tensor
    k: Tensor
    e: Tensor
    z: Tensor
    g: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def implementation(self) -> Implementation | None:
        return "triton" if self.q.is_cuda else None


def folded(
    q: Tensor, k: Tensor, e: Tensor, z: Tensor, g: Tensor | None, scale: float | None, normalise: bool,
    state: Tensor | None, cu_seqlens: Tensor | None, state_v_first: bool,
) -> Call:  # fmt: skip
    """`e` is still the erase gate [B, T, heads, K or 1], applied here to the finished key; `z` is the product."""
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {q.shape[0]}")
    q, k = (l2_norm(q), l2_norm(k)) if normalise else (q, k)
    wide = k if e.shape[2] == k.shape[2] else k.repeat_interleave(e.shape[2] // k.shape[2], dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if state is not None and state_v_first:
        state = state.transpose(-1, -2)
    return Call(q * scale, k, (e * wide).to(k.dtype), z, None if g is None else g.float(), state, cu_seqlens)


def decay(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Log-decay from its logits g [B, T, heads, K] or [B, T, heads]."""
    x = g.float() if dt_bias is None else g.float() + dt_bias.float().reshape(g.shape[2:])
    if A_log is None and lower_bound is None:
        raise ValueError("A_log must be given where the gate is activated inside, unless lower_bound is set")
    rate = torch.ones(()) if A_log is None else A_log.float().exp().reshape(-1, *[1] * (g.ndim - 3))
    rate = rate.to(g.device)
    return -rate * softplus(x) if lower_bound is None else lower_bound * sigmoid(rate * x)


def chunks(call: Call, output_final_state: bool, intermediate: bool, state_v_first: bool) -> tuple[Tensor | None, ...]:
    """Run the chunk form: (o, final state or None) and, if asked for, the states before every 64 rows."""
    o, last = delta_rule(
        call.q, call.k, call.e, call.z, call.g, call.state, call.cu_seqlens, implementation=call.implementation
    )
    last = last.transpose(-1, -2) if state_v_first else last
    out = (o, last if output_final_state else None)
    return (*out, states_before_chunks(call, state_v_first)) if intermediate else out


def states_before_chunks(call: Call, state_v_first: bool) -> Tensor:
    """[B, NT, HV, K, V]; packed sequences one after the other."""
    if not torch.is_inference_mode_enabled():
        raise ValueError("intermediate states are returned in inference mode only")
    b, t = call.q.shape[:2]
    bounds = [0, t] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    shape = (b, call.z.shape[2], call.k.shape[-1], call.z.shape[-1])
    found = []
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = call.z.new_zeros(shape, dtype=torch.float32)
        if call.state is not None:
            state = call.state.float() if call.cu_seqlens is None else call.state[n : n + 1].float()
        for at in range(begin, end, CHUNK):
            found.append(state)
            rows = slice(at, min(at + CHUNK, end))
            g = None if call.g is None else call.g[:, rows]
            _, state = delta_rule(
                call.q[:, rows], call.k[:, rows], call.e[:, rows], call.z[:, rows], g, state,
                implementation=call.implementation,
            )  # fmt: skip
    h = torch.stack(found, 1)
    return h.transpose(-1, -2) if state_v_first else h


def refuse(cp_context: object, chunk_size: int, sizes: tuple[int, ...]) -> None:
    if cp_context is not None:
        raise ValueError("context parallelism is not part of this operator")
    if chunk_size not in sizes:
        raise ValueError(f"chunk_size must be one of {sizes}, got {chunk_size}")


def bounded(safe_gate: bool, use_gate_in_kernel: bool, lower_bound: float | None) -> None:
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound must be in [-5, 0) with safe_gate, got {lower_bound}")


def chunk_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False, lower_bound: float | None = None, disable_recompute: bool = False,
    return_intermediate_states: bool = False, state_v_first: bool = False, cp_context: object = None,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None, chunk_size: int = CHUNK,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """GDN-2: q, k, g, b [B, T, H, K]; v, w [B, T, H, V]. Our kernels need none of the switches for speed or memory."""
    refuse(cp_context, chunk_size, (CHUNK,))
    bounded(safe_gate, use_gate_in_kernel, lower_bound)
    g = decay(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    call = folded(q, k, b, w * v, g, scale, use_qk_l2norm_in_kernel, initial_state, cu_seqlens, state_v_first)
    return chunks(call, output_final_state, return_intermediate_states, state_v_first)


def fused_recurrent_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    lower_bound: float | None = None, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The same token by token, without gradients; value heads may be a multiple of key heads."""
    g = decay(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    call = folded(q, k, b, w * v, g, scale, use_qk_l2norm_in_kernel, initial_state, cu_seqlens, state_v_first)
    batch, t = q.shape[:2]
    bounds = torch.arange(batch + 1, device=q.device) * t if cu_seqlens is None else cu_seqlens
    shape = (bounds.shape[0] - 1, call.z.shape[2], call.k.shape[-1], call.z.shape[-1])
    state = call.z.new_zeros(shape, dtype=torch.float32)
    if call.state is not None:
        state.copy_(call.state)
    with torch.no_grad():
        rows = [None if x is None else x.flatten(0, 1) for x in (call.q, call.k, call.e, call.z, call.g)]
        assert rows[0] is not None and rows[1] is not None and rows[3] is not None
        o = delta_tokens(
            rows[0], rows[1], rows[2], rows[3], rows[4], state, bounds, implementation=call.implementation
        )
    last = state.transpose(-1, -2) if state_v_first else state
    return o.unflatten(0, (batch, t)), last if output_final_state else None


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    safe_gate: bool = False, lower_bound: float | None = None, disable_recompute: bool = False,
    return_intermediate_states: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, cp_context: object = None, use_graph: bool = False,
    max_num_seqs: int | None = None, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """KDA: q, k [B, T, H, K]; g [B, T, HV, K]; v [B, T, HV, V]; beta [B, T, HV]."""
    refuse(cp_context, chunk_size, (32, CHUNK))
    bounded(safe_gate, use_gate_in_kernel, lower_bound)
    if use_graph:
        raise ValueError("use_graph is not supported")
    beta = activated(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    g = decay(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    z = (beta[..., None] * v).to(v.dtype)
    call = folded(
        q, k, beta[..., None], z, g, scale, use_qk_l2norm_in_kernel, initial_state, cu_seqlens, state_v_first
    )
    return chunks(call, output_final_state, return_intermediate_states, state_v_first)


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
    cp_context: object = None, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, chunk_size: int = CHUNK,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gated DeltaNet: q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV]."""
    refuse(cp_context, chunk_size, (16, 32, CHUNK))
    beta = activated(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    g = decay(g, A_log, dt_bias, None) if use_gate_in_kernel and g is not None else g
    z = (beta[..., None] * v).to(v.dtype)
    call = folded(
        q, k, beta[..., None], z, g, scale, use_qk_l2norm_in_kernel, initial_state, cu_seqlens, state_v_first
    )
    return chunks(call, output_final_state, False, state_v_first)


def activated(beta: Tensor, use_sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError("allow_neg_eigval needs use_beta_sigmoid_in_kernel")
    return sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0) if use_sigmoid else beta


REPLACED = {
    "fla.ops.gdn2": (chunk_gdn2, fused_recurrent_gdn2),
    "fla.ops.kda": (chunk_kda,),
    "fla.ops.gated_delta_rule": (chunk_gated_delta_rule,),
}

