"""Where tensors come from: safetensors files, or pickled weights behind an explicit permission.

A source lists its tensors from headers alone and reads one at a time.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor

from gdn2.checkpoints.safe import MAX_TENSORS, SafeFile, TensorInfo, inside, read_json, shown
from gdn2.errors import CheckpointError

WRAPPERS = ("_forward_module.", "module.", "_orig_mod.")  # prefixes that training wrappers put before every name
MAX_SHARDS = 4096


class Source(Protocol):
    """Named tensors of one checkpoint."""

    where: Path  # for messages
    files: tuple[Path, ...]  # what it is read from

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What there is, from headers."""

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, contiguous."""


class SafetensorsSource:
    """One safetensors file, or the shards of an index."""

    def __init__(self, where: Path, files: tuple[Path, ...], stack: ExitStack) -> None:
        self.where, self.files = where, files
        self.tensors: dict[str, TensorInfo] = {}
        self._owner: dict[str, SafeFile] = {}
        for path in files:
            file = stack.enter_context(SafeFile(path))
            for name, info in file.tensors.items():
                if name in self._owner:
                    raise CheckpointError(f"{path} and {self._owner[name].path} both hold tensor {shown(name)}")
                self.tensors[name], self._owner[name] = info, file
        if len(self.tensors) > MAX_TENSORS:
            raise CheckpointError(f"{where}: {len(self.tensors)} tensors, at most {MAX_TENSORS} are read")

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name)


class PickleSource:
    """Tensors of `.pth` or `.bin` files, read by torch with weights_only and mapped, never executed."""

    def __init__(self, where: Path, files: tuple[Path, ...]) -> None:
        self.where, self.files = where, files
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            self._tensors.update(_unpickle(path))
        self.tensors = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


def _unpickle(path: Path) -> dict[str, Tensor]:
    _check_zip(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} holds more than plain weights or is damaged: {reason}") from error
    data = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not data or not all(isinstance(n, str) for n in data):
        raise CheckpointError(f"{path} does not hold named tensors")
    tensors = {}
    for full, tensor in data.items():
        name = full
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        tensors[name] = _check_tensor(path, name, tensor)
    if len(tensors) != len(data):
        raise CheckpointError(f"{path} holds the same tensor under two wrapped names")
    return tensors


def _check_zip(path: Path) -> None:
    """Refuse archives that unpack to more than they are: torch stores its members uncompressed."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path} is not a torch checkpoint (or one from before 2020): {error}") from error
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{path}: member {shown(packed[0])} is compressed, which torch never does")
    if (total := sum(m.file_size for m in members)) > size:
        raise CheckpointError(f"{path} claims {total} bytes in a file of {size}")


def _check_tensor(path: Path, name: str, tensor: object) -> Tensor:
    what = f"{path}: {shown(name)}"
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{what} is not a plain tensor")
    if tensor.numel() == 0:
        raise CheckpointError(f"{what} is empty: shape {list(tensor.shape)}")
    needed = math.prod(tensor.shape) * tensor.element_size()
    if needed > tensor.untyped_storage().nbytes() or 0 in [
        s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
    ]:
        raise CheckpointError(f"{what} of shape {list(tensor.shape)} needs {needed} bytes, more than the file holds")
    return tensor


def find_weights(path: Path) -> tuple[str, tuple[Path, ...]]:
    """("safetensors" or "pickle", files) of a checkpoint file or directory; safetensors are preferred.

    Raises:
        CheckpointError: no weights there, or an index that names files it should not.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors", (path,)
        if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            return "pickle", (path,)
        raise CheckpointError(f"{path} is neither .safetensors nor .pth, .pt, .bin or .ckpt")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    for kind, whole in (("safetensors", "model.safetensors"), ("pickle", "pytorch_model.bin")):
        if (path / whole).exists() or (path / whole).is_symlink():
            return kind, (inside(path, path / whole),)
        if (index := path / f"{whole}.index.json").exists():
            return kind, tuple(inside(path, path / name) for name in shard_names(index))
    for kind, pattern in (("safetensors", "*.safetensors"), ("pickle", "*.pth")):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return kind, (inside(path, found[0]),)
        if found:
            raise CheckpointError(f"{path} holds {len(found)} files {pattern} and no index: name the one to load")
    raise CheckpointError(f"{path} holds no weights (model.safetensors, pytorch_model.bin or an index of either)")


def shard_names(index: Path) -> list[str]:
    """The files that an index spreads the tensors over, each a plain name beside it.

    Raises:
        CheckpointError: it is not such an index.
    """
    weight_map = read_json(inside(index.parent, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index} names {len(names)} files, at most {MAX_SHARDS} are read")
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]{0,200}\.(safetensors|bin)", name):
            raise CheckpointError(f"{index} names {shown(name)}, which is not a file beside it")
    return names


def open_source(path: Path, stack: ExitStack, *, allow_pickle: bool) -> Source:
    """The weights at `path`, open as long as `stack` is.

    Raises:
        CheckpointError: nothing there, damaged, or pickled weights without permission.
    """
    kind, files = find_weights(path)
    if kind == "safetensors":
        source = SafetensorsSource(path, files, stack)
        index = path / "model.safetensors.index.json"
        if len(files) > 1 and (listed := set(read_json(index)["weight_map"])) != set(source.tensors):
            odd = sorted(listed ^ set(source.tensors))
            raise CheckpointError(f"{index} and its files disagree about {len(odd)} tensors, first {shown(odd[0])}")
        return source
    if not allow_pickle:
        raise CheckpointError(
            f"{files[0]} is a pickle, which can run code: convert it to safetensors, or pass --allow-pickle-weights"
            " if you trust its author"
        )
    return PickleSource(path, files)
