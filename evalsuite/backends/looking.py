"""Looking at checkpoints and converting them, as the command line asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from evalsuite.backends import opening


def convert(
    source: str, target: Path, to: Literal["native", "fla", "nvlabs"], given: Mapping[str, object]
) -> tuple[str, ...]:
    """Write `source` in another format; see `gdn2.checkpoints.convert` and, for `given`, `opening`."""
    from gdn2.checkpoints.convert import convert as write

    return write(source, target, to, opening(given))


def format_rows() -> list[tuple[str, str, str]]:
    """(format, model type, what it is) of everything that can be opened."""
    from gdn2.checkpoints import listing

    return listing()


COSTS = (
    "model", "what it is", "parameters", "in blocks", "MFLOP/token", "MFLOP/1K past", "state KiB", "cache KiB at 4K",
    "at 128K",
)  # fmt: skip


def cost_rows() -> list[tuple[str, ...]]:
    """`COSTS` of every checkpoint of the package and every preset, from the formulas of their mixers.

    FLOPs of reading one token: at the beginning, and what every 1024 tokens before it add (full attention). State and
    cache are of one sequence: fp32 memory of the recurrent layers at any length, bf16 keys and values of attention.
    """
    from gdn2 import zoo
    from gdn2.checkpoints import describe as look
    from gdn2.models import PRESETS, describe

    configs = [(name, "trained", look(name).config) for name in zoo.names()]
    configs += [(name, "preset", make()) for name, make in PRESETS.items()]
    rows = []
    for name, kind, config in configs:
        if config is None:
            continue
        cost = describe(config)
        flops = (cost["flops_per_token"] / 1e6, 1024 * cost["flops_per_past_token"] / 1e6)
        sizes = [cost[key] / 1024 for key in ("state_bytes", "cache_bytes_4k", "cache_bytes_128k")]
        counts = [f"{cost[key]:,}" for key in ("params", "block_params")]
        rows.append((name, kind, *counts, *(f"{x:,.1f}" if x else "-" for x in (*flops, *sizes))))
    return rows


def checkpoint_lines(name: str, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(what, value) lines about a checkpoint, from its headers; reasons why it would be refused come last."""
    from gdn2.checkpoints import describe

    found = describe(name, opening(given))
    yield "path", str(found.path)
    yield "format", found.format or "unknown"
    for file, size in found.files.items():
        yield "file", f"{file}, {size:,} bytes"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.dtypes.items())
    yield "parameters", f"{found.parameters:,} in {found.tensors} tensors ({kinds or 'not read'})"
    if (config := found.config) is not None:
        layers = Counter(config.mixers[kind]["mixer"] for kind in config.pattern)
        yield "layers", ", ".join(f"{count} {kind}" for kind, count in layers.items())
        for key, value in config.to_dict().items():
            if key not in ("pattern", "mixers", "name"):
                yield key, str(value)
        for kind, options in config.mixers.items():
            yield kind, " ".join(f"{key}={value}" for key, value in options.items())
    yield "tokenizer", found.tokenizer or "none: name one with --tokenizer"
    yield "digest", found.digest or "none"
    for reason in found.refused:
        yield "refused", reason
