"""Without a GPU kernels run interpreted (Triton reads the switch when a kernel is defined); memory is poisoned."""

import os

import pytest
import torch

from tests.gdn2.kernels.memory import poisoned

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """torch says so when the first product of a thread, here autograd's, finds no context yet."""
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output a kernel forgot to write shows up as NaN."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
