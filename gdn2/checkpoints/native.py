"""Our own checkpoint: a directory of model.safetensors, config.json, tokenizer.json, and checksums.json over the three.

Tensor names are the module's own. Nothing in a checkpoint is executed: sizes, names and shapes are checked against the
configuration before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gdn2.checkpoints import safe
from gdn2.errors import CheckpointError, StorageError
from gdn2.models import Decoder, ModelConfig

FORMAT, VERSION = "gdn2-eval", 1
WEIGHTS, CONFIG, TOKENIZER, CHECKSUMS = "model.safetensors", "config.json", "tokenizer.json", "checksums.json"


@dataclass(frozen=True)
class Header:
    """What config.json says, checked but without weights."""

    path: Path
    config: ModelConfig
    extra: Mapping[str, Any]  # how it was trained; shown, never interpreted
    checksums: Mapping[str, str]  # file -> sha256

    @property
    def digest(self) -> str:
        """sha256 over weights and configuration: what makes two checkpoints the same model."""
        model = self.config.to_dict()
        del model["name"]
        text = json.dumps([self.checksums[WEIGHTS], model], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def save(path: Path, model: Decoder, tokenizer_json: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint directory in one step: it is complete or it is not there.

    Raises:
        StorageError: the disk is full or the path may not be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    try:
        tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, temporary / WEIGHTS)
        text = {"format": FORMAT, "version": VERSION, "model": model.config.to_dict(), "extra": dict(extra or {})}
        (temporary / CONFIG).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer_json, temporary / TOKENIZER)
        sums = {name: file_digest(temporary / name) for name in (CONFIG, WEIGHTS, TOKENIZER)}
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        _swap(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_native(path: Path) -> bool:
    """Whether `path` looks like one of our checkpoint directories."""
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_header(path: Path) -> Header:
    """Read and check everything but the weights.

    Raises:
        CheckpointError: a file is missing or malformed, or was written by a newer version.
    """
    path = Path(path)
    data, sums = safe.read_json(path / CONFIG), safe.read_json(path / CHECKSUMS)
    if data.get("format") != FORMAT or not isinstance(data.get("version"), int):
        raise CheckpointError(f"{path / CONFIG} is not a {FORMAT} configuration")
    if data["version"] > VERSION:
        raise CheckpointError(f"{path} has format version {data['version']}; this program reads up to {VERSION}")
    try:
        config = ModelConfig.from_dict(data.get("model", {}))
        _on_meta(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    if missing := [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not isinstance(sums.get(name), str)]:
        raise CheckpointError(f"{path / CHECKSUMS} has no sha256 of {missing[0]}")
    return Header(path, config, data.get("extra", {}), sums)


def load(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Decoder, Header]:
    """Load a checkpoint for evaluation.

    Args:
        path: the directory.
        device: where the model goes.
        dtype: of the parameters (rates of decay stay fp32); None keeps the stored one.

    Raises:
        CheckpointError: files that do not match their checksums, or tensors that do not match the configuration.
    """
    header = read_header(path)
    for name, wanted in header.checksums.items():
        if not (header.path / name).is_file():
            raise CheckpointError(f"{header.path / name} is missing")
        if file_digest(header.path / name) != wanted:
            raise CheckpointError(f"{header.path / name} does not match its sha256 in {CHECKSUMS}: damaged or changed")
    model = _on_meta(header.config)
    with safe.SafeFile(header.path / WEIGHTS) as file:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        safe.refuse_mismatches(file.path, safe.mismatches(file.tensors, shapes))
        model.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tensor = file.read(name)
                safe.check_values(file.path, name, tensor)
                parameter.data = tensor.to(device)
    if dtype is not None:
        model.cast(dtype)
    return model.eval().requires_grad_(False), header


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, path: Path) -> None:
    """Put directory `new` at `path`; an older one there is removed after the new one is in place."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)
