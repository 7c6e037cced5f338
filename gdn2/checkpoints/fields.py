"""Reading other people's configurations: every value is typed, bounded, and named in the error when it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gdn2.checkpoints.safe import shown
from gdn2.errors import CheckpointError, UserError

LARGEST = 1 << 21  # of any size a configuration may state


class Fields:
    """A configuration object of JSON, read key by key."""

    def __init__(self, data: Mapping[str, Any], where: object) -> None:
        self.data, self.where = data, where

    def refuse(self, key: str, wanted: str) -> CheckpointError:
        value = shown(repr(self.data.get(key)))
        return CheckpointError(f"{self.where}: {key} must be {wanted}, got {value}")

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.data.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        if not self.has(key) and default is not None:
            return default
        value = self.data.get(key)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= LARGEST:
            raise self.refuse(key, f"an integer from {low} to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        if not self.has(key) and default is not None:
            return default
        value = self.data.get(key)
        if type(value) not in (int, float) or value != value:
            raise self.refuse(key, "a number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool | None = None) -> bool:
        if not self.has(key) and default is not None:
            return default
        value = self.data.get(key)
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def table(self, key: str) -> Fields:
        """A nested object, empty where it is missing or null."""
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def integers(self, key: str, default: Sequence[int] | None = None) -> list[int]:
        value = self.data.get(key) if self.has(key) else default
        if not isinstance(value, list | tuple) or not all(type(v) is int and 0 <= v <= LARGEST for v in value):
            raise self.refuse(key, "a list of integers")
        return list(value)

    def numbers(self, key: str, count: int, default: Sequence[float]) -> list[float]:
        value = self.data.get(key) if self.has(key) else default
        good = isinstance(value, list | tuple) and len(value) == count
        if not good or not all(type(v) in (int, float) and v == v for v in value):  # type: ignore[union-attr]
            raise self.refuse(key, f"a list of {count} numbers")
        return [float(v) for v in value]  # type: ignore[union-attr]

    def choices(self, key: str, allowed: Sequence[str], count: int) -> list[str]:
        value = self.data.get(key)
        if not isinstance(value, list) or len(value) != count or not set(map(str, value)) <= set(allowed):
            raise self.refuse(key, f"a list of {count} out of {', '.join(allowed)}")
        return [str(v) for v in value]

    def only(self, **allowed: Sequence[Any]) -> None:
        """Refuse values that would change what the model computes in a way we do not: key=(values that are served).

        A key that is missing passes.
        """
        for key, values in allowed.items():
            if key in self.data and self.data[key] not in values:
                raise self.refuse(key, f"{' or '.join(map(repr, values))} (use the hf backend otherwise)")


class Values:
    """What the user said by name because no file does, `--set window=2048`. Every value must be used."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = dict(given)
        self.used: set[str] = set()

    def text(self, name: str, allowed: Sequence[str], default: str | None = None, why: str = "") -> str:
        self.used.add(name)
        value = self.given.get(name, default)
        if value is None:
            raise UserError(f"{name} cannot be read from the checkpoint{why}: give {name}={'|'.join(allowed)}")
        if value not in allowed:
            raise UserError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        return value

    def number(self, name: str, kind: type, default: Any = None, why: str = "") -> Any:
        """A positive int or float; `default` None asks the user for it."""
        self.used.add(name)
        text = self.given.get(name)
        if text is None:
            if default is None:
                raise UserError(f"{name} cannot be read from the checkpoint{why}: give {name}=NUMBER")
            return default
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise UserError(f"{name} must be a positive number, got {text!r}")
        return value

    def refuse_unused(self, where: object) -> None:
        if odd := sorted(set(self.given) - self.used):
            known = ", ".join(sorted(self.used)) or "none"
            raise UserError(f"{where} has no use for {odd[0]}={self.given[odd[0]]}; it takes: {known}")
