"""The commands `doctor` and `bench kernels`; `cli.py` registers them and lends them its printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from evalsuite.names import refuse_unusable
from gdn2.errors import UserError

Echo = Callable[[str], None]
EchoTable = Callable[[Sequence[str], Sequence[Sequence[object]]], None]

WIDTHS = (12, 6, 18, 9, 15, 9, 9, 7, 9, 10, 8)  # columns of the rows of `bench kernels`, printed as they are known


def _directory(value: str | Path) -> Path:
    refuse_unusable({"out": value})
    return Path(value)


Target = Annotated[str, typer.Option(help="GPU class to compile for: sm_80, sm_90 or sm_100.")]
Only = Annotated[str, typer.Option(help="Leave out what does not contain this text, such as 8x4096 or decode.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile every shipped kernel and tabulate what came out.")]
Ops = Annotated[str, typer.Option(help="Operations, separated by commas.", show_default="all")]
Mixers = Annotated[str, typer.Option(help="Mixers, separated by commas.", show_default="all")]
Peer = Annotated[bool, typer.Option("--peer-shapes", help="Add the six shapes of the peer's own benchmark.")]
Rounds = Annotated[int, typer.Option(min=1, max=10**4, help="Timed calls of each contender.")]
Device = Annotated[str, typer.Option(help="cuda, cuda:N, or cpu: a dry run on tiny shapes.")]
Out = Annotated[Path, typer.Option("--out", parser=_directory, metavar="DIRECTORY", help="Results directory.")]


def add(app: typer.Typer, echo: Echo, echo_table: EchoTable) -> None:
    """Register both commands with `app`."""
    group = typer.Typer(help="Measure speed.", rich_markup_mode=None)
    app.add_typer(group, name="bench")
    group.callback()(lambda: None)

    @app.command()
    def doctor(compile_: Compile = False, target: Target = "sm_90", only: Only = "") -> None:
        """Say what would run here, and why."""
        from gdn2.kernels.doctor import examine, look

        for finding in examine(look()):
            mark = "" if finding.kind == "ok" else f"{finding.kind}: "
            echo(f"{finding.subject:12} {mark}{finding.text}")
        if compile_:
            echo("")
            echo_table(*compiled(target, only))

    @group.command()
    def kernels(
        ops: Ops = "", mixers: Mixers = "", only: Only = "", peer_shapes: Peer = False, rounds: Rounds = 20,
        device: Device = "cuda", out: Out = Path("results"),
    ) -> int:  # fmt: skip
        """Time the kernels against fla, plain torch and the device's ceilings.

        A shape whose results are wrong gets no times.
        """
        from evalsuite.bench import kernels as bench
        from evalsuite.store import check_writable

        check_writable(out / "bench")
        asked = bench.Asked(_names(ops) or bench.OPS, _names(mixers) or bench.MIXERS, only, peer_shapes)
        bench.check(asked, device)
        echo(_line(bench.HEADER))
        result = bench.run(asked, device, rounds, lambda row: echo(_line(row.cells())))
        echo(f"written to {bench.write(result, out / 'bench')}")
        return 5 if any(row["refused"] for row in result["rows"]) else 0


def compiled(target: str, only: str) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """Header and rows of the table of compiled kernels.

    Raises:
        UserError: an unknown target, or no configuration contains `only`.
    """
    from gdn2.kernels.triton import aot

    names = [name for name in aot.CONFIGS if only in name]
    if not names:
        raise UserError(f"no configuration contains {only!r}; known: {', '.join(aot.CONFIGS)}")
    return aot.HEADER, [aot.cells(row) for name in names for row in aot.compile_config(name, target)]


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
