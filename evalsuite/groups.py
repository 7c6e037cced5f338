"""Groups of tasks whose scores are averaged to one, as lm-eval's are: what they average, and the average.

A run's `run.json` holds the groups that were asked for; their numbers are made of records, never recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gdn2.errors import DataError


@dataclass(frozen=True, slots=True)
class Averaged:
    """A metric that a group averages over its tasks, those that have it."""

    metric: str
    filters: tuple[str, ...] | None  # of answers ("none" is no filter); None: all that tasks have
    by_size: bool  # tasks count by their samples, or each as one

    def among(self, names: Collection[str]) -> list[str]:
        """Those of the metrics `names`, as records name them, that are averaged, each to a number of its own."""
        if self.filters is not None:
            wanted = [self.metric if each == "none" else f"{self.metric},{each}" for each in self.filters]
            return [name for name in wanted if name in names]
        return sorted({name for name in names if name == self.metric or name.startswith(f"{self.metric},")})


@dataclass(frozen=True, slots=True)
class Group:
    """A named group; `tasks` are those of its groups too."""

    name: str
    tasks: tuple[str, ...]
    averages: tuple[Averaged, ...]

    def numbers(self, metrics: Mapping[str, Iterable[str]]) -> Iterator[tuple[Averaged, str]]:
        """What the group has a number of, from the metrics of its tasks, as records name them."""
        names = {metric for task in self.tasks for metric in metrics[task]}
        return ((averaged, metric) for averaged in self.averages for metric in averaged.among(names))


def average(values: Sequence[float], weights: Sequence[int]) -> float:
    """lm-eval's average of the tasks' numbers, in its order of operations."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def content(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """`groups` as run.json has them."""
    return [asdict(group) for group in groups]


def read(run: Mapping[str, Any]) -> dict[str, Group]:
    """The groups of a run.json by name, the newest of each. Raises DataError for what `content` does not write."""
    found = {}
    try:
        for entry in (each for invocation in run["invocations"] for each in invocation.get("groups", ())):
            averages = [
                Averaged(str(a["metric"]), None if a["filters"] is None else tuple(a["filters"]), bool(a["by_size"]))
                for a in entry["averages"]
            ]
            found[str(entry["name"])] = Group(str(entry["name"]), tuple(map(str, entry["tasks"])), tuple(averages))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"run.json does not say what its groups are ({error!r:.80})") from None
    return found
