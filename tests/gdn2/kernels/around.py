"""What the tests of the kernels around the operator share."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def u(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers between -0.5 and 0.5, in fp64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=rng, dtype=torch.float64) - 0.5


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; what is not finite fails."""
    assert got.isfinite().all() and got.shape == want.shape
    return float((got.detach().cpu().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30))
