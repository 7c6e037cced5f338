"""Checkpoints from the Hugging Face hub: only the files that are needed, into its own cache, nothing executed."""

from __future__ import annotations

import re
from pathlib import Path

from gdn2.checkpoints.sources import shard_names
from gdn2.errors import CheckpointError, UserError

NAME = re.compile(r"hf:([\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?:@([\w./-]{1,200}))?")
DESCRIBING = [
    "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
]  # fmt: skip


def download(name: str, *, allow_pickle: bool, offline: bool) -> Path:
    """The snapshot of hf:OWNER/REPO[@REVISION], with weights: safetensors, else pickles where they are allowed.

    Raises:
        UserError: not such a name.
        CheckpointError: the hub does not have it, cannot be reached, or it is not in the cache.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is not a hub name: hf:OWNER/REPO or hf:OWNER/REPO@REVISION")
    repository, revision = match.groups()
    path = _fetch(name, repository, revision, DESCRIBING, offline)
    # The second call must see the same snapshot even where the revision is a branch that moves meanwhile.
    revision = path.name
    for kind, whole in (("safetensors", "model.safetensors"), ("pickle", "pytorch_model.bin")):
        if kind == "pickle" and not allow_pickle:
            break
        index = path / f"{whole}.index.json"
        names = shard_names(index) if index.exists() else [whole]
        path = _fetch(name, repository, revision, names, offline)
        if all((path / file).exists() for file in names):
            return path
    pickled = "" if allow_pickle else " in safetensors (pickled ones need --allow-pickle-weights)"
    raise CheckpointError(f"{name} holds no weights{pickled}")


def _fetch(name: str, repository: str, revision: str | None, files: list[str], offline: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=files, local_files_only=offline
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name} cannot be fetched{' from the cache' if offline else ''}: {reason}") from error
    return Path(found)
