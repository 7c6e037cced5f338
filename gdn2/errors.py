"""The errors a user can cause. Every package may import this module; it imports nothing.

`cli.py` prints the message of a `UserError` as one line and exits with its code. Anything else is a bug of ours.
"""


class UserError(Exception):
    """A wrong flag, file, name, shape or configuration. The message names the value and what would be right."""

    exit_code = 2


class DataError(UserError):
    """Input data are missing or malformed: a haystack, a benchmark file, a records file."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or tokenizer was refused."""

    exit_code = 4


class StorageError(UserError):
    """The disk is full or a path may not be written."""

    exit_code = 6


class RunLockedError(UserError):
    """Another process holds the run directory."""

    exit_code = 7


class SelfCheckError(UserError):
    """A model gave two answers to one question: a bug of ours, or the hardware's."""

    exit_code = 1


class DeviceLostError(UserError):
    """The device stopped working in the middle of a run."""

    exit_code = 1
