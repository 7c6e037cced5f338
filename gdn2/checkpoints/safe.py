"""Reading files that strangers wrote: every size, name, type and shape is checked before memory is taken.

A safetensors file is 8 bytes (header length, little-endian), a JSON header, and the tensors' bytes end to end. The
header is parsed here, stricter than the format asks: duplicate names, holes, overlaps, trailing bytes, empty tensors
and oversized headers are refused. Tensors are read through the same open file, never mapped, so that a file cut short
meanwhile is an error and not a crash.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn2.errors import CheckpointError

MAX_HEADER = 8 << 20  # bytes
MAX_JSON = 16 << 20  # bytes
MAX_TENSORS = 50_000
MAX_AXES = 8
MAX_NAME = 512
SHOWN = 5  # mismatches spelled out in one message

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Shape = tuple[int, ...]


class TensorInfo(NamedTuple):
    """What a header says of one tensor. `begin` counts bytes from the end of the header."""

    dtype: torch.dtype
    shape: Shape
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafeFile:
    """An open safetensors file whose header has been checked against its size.

    Raises:
        CheckpointError: the file is missing, damaged, or not safetensors; the message says where.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._data, self.tensors = _read_header(self.path, self._file.read, size)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""
        info = self.tensors[name]
        buffer = bytearray(info.nbytes)
        self._file.seek(self._data + info.begin)
        view = memoryview(buffer)
        done = 0
        while done < info.nbytes:
            got = self._file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{self.path} ended inside tensor {name}: it changed while it was read")
            done += got
        return torch.frombuffer(buffer, dtype=info.dtype).reshape(info.shape)

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The checked header of a safetensors file, without its tensors."""
    with SafeFile(path) as file:
        return file.tensors


def _read_header(path: Path, read: Any, size: int) -> tuple[int, dict[str, TensorInfo]]:
    if size < 10:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(read(8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: header of {length} bytes, at most {MAX_HEADER} are read")
    if 8 + length > size:
        raise CheckpointError(f"{path} is cut short: {size} bytes, its header alone needs {8 + length}")
    return 8 + length, parse_header(read(length), size - 8 - length, str(path))


def parse_header(raw: bytes, data_bytes: int, where: str) -> dict[str, TensorInfo]:
    """Tensors named by a safetensors header that must describe exactly `data_bytes` bytes of data.

    Raises:
        CheckpointError: anything else than a complete, gapless, duplicate-free list of tensors.
    """
    if raw[:1] != b"{":
        raise CheckpointError(f"{where}: the header does not begin with a JSON object")
    entries = parse_json(raw, f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map names to texts")
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(entries)} tensors, at most {MAX_TENSORS} are read")
    tensors = {name: _entry(name, entry, where) for name, entry in entries.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        if info.begin != end:
            kind = "overlaps another" if info.begin < end else f"leaves {info.begin - end} bytes unused before it"
            raise CheckpointError(f"{where}: tensor {shown(name)} at byte {info.begin} {kind}")
        end = info.begin + info.nbytes
    if end != data_bytes:
        kind = "is cut short" if data_bytes < end else "has bytes after its last tensor"
        raise CheckpointError(f"{where} {kind}: {data_bytes} bytes of data, the header describes {end}")
    return tensors


def _entry(name: str, entry: object, where: str) -> TensorInfo:
    what = f"{where}: tensor {shown(name)}"
    if not name or len(name) > MAX_NAME:
        raise CheckpointError(f"{what}: a name must have 1 to {MAX_NAME} characters, got {len(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} must state exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{what} has dtype {shown(str(dtype))}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise CheckpointError(f"{what} has a malformed shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{what} has malformed data_offsets")
    if 0 in shape:
        raise CheckpointError(f"{what} is empty: shape {shape}")
    info = TensorInfo(DTYPES[dtype], tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(f"{what} has {offsets[1] - offsets[0]} bytes, its shape and dtype need {info.nbytes}")
    return info


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no name occurs twice and no number is NaN.

    Infinity is read (published Mamba-2 configurations hold it), also in the form {"__float__": "Infinity"}.
    """
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} must be a JSON object")
    return data


def _object(pairs: list[tuple[str, Any]]) -> Any:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} occurs twice")
    if list(data) == ["__float__"] and data["__float__"] in ("Infinity", "-Infinity"):
        return float(data["__float__"])
    return data


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a number")
    return float(name)


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file.

    Raises:
        CheckpointError: it is missing, too large, or not such an object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path} is larger than {MAX_JSON} bytes")
    return parse_json(raw, str(path))


def inside(directory: Path, file: Path) -> Path:
    """`file` of a checkpoint directory, links followed as far as they stay in it (or in the hub cache it lies in).

    Raises:
        CheckpointError: the file is missing or a link out of the directory.
    """
    root = directory.resolve()
    # A hub snapshot is a directory of links: models--OWNER--REPO/snapshots/REV/file -> ../../blobs/sha256.
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} is missing or a broken link") from error
    if not target.is_relative_to(root):
        raise CheckpointError(f"{file} is a link out of its directory, to {target}: put the file itself there")
    if not target.is_file():
        raise CheckpointError(f"{file} is not a file")
    return target


def mismatches(found: Mapping[str, TensorInfo], wanted: Mapping[str, Shape], optional: Iterable[str] = ()) -> list[str]:
    """Every difference between the tensors of a file and those a model needs, one line each."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    known = {*wanted, *optional}
    wrong += [f"{shown(name)} is not part of the model" for name in found if name not in known]
    for name, shape in wanted.items():
        info = found.get(name)
        if info is None:
            continue
        if info.shape != shape:
            wrong.append(f"{name} is {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in FLOATS:
            wrong.append(f"{name} is {str(info.dtype).removeprefix('torch.')}, expected floating point")
    return wrong


def refuse_mismatches(where: object, wrong: list[str]) -> None:
    """Raise CheckpointError naming the first five of `wrong` and how many more there are; nothing for an empty list."""
    if wrong:
        more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        count = f"{len(wrong)} mismatch{'es' * (len(wrong) > 1)}"
        raise CheckpointError(f"{where} does not fit its configuration, {count}: {'; '.join(wrong[:SHOWN])}{more}")


def check_values(where: object, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or Inf, and a matrix of zeros only.

    Raises:
        CheckpointError: the message names the tensor and counts the values.
    """
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = int((~finite).sum())
        raise CheckpointError(f"{where}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite")
    if tensor.ndim > 1 and not tensor.any():
        raise CheckpointError(f"{where}: all {tensor.numel()} values of {name} are zero")


def shown(name: str) -> str:
    """A name from a file, safe to print on one line."""
    text = name if name.isascii() and name.isprintable() else ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."
