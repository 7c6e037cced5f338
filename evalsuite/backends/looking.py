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
