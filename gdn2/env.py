"""The one module that reads the process environment."""

import os
from pathlib import Path


def get(name: str, default: str = "") -> str:
    """Return environment variable `name`, or `default` where it is unset."""
    return os.environ.get(name, default)


def cache_dir() -> Path:
    """Where explicit downloads are kept: $GDN2_CACHE, else gdn2-eval under $XDG_CACHE_HOME or ~/.cache."""
    if own := get("GDN2_CACHE"):
        return Path(own)
    return Path(get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdn2-eval"
