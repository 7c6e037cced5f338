"""The one module that reads the process environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def get(name: str, default: str = "") -> str:
    """Return environment variable `name`, or `default` where it is unset."""
    return os.environ.get(name, default)


def cache_dir() -> Path:
    """Where explicit downloads are kept: $GDN2_CACHE, else gdn2-eval under $XDG_CACHE_HOME or ~/.cache."""
    if own := get("GDN2_CACHE"):
        return Path(own)
    return Path(get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdn2-eval"


def data_dir() -> Path:
    """Where benchmark files are: $GDN2_DATA, which `--data` sets, else the cache."""
    return Path(get("GDN2_DATA") or cache_dir())


def use_data(directory: Path) -> None:
    """Take benchmark files from `directory`, in this process and those it starts."""
    os.environ["GDN2_DATA"] = str(directory)


@contextmanager
def using_data(directory: str | None) -> Iterator[None]:
    """Take benchmark files from `directory` for a while; None changes nothing."""
    before = os.environ.get("GDN2_DATA")
    if directory:
        use_data(Path(directory))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("GDN2_DATA", None)
        else:
            os.environ["GDN2_DATA"] = before


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun says; (0, 1) without it."""
    return _count("RANK", 0), max(_count("WORLD_SIZE", 1), 1)


def local_rank() -> int:
    """This process's number among those on its host, as torchrun says; 0 without it."""
    return _count("LOCAL_RANK", 0)


def _count(name: str, default: int) -> int:
    text = get(name)
    return int(text) if text.isdecimal() and len(text) < 10 else default


def let_idle_threads_sleep() -> None:
    """Unless the user chose otherwise, OpenMP threads sleep while they wait; only before torch is imported.

    Threads that spin hold the cores that the others need: on two busy cores a run took 13 times the CPU time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
