"""Option types that several commands of `cli.py` share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from evalsuite.names import quoted, refuse_unusable
from gdn2.errors import UserError


def directory(value: str | Path) -> Path:
    """A path that can be one."""
    refuse_unusable({"out": value})
    return Path(value)


def device(value: str) -> str:
    """A device that can be one."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise UserError(f"device {quoted(value)} is not cpu, cuda, cuda:N or auto")
    return value


Out = Annotated[Path, typer.Option("--out", parser=directory, metavar="DIRECTORY", help="Results directory.")]
Device = Annotated[
    str, typer.Option(parser=device, metavar="DEVICE", help="cpu, cuda, cuda:N; auto is a GPU where there is one.")
]
Runs = Annotated[
    list[Path] | None, typer.Option(help="Run, results directory or .jsonl file; repeatable.", show_default="results")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights.", show_default="the device's")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the samples, and of answers that are drawn.")]
Haystack = Annotated[str | None, typer.Option(help="bundled, essays, a text file or a directory of them.")]
Offset = Annotated[str | None, typer.Option(help="First sentence of the haystack, or random: another for each sample.")]
Budget = Annotated[int | None, typer.Option(min=1, max=2**16, help="Tokens a task may generate.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", parser=directory, metavar="DIRECTORY", help="What `data fetch` brought; no network then."),
]
Fast = Annotated[bool | None, typer.Option("--fast", help="Let last bits of an answer depend on the batch.")]
LmEvalRounding = Annotated[
    bool | None, typer.Option("--lm-eval-rounding", help="Round log-probabilities as lm-eval does.")
]

# How a checkpoint is opened; see `evalsuite.backends.opening`.
Pickles = Annotated[
    bool | None, typer.Option("--allow-pickle-weights", help="Read .pth and .bin files, which can hide code.")
]
BadValues = Annotated[
    bool | None, typer.Option("--allow-bad-values", help="Open weights that hold NaN, Inf or a matrix of zeros.")
]
Values = Annotated[
    str | None, typer.Option("--set", help="What a checkpoint does not say: NAME=VALUE, separated by commas.")
]
TokenizerSource = Annotated[str | None, typer.Option("--tokenizer", help="File, directory or hub name of another.")]
Bos = Annotated[Literal["yes", "no"] | None, typer.Option(help="Begin prompts with BOS.", show_default="as it says")]
Offline = Annotated[bool | None, typer.Option("--offline", help="Of hub names, use only what was fetched before.")]
