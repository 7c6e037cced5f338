"""What `gdn2-eval data ruler|punkt|essays` do, and the line each prints when done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from evalsuite.types import Setting, Tokenizer
from gdn2.errors import UserError
from tasks.ruler import TASKS, essays, punkt
from tasks.ruler.export import RulerFamily, write_samples


@dataclass(frozen=True, slots=True)
class Export:
    """One file of samples. `options` are the task's: haystack, haystack_offset, budget."""

    task: str
    length: int
    out: Path
    samples: int = 500
    profile: str = "exact"
    seed: int = 42
    options: Mapping[str, str] = field(default_factory=dict)


def find_task(name: str) -> RulerFamily:
    """RULER's task `name`. Raises UserError where it is none."""
    for task in TASKS:
        if task.name == name:
            return task
    raise UserError(f"no RULER task {name!r}; there are {', '.join(task.name for task in TASKS)}")


def data_ruler(export: Export, tokenizer: Tokenizer) -> str:
    """Write samples for use elsewhere."""
    if export.samples < 1:
        raise UserError(f"samples must be at least 1, got {export.samples}")
    setting = Setting(export.profile, export.length, export.samples, export.seed, export.options)
    count = write_samples(find_task(export.task), setting, tokenizer, export.out)
    return f"{export.out}: {count} samples of {export.task} at {export.length} tokens, profile {export.profile}"


def data_punkt() -> str:
    """Fetch NLTK's Punkt model of English, which the byte-compatible profiles need."""
    return f"Punkt is in {punkt.download()}"


def data_essays() -> str:
    """Fetch Paul Graham's essays, RULER's own haystack."""
    return f"{len(essays.manifest())} essays are in {essays.download()}; use --haystack essays. {essays.LICENCE}"
