"""Where there is no GPU, Triton kernels run interpreted. Triton reads the switch when a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
