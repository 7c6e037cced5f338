"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest

from gdn2 import env

# Before any test imports torch; inherited by the processes that tests start. Two workers with two threads each on two
# cores only wait for one another.
env.let_idle_threads_sleep()
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def default_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards which data directory a test's command line chose."""
    monkeypatch.setenv("GDN2_DATA", "")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Benchmark files and golden outputs that stay outside the repository; tests that need them skip without."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("needs ../shared, which is not part of the repository")
    return path
