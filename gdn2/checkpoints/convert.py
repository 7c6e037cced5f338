"""From one format to another. What the other format cannot say, or would compute differently, is refused."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from gdn2.checkpoints import backbone, fla, native, nvlabs
from gdn2.checkpoints.loading import Options, find, open_model
from gdn2.errors import StorageError, UserError

Target = Literal["native", "fla", "nvlabs"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "vocab.json", "merges.txt", "encoder.json", "vocab.bpe",
)  # fmt: skip


def convert(source: str, target: Path, to: Target, options: Options | None = None) -> tuple[str, ...]:
    """Write the model `source` in another format.

    Args:
        source: any name that `open_model` takes.
        target: a directory (native, fla) or a `.pth` file (nvlabs) that does not exist yet.

    Returns:
        What a reader of the new checkpoint must be told because its files cannot say it, such as norm_eps=0.0003.

    Raises:
        UserError: `target` is there already, or a tokenizer is needed and none known.
        CheckpointError: the source was refused, or the format has no such model.
        StorageError: the disk is full or the path may not be written.
    """
    options = options or Options()
    if target.exists():
        raise UserError(f"{target} is there already: name a path that is not")
    if to == "nvlabs" and target.suffix != ".pth":
        raise UserError(f"the authors' format is one file: {target} must end in .pth")
    loaded = open_model(source, options=options)
    path = find(source, options)
    beside = None if path is None else path if path.is_dir() else path.parent
    if to == "native":
        native.save(target, loaded.model, _tokenizer_json(source, beside, options), {"converted_from": loaded.format})
        return ()
    if to == "fla":
        names = fla if backbone.kind_of(loaded.config) is None else backbone
        config = names.describe(loaded.config)
        tensors = names.table(loaded.model).save(loaded.model)
        with _Written(target, directory=True) as temporary:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (temporary / "config.json").write_text(text, encoding="utf-8")
            _copy_tokenizer(beside, options, temporary)
        return ()
    tensors = nvlabs.write(loaded.model)
    with _Written(target, directory=False) as temporary:
        torch.save({"model": tensors}, temporary)
    return nvlabs.unsaid(loaded.config)


def _tokenizer_json(source: str, beside: Path | None, options: Options) -> Path:
    for place in (Path(options.tokenizer) if options.tokenizer else None, beside):
        if place is not None and (file := place if place.is_file() else place / "tokenizer.json").is_file():
            return file
    raise UserError(f"{source} brings no tokenizer.json and a native checkpoint has one: give --tokenizer FILE")


def _copy_tokenizer(beside: Path | None, options: Options, into: Path) -> None:
    place = Path(options.tokenizer) if options.tokenizer else beside
    if place is None:
        return
    for name in TOKENIZER_FILES if place.is_dir() else ():
        if (place / name).is_file():
            shutil.copyfile(place / name, into / name)
    if place.is_file():
        shutil.copyfile(place, into / ("tokenizer.json" if place.suffix == ".json" else place.name))


class _Written:
    """A temporary path beside `target` that takes its place when everything went well."""

    def __init__(self, target: Path, *, directory: bool) -> None:
        self.target, self.directory = target, directory

    def __enter__(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._holder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
            self._inner = self._holder / "new"
            if self.directory:
                self._inner.mkdir()
        except OSError as error:
            raise StorageError(f"cannot write {self.target}: {error.strerror}") from error
        return self._inner

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        try:
            if error is None:
                for file in self._inner.iterdir() if self.directory else (self._inner,):
                    _sync(file)
                self._inner.rename(self.target)
                _sync(self.target.parent)
        except OSError as problem:
            raise StorageError(f"cannot write {self.target}: {problem.strerror}") from problem
        finally:
            shutil.rmtree(self._holder, ignore_errors=True)
        if isinstance(error, OSError):
            raise StorageError(f"cannot write {self.target}: {error.strerror}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
