"""The commands `doctor`, `bench kernels` and `bench engine`; `cli.py` registers them and lends them its printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from evalsuite.names import refuse_unusable
from evalsuite.options import Dtype
from gdn2.errors import UserError

Echo = Callable[[str], None]
EchoTable = Callable[[Sequence[str], Sequence[Sequence[object]]], None]

WIDTHS = (20, 6, 18, 9, 15, 9, 9, 7, 9, 10, 8)  # columns of the rows of `bench kernels`, printed as they are known


SHAPES = "2048x8,4096x4,8192x2,16384x1"  # of a training step, the paper's
TRAINING_WIDTHS = (24, 9, 9, 9, 15, 8)
ENGINE_WIDTHS = (16, 9, 5, 8, 13, 9, 9, 8, 7, 5)


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
EngineModel = Annotated[
    str,
    typer.Option("--model", help="Checkpoint that transformers opens too, or random:mamba2-tiny, or fla:gdn-25m."),
]
Lengths = Annotated[str, typer.Option(help="Lengths of the prompts: 4k,32k.")]
Against = Annotated[str, typer.Option(help="fast, hf, lm-eval, separated by commas, or nothing.")]
Prompts = Annotated[int, typer.Option(min=1, max=10**4, help="Prompts of each length.")]
NewTokens = Annotated[int, typer.Option(min=2, max=2**16, help="Tokens each of them generates.")]
Batches = Annotated[str, typer.Option(help="Batch sizes of the contenders, separated by commas.")]

OnlyWork = Annotated[str, typer.Option("--only", help="Leave out work without one of these names: generate,needles.")]

Recompute = Annotated[bool, typer.Option("--recompute", help="Run layers again in the backward pass: less memory.")]
Presets = Annotated[str, typer.Option("--models", help="Presets, separated by commas.", show_default="Figure 2's")]
Shapes = Annotated[str, typer.Option(help="LENGTHxSEQUENCES of a step, separated by commas.")]
Kernels = Annotated[
    Literal["reference", "torch", "triton"] | None, typer.Option(help="Of the mixers.", show_default="the device's")
]


def add(app: typer.Typer, echo: Echo, echo_table: EchoTable) -> None:
    """Register both commands with `app`."""
    group = typer.Typer(help="Measure speed.", rich_markup_mode=None)
    app.add_typer(group, name="bench")
    group.callback()(lambda: None)

    _add_engine(group, echo)
    _add_training(group, echo)

    @app.command()
    def doctor(compile_: Compile = False, target: Target = "sm_90", only: Only = "") -> None:
        """Say what would run here, and why."""
        from gdn2.kernels.doctor import examine, look

        if not compile_ and (only or target != "sm_90"):
            raise UserError("--target and --only say what --compile compiles: add --compile")
        table = compiled(target, only) if compile_ else None  # first: a wrong target prints nothing else
        for finding in examine(look()):
            mark = "" if finding.kind == "ok" else f"{finding.kind}: "
            echo(f"{finding.subject:12} {mark}{finding.text}")
        if table is not None:
            echo("")
            echo_table(*table)

    @group.command()
    def kernels(
        ops: Ops = "", mixers: Mixers = "", only: Only = "", peer_shapes: Peer = False, rounds: Rounds = 20,
        device: Device = "cuda", out: Out = Path("results"),
    ) -> int:  # fmt: skip
        """Time the kernels against fla, plain torch and the device's ceilings.

        A shape whose results are wrong gets no times. What was measured before an interruption is written.
        """
        from evalsuite.bench import kernels as bench
        from evalsuite.interrupt import Interrupted
        from evalsuite.store import check_writable

        check_writable(out / "bench")
        asked = bench.Asked(_names(ops) or bench.OPS, _names(mixers) or bench.MIXERS, only, peer_shapes)
        bench.check(asked, device)
        echo(_line(bench.HEADER))
        result = bench.run(asked, device, rounds, lambda row: echo(_line(row.cells())))
        echo(f"written to {bench.write(result, out / 'bench')}")
        if result["interrupted"] is not None:
            raise Interrupted(result["interrupted"])
        return 5 if any(row["refused"] for row in result["rows"]) else 0


def _add_engine(group: typer.Typer, echo: Echo) -> None:
    @group.command()
    def engine(
        model: EngineModel, lengths: Lengths = "4k", against: Against = "hf,lm-eval", prompts: Prompts = 4,
        new_tokens: NewTokens = 32, batches: Batches = "1,8", rounds: Rounds = 3, device: Device = "cuda",
        dtype: Dtype = None, only: OnlyWork = "", out: Out = Path("results"),
    ) -> None:  # fmt: skip
        """Time whole requests through this engine, transformers and lm-eval, with the same weights and tokens."""
        from evalsuite.bench import engine as bench
        from evalsuite.plan import parse_lengths
        from evalsuite.store import check_writable

        check_writable(out / "bench")
        asked = bench.Asked(
            model, parse_lengths(lengths), tuple(_names(against)), prompts, new_tokens, _batches(batches), rounds,
            device, dtype or ("float32" if device == "cpu" else "bfloat16"), tuple(_names(only)),
        )  # fmt: skip
        bench.check(asked)
        echo(_line(bench.HEADER, ENGINE_WIDTHS))
        result = bench.run(asked, lambda row: echo(_line(row.cells(), ENGINE_WIDTHS)))
        echo(f"written to {bench.write(result, out / 'bench')}")


def _add_training(group: typer.Typer, echo: Echo) -> None:
    @group.command()
    def training(
        models: Presets = "", shapes: Shapes = SHAPES, rounds: Rounds = 10, device: Device = "cuda",
        kernels: Kernels = None, recompute: Recompute = False, out: Out = Path("results"),
    ) -> int:  # fmt: skip
        """Time training steps, for the paper's Figure 2: `gdn2-eval paper` and `plot` read what this writes."""
        from evalsuite.bench import engine
        from evalsuite.bench import training as bench
        from evalsuite.store import check_writable

        check_writable(out / "bench")
        asked = bench.Asked(
            tuple(_names(models)) or bench.MODELS, bench.parse_shapes(shapes), rounds, device, kernels, recompute
        )
        bench.check(asked)
        echo(_line(bench.HEADER, TRAINING_WIDTHS))
        result = bench.run(asked, lambda row: echo(_line(row.cells(), TRAINING_WIDTHS)), echo)
        echo(f"written to {engine.write(result, out / 'bench')}")
        return 5 if result["refused"] else 0


def _batches(text: str) -> tuple[int, ...]:
    """Batch sizes, separated by commas."""
    names = _names(text)
    if odd := [name for name in names if not (name.isdecimal() and len(name) < 5 and 1 <= int(name) <= 4096)]:
        raise UserError(f"batch size {odd[0][:60]!r} is not a number from 1 to 4096")
    return tuple(map(int, names)) or (1,)


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


def _line(cells: Sequence[str], widths: Sequence[int] = WIDTHS) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
