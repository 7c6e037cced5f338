"""Elementwise functions whose result depends on the element alone.

On a CPU torch's own sigmoid, silu and softplus take another code path for the last few elements of a tensor, so the
same number gives another last bit at another place. Without gradients these versions are used instead: they are made
of operations that round alike everywhere.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F


def _plain(x: Tensor) -> bool:
    return x.is_cuda or torch.is_grad_enabled()


def _compiled(x: Tensor) -> ModuleType | None:
    """The compiled loops, where they serve `x`."""
    if x.is_cuda or x.dtype != torch.float32 or torch.is_grad_enabled():
        return None
    from gdn2.kernels import numba

    return numba if numba.available() else None


def _fused(x: Tensor) -> ModuleType | None:
    """One kernel or loop for several operations, where there is one for `x`."""
    if not x.is_cuda or x.dtype == torch.float64 or torch.is_grad_enabled():
        return _compiled(x)
    from gdn2.kernels.dispatch import choose

    if choose(x.device, None, x.dtype) != "triton":
        return None
    from gdn2.kernels.triton import rows

    return rows


def sigmoid(x: Tensor) -> Tensor:
    if loops := _compiled(x):
        return loops.activation(x, "sigmoid")
    return x.sigmoid() if _plain(x) else 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    if loops := _compiled(x):
        return loops.activation(x, "silu")
    return F.silu(x) if _plain(x) else x / (1.0 + torch.exp(-x))


def silu_times(x: Tensor, by: Tensor) -> Tensor:
    """silu(x) * by, for two tensors of one shape."""
    if (fused := _fused(x)) and x.dtype == by.dtype:
        return fused.silu_times(x, by)
    return silu(x) * by


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact to rounding also where e^x is tiny (a decay of 1e-8 a token must survive)."""
    if loops := _compiled(x):
        return loops.activation(x, "softplus")
    if _plain(x):
        return F.softplus(x)
    small = torch.exp(-x.abs())
    u = 1.0 + small
    log1p = torch.where(u == 1.0, small, torch.log(u) * (small / (u - 1.0)))
    return x.clamp_min(0.0) + log1p


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, returned in x's dtype."""
    if fused := _fused(x):
        return fused.rms_norm(x, weight, eps)
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, in fp32, returned in x's dtype."""
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
