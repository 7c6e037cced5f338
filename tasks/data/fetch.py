"""Downloads made by an explicit command: a page into memory, a checked file into place."""

from __future__ import annotations

import os
from pathlib import Path

from gdn2.errors import DataError, StorageError


def get(url: str) -> bytes:
    """The body behind `url`. Raises DataError where it cannot be had."""
    import http.client
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            body: bytes = answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"cannot fetch {url}: {' '.join(str(error).split())}") from error
    return body


def keep(file: Path, data: bytes) -> None:
    """Write `file` whole or not at all. Raises StorageError where it cannot be written."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
