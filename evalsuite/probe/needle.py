"""Where in the prompt a sample's needle stands, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from evalsuite.types import Generate, Sample, Tokenizer
from gdn2.errors import DataError, UserError

LONGEST = 512  # tokens of a needle

Role = Literal["key", "value", "text"]


@dataclass(frozen=True, slots=True)
class Needle:
    """The tokens of "One of the special magic numbers for KEY is: VALUE", as far as the value's last."""

    positions: range
    texts: tuple[str, ...]  # of each token
    roles: tuple[Role, ...]  # what each token is part of

    @property
    def value(self) -> list[int]:
        """The value's tokens, counted from the needle's start."""
        return [n for n, role in enumerate(self.roles) if role == "value"]


def check(sample: Sample, task: str) -> None:
    """Raise UserError where samples like this one hide no needle."""
    if "needle_token" not in sample.facts or not isinstance(sample.requests[0], Generate):
        raise UserError(f"task {task} hides no needle in its prompts; RULER's niah tasks do (see: list tasks)")


def locate(sample: Sample, tokenizer: Tokenizer) -> Needle:
    """The needle of the sample's first answer. Raises DataError where it is not where the task says."""
    request, start, pairs = sample.requests[0], sample.facts["needle_token"], sample.facts["needles"]
    assert isinstance(request, Generate) and isinstance(start, int) and isinstance(pairs, tuple)
    ids = request.prompt.ids[start : start + LONGEST].tolist()

    def span(part: str) -> range:
        """The fewest tokens that hold the first `part`; none where it is not there."""
        end = first(range(1, len(ids) + 1), lambda end: part in tokenizer.decode(ids[:end]))
        begin = first(range(end - 1, -1, -1), lambda begin: part in tokenizer.decode(ids[begin:end]))
        return range(begin, end)

    answer = sample.target[0]
    value = span(answer)
    if not value:
        raise DataError(f"sample {sample.id}: the needle with {answer!r:.60} is not at token {start} of its prompt")
    key = span(next(key for key, found in pairs if found == answer))
    roles: list[Role] = ["value" if n in value else "key" if n in key else "text" for n in range(value.stop)]
    texts = tuple(tokenizer.decode([i]) for i in ids[: value.stop])
    return Needle(range(start, start + value.stop), texts, tuple(roles))


def first(numbers: Iterable[int], good: Callable[[int], bool]) -> int:
    """The first of `numbers` that is good, else 0."""
    return next((n for n in numbers if good(n)), 0)
