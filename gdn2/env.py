"""The one module that reads the process environment."""

import os
from pathlib import Path


def get(name: str, default: str = "") -> str:
    """Return environment variable `name`, or `default` where it is unset."""
    return os.environ.get(name, default)


def cache_dir() -> Path:
    """Where downloads made by an explicit command are kept: $GDN2_CACHE, else $XDG_CACHE_HOME/gdn2-eval, else ~/.cache/gdn2-eval."""
    if own := get("GDN2_CACHE"):
        return Path(own)
    return Path(get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdn2-eval"
