"""Models behind the three verbs of `evalsuite.types.Backend`. Nothing heavy is imported before a model is opened."""

from __future__ import annotations

import os

from evalsuite.names import quoted, suggest
from evalsuite.types import Backend
from gdn2 import zoo
from gdn2.errors import UserError


def names() -> dict[str, str]:
    """Models that go by a name, and what they are."""
    from evalsuite.backends.scripted import MODES

    shipped = dict.fromkeys(zoo.names(), "trained checkpoint, part of the package")
    return shipped | {f"scripted:{mode}": "no model: answers from a function, for trying a run" for mode in MODES}


def load(model: str, *, device: str = "auto", dtype: str | None = None, batch_tokens: int = 8192) -> Backend:
    """Open a model: a name of `names()`, or the directory of a checkpoint.

    Args:
        device: cpu, cuda or cuda:N; auto is the first GPU, else the CPU.
        dtype: float32, bfloat16 or float16; None is the device's default.
        batch_tokens: prompt tokens read at once; bounds memory, never changes an answer.

    Raises:
        UserError: no such model or device.
        CheckpointError: the checkpoint was refused.
    """
    if model.startswith("scripted:"):
        from evalsuite.backends import scripted

        return scripted.load(model)
    if model not in zoo.names() and not os.path.isdir(model):
        raise UserError(
            f"model {quoted(model)} is neither known nor the directory of a checkpoint; {suggest(model, names())}"
        )
    from evalsuite.backends import native

    return native.load(model, device=_resolved(device), dtype=dtype, batch_tokens=batch_tokens)


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
