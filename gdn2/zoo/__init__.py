"""Small checkpoints that ship with the package, trained on data the project makes itself."""

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent


def names() -> list[str]:
    """The checkpoints in the package."""
    return sorted(path.parent.name for path in DIRECTORY.glob("*/checksums.json"))


def path(name: str) -> Path | None:
    """The directory of checkpoint `name`, or None where there is no such checkpoint."""
    return DIRECTORY / name if name in names() else None
