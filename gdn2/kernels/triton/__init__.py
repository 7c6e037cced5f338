"""The GPU implementation: one family of Triton kernels for every mixer."""

import torch
from torch import Tensor


def refuse_fp64(*tensors: Tensor | None) -> None:
    """The kernels compute in fp32, which is not what fp64 inputs ask for.

    Raises:
        ValueError: an fp64 tensor.
    """
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise ValueError("the triton implementation takes float32, float16 or bfloat16, got torch.float64")
