"""Fixtures every test may use."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
