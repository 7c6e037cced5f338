"""The command `convert`; `cli.py` registers it and lends it its printing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from evalsuite.options import BadValues, Offline, Pickles, TokenizerSource, Values

Echo = Callable[[str], None]


def add(app: typer.Typer, echo: Echo) -> None:
    """Register the command with `app`."""

    @app.command()
    def convert(
        source: Annotated[str, typer.Argument(help="Checkpoint: a path, a zoo name or hf:OWNER/REPO[@REVISION].")],
        target: Annotated[Path, typer.Argument(help="A directory, or for nvlabs a .pth file, that is not there yet.")],
        to: Annotated[Literal["native", "fla", "nvlabs"], typer.Option("--to", help="Format to write.")],
        allow_pickle_weights: Pickles = None, allow_bad_values: BadValues = None, given: Values = None,
        tokenizer: TokenizerSource = None, offline: Offline = None,
    ) -> None:  # fmt: skip
        """Write a checkpoint in another format. What that format would compute differently is refused."""
        from evalsuite.backends import looking

        said = looking.convert(
            source, target, to,
            {
                "allow_pickle_weights": allow_pickle_weights, "allow_bad_values": allow_bad_values, "given": given,
                "tokenizer": tokenizer, "offline": offline,
            },
        )  # fmt: skip
        echo(f"written to {target}")
        if said:
            echo(f"its files cannot say: open it with --set {','.join(said)}")
