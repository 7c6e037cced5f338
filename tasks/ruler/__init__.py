"""RULER, native: needles in haystacks of any length, and its five other tasks, for any tokenizer."""

from tasks.ruler import more, niah

TASKS: tuple[niah.NiahTask | more.RulerTask, ...] = (*niah.TASKS, *more.TASKS)
SUITES = niah.SUITES | {"ruler-13": tuple(task.name for task in TASKS)}

__all__ = ["SUITES", "TASKS"]
