"""What `gdn2-eval data fetch` brings from the Hugging Face hub; nothing else here touches a network."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from gdn2.errors import DataError
from tasks.data import shelf
from tasks.data.spec import Dataset, conform

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = [
    "tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt", "encoder.json", "special_tokens_map.json",
    "generation_config.json", "config.json",
]  # fmt: skip


def fetch_dataset(dataset: Dataset, home: Path) -> shelf.Entry:
    """Download `dataset` and keep it. Raises DataError where the hub gives none, or other columns."""
    revision = _revision("datasets", dataset.hub)
    found = load(dataset.hub, dataset.config, dataset.split, revision)
    where = f"{dataset.hub}, split {dataset.split}, record"
    made = [conform(dataset, row, f"{where} {number}") for number, row in enumerate(found, start=1)]
    config = f" {dataset.config}" if dataset.config else ""
    return shelf.store(home, dataset, made, f"hf:{dataset.hub}@{revision or 'main'}{config} {dataset.split}")


def load(repo: str, config: str | None, split: str | None, revision: str | None = None) -> Any:
    """A data set of the hub, by the datasets library, which goes on with a broken download.

    Raises DataError where it cannot be had.
    """
    import datasets

    try:
        return datasets.load_dataset(repo, config, split=split, revision=revision)
    except _problems() as error:
        raise DataError(f"cannot fetch {repo}: {' '.join(str(error).split())[:300]}") from error


def fetch_tokenizer(name: str, home: Path) -> list[str]:
    """Download the tokenizer of a model of the hub and keep it; the paths of its files, below `home`."""
    import huggingface_hub

    repo = name.removeprefix("hf:")
    if not _REPO.fullmatch(repo):
        raise DataError(f"tokenizer {name[:60]!r} is not OWNER/REPO")
    revision = _revision("models", repo)
    with tempfile.TemporaryDirectory() as folder:
        try:
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_TOKENIZER_FILES, local_dir=folder
            )
        except _problems() as error:
            raise DataError(f"cannot fetch {repo}: {' '.join(str(error).split())[:300]}") from error
        found = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    if not found:
        raise DataError(f"{repo} has no tokenizer")
    place = f"tokenizers/{repo.replace('/', '--')}"
    files = {f"{place}/{file}": data for file, data in found.items()}
    source, licence = f"hf:{repo}@{revision}", "see its page on the hub"
    shelf.keep(home, files, {path: shelf.entry_of(data, source, licence) for path, data in files.items()})
    return list(files)


def _revision(kind: str, repo: str) -> str | None:
    """Commit of a repository of the hub; None for a directory of this machine."""
    if not _REPO.fullmatch(repo):
        return None
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        info = api.dataset_info(repo) if kind == "datasets" else api.model_info(repo)
    except _problems() as error:
        raise DataError(f"cannot fetch {repo}: {' '.join(str(error).split())[:300]}") from error
    return str(info.sha)


def _problems() -> tuple[type[Exception], ...]:
    """What the hub's libraries raise without a network, a repository or a format they know."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its base is the HTTP library's own error, whichever library that is.
    return (OSError, ValueError, RuntimeError, KeyError, *HfHubHTTPError.__bases__)
