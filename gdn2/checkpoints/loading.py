"""Opening a model by name: zoo, preset, path or hub; and looking at one without loading it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from gdn2 import zoo
from gdn2.checkpoints import formats, hub, native
from gdn2.checkpoints.fields import Values
from gdn2.checkpoints.safe import inside
from gdn2.checkpoints.sources import Source, find_weights, open_source
from gdn2.checkpoints.tables import Table, on_meta
from gdn2.errors import CheckpointError, UserError
from gdn2.models import PRESETS, Decoder, ModelConfig, preset
from gdn2.tokenizer import BosPolicy, Tokenizer, load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")


@dataclass(frozen=True)
class Options:
    """What a user may say about opening a checkpoint."""

    allow_pickle_weights: bool = False  # .pth and .bin, through weights_only
    allow_bad_values: bool = False  # NaN, Inf and matrices of zeros
    tokenizer: str | None = None  # where the checkpoint brings none, or another
    bos: BosPolicy = "auto"
    offline: bool = False  # hub names: only what is in the cache
    values: Mapping[str, str] = field(default_factory=dict)  # what no file says, such as window=2048


@dataclass(frozen=True)
class Loaded:
    """An opened model."""

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None  # None: the checkpoint brings none and none was named
    digest: str  # sha256 over weights and configuration
    format: str
    name: str


@dataclass(frozen=True)
class Description:
    """What a checkpoint is, from headers alone."""

    path: Path
    format: str | None
    config: ModelConfig | None
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]  # parameters a dtype
    files: Mapping[str, int]  # bytes
    tokenizer: str | None
    digest: str | None
    refused: tuple[str, ...]  # why it would not open; empty where it would


def open_model(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, options: Options | None = None
) -> Loaded:
    """Open a model for evaluation, gradients off.

    Args:
        name: a zoo name, a preset (fresh parameters, seed 0, no tokenizer), a path, or hf:OWNER/REPO[@REVISION].
        device: where the parameters go.
        dtype: of the parameters (rates of decay stay fp32); None keeps the stored one.

    Raises:
        UserError: no such model, or a value that must be given by name.
        CheckpointError: the checkpoint was refused; the message says why.
    """
    options = options or Options()
    path = find(name, options)
    if path is None:
        return _fresh(name, device, dtype, options)
    with ExitStack() as stack:
        raw = formats.configuration(path)
        source = open_source(path, stack, allow_pickle=options.allow_pickle_weights)
        reading = formats.understand(path, raw, source.tensors, Values(options.values))
        digest = _digest(path, reading, source.files)
        model = on_meta(reading.config, path)
        reading.table(model).load(source, model, device, check=not options.allow_bad_values)
    stored = {p.dtype for n, p in model.named_parameters()}
    if dtype is not None or len(stored) > 1:
        model.cast(dtype or model.embed.weight.dtype)
    tokenizer = _tokenizer(path, options)
    if tokenizer is not None:
        largest = max(tokenizer.vocab_size - 1, tokenizer.bos_id or 0)
        if largest >= reading.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {name} has ids up to {largest}, of which {reading.config.vocab_size} is the first "
                "that the embedding does not have"
            )
    shown = name if zoo.path(name) or name.startswith("hf:") else path.resolve().name
    return Loaded(model.eval().requires_grad_(False), reading.config, tokenizer, digest, reading.format, shown)


def describe(name: str, options: Options | None = None) -> Description:
    """Look at a checkpoint: its headers are read and its files hashed, its weights are not loaded.

    Raises:
        UserError: there is no such checkpoint. What would be refused is listed, not raised.
    """
    options = options or Options()
    path = find(name, options)
    if path is None:
        raise UserError(f"{name} is a preset: it has a configuration and no checkpoint (see `list models`)")
    refused: list[str] = []
    source: Source | None = None
    reading, digest = None, None
    with ExitStack() as stack:
        try:
            raw = formats.configuration(path)
            source = open_source(path, stack, allow_pickle=options.allow_pickle_weights)
            reading = formats.understand(path, raw, source.tensors, Values(options.values))
            model = on_meta(reading.config, path)
            refused += _differences(reading.table(model), source, model)
            digest = _digest(path, reading, source.files)
            _tokenizer(path, options)
        except UserError as error:
            refused.append(str(error))
        files = source.files if source else _weights_or_none(path)
        tensors = source.tensors if source else {}
    dtypes: Counter[str] = Counter()
    for info in tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes // info.dtype.itemsize
    return Description(
        path=path, format=reading.format if reading else None, config=reading.config if reading else None,
        tensors=len(tensors), parameters=sum(dtypes.values()), dtypes=dict(dtypes),
        files={file.name: file.stat().st_size for file in files}, tokenizer=_tokenizer_source(path, options),
        digest=digest, refused=tuple(refused),
    )  # fmt: skip


def open_tokenizer(name: str, options: Options | None = None) -> Tokenizer | None:
    """The tokenizer that `open_model` would give the model called `name`; None where it brings none.

    Raises:
        UserError: no such model, or its tokenizer cannot be read.
    """
    options = options or Options()
    path = find(name, options)
    if path is None:
        return load_tokenizer(options.tokenizer, options.bos) if options.tokenizer else None
    return _tokenizer(path, options)


def _differences(table: Table, source: Source, model: Decoder) -> list[str]:
    return [f"{source.where}: {line}" for line in table.check(source, model)]


def _weights_or_none(path: Path) -> tuple[Path, ...]:
    try:
        return find_weights(path)[1]
    except CheckpointError:
        return ()


def find(name: str, options: Options) -> Path | None:
    """Where the checkpoint called `name` lies, downloaded where it is a hub name; None for a preset.

    Raises:
        UserError: no such name and no such path.
    """
    if (shipped := zoo.path(name)) is not None:
        return shipped
    if name.startswith("hf:"):
        return hub.download(name, allow_pickle=options.allow_pickle_weights, offline=options.offline)
    if name in PRESETS:
        return None
    if not name or not Path(name).exists():
        close = get_close_matches(name, list(dict.fromkeys([*zoo.names(), *PRESETS])), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`gdn2-eval list models` names the known ones"
        raise UserError(f"no model {name[:80]!r}: neither a known name, nor a path, nor hf:OWNER/REPO; {hint}")
    return Path(name)


def _fresh(name: str, device: torch.device | str, dtype: torch.dtype | None, options: Options) -> Loaded:
    config = preset(name)
    model = Decoder(config)
    model.reset_parameters(seed=0)
    model = model.to(device)
    if dtype is not None:
        model.cast(dtype)
    text = json.dumps(["untrained", 0, _anonymous(config)], sort_keys=True)
    tokenizer = open_tokenizer(name, options)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Loaded(model.eval().requires_grad_(False), config, tokenizer, digest, "untrained preset", name)


def _anonymous(config: ModelConfig) -> dict[str, Any]:
    data = config.to_dict()
    del data["name"]
    return data


def _digest(path: Path, reading: formats.Reading, files: tuple[Path, ...]) -> str:
    """sha256 over weights and the resolved configuration: equal exactly for what computes the same."""
    if reading.format == "native":
        header = native.read_header(path)
        for file, wanted in header.checksums.items():
            if native.file_digest(inside(path, path / file)) != wanted:
                raise CheckpointError(f"{path / file} does not match its sha256 in {native.CHECKSUMS}")
        return header.digest
    sums = [native.file_digest(file) for file in files]
    text = json.dumps([sums, _anonymous(reading.config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_source(path: Path, options: Options) -> str | None:
    if options.tokenizer:
        return options.tokenizer
    directory = path if path.is_dir() else path.parent
    return str(directory) if any((directory / file).is_file() for file in TOKENIZER_FILES) else None


def _tokenizer(path: Path, options: Options) -> Tokenizer | None:
    source = _tokenizer_source(path, options)
    return load_tokenizer(source, options.bos) if source else None
