"""RULER, native: needles in haystacks of any length, for any tokenizer."""

from tasks.ruler.niah import SUITES, TASKS

__all__ = ["SUITES", "TASKS"]
