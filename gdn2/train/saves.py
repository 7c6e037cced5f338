"""Saves of a running training: what an interrupted run needs to go on bit for bit.

A save is a directory `step-N` of safetensors and JSON, renamed into place when it is complete; older ones are then
removed. A kill at any moment leaves the newest complete one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdn2.errors import CheckpointError, StorageError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write `root/step-N` and remove the older ones. Raises StorageError."""
    name = f"step-{step:08d}"
    temporary, final = root / f".{name}", root / name
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}, temporary / MODEL)
        save_file(_moments(model, optimizer), temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(root)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error.strerror}") from error
    for path in found(root)[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def found(root: Path) -> list[Path]:
    """The complete saves, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state of a save. Raises CheckpointError."""
    try:
        return dict(json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / STATE} cannot be read: {error}") from error


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of a save into model and optimiser. Raises CheckpointError."""
    try:
        weights, moments = load_file(path / MODEL), load_file(path / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    named = dict(model.named_parameters())
    if set(weights) != set(named) or any(weights[n].shape != p.shape for n, p in named.items()):
        raise CheckpointError(f"{path / MODEL} does not fit the model of the configuration")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            keys = [key for key in moments if key.rsplit("/", 1)[0] == name]
            device = {"step": parameter.device if optimizer.defaults.get("fused") else "cpu"}
            optimizer.state[parameter] = {
                (key := full.rsplit("/", 1)[1]): moments[full].to(device.get(key, parameter.device)) for full in keys
            }


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
