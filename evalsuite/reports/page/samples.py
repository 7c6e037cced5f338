"""The samples that the page's browser holds: chosen by a rule that the page states, as columns.

A page opens with a million records because it holds at most `ROWS` of them. Where there are more, each cell gives the
same number; a record's key is a hash, so those with the smallest keys are a random choice, and the same one every time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evalsuite import schema, store
from evalsuite.reports import frame
from gdn2.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

ROWS = 50_000
LONGEST = 2_000  # characters of one output or target
TEXT = 16_000_000  # characters of all of them together
_KEY = re.compile(rb'"key": "([^"\\]*)"')


class Text(NamedTuple):
    """Target and output of a record, cut, and how long the output was."""

    target: str
    output: str
    characters: int


def choose(rows: pd.DataFrame, limit: int = ROWS) -> tuple[pd.DataFrame, int | None]:
    """At most `limit` of `rows` (columns `cell`, `key`), by cell and sample; and how many a cell gave where some are
    left out."""
    cap = None
    if len(rows) > limit:
        sizes = sorted(rows.groupby("cell").size())
        cap = max(1, _level(sizes, limit))
        rows = rows.sort_values("key", kind="stable").groupby("cell").head(cap).head(limit)
    names = rows["sample_id"].astype("str")
    numbered = names.where(names.str.fullmatch("[0-9]{1,18}"), "-1").astype("int64")
    rows = rows.assign(_number=numbered, _name=names).sort_values(["cell", "_number", "_name", "metric"], kind="stable")
    return rows.drop(columns=["_number", "_name"]).reset_index(drop=True), cap


def _level(sizes: Sequence[int], limit: int) -> int:
    """The largest number that, as the most of each size (ascending), sums to at most `limit`."""
    left = limit
    for i, size in enumerate(sizes):
        if size * (len(sizes) - i) > left:
            return left // (len(sizes) - i)
        left -= size
    return sizes[-1]


def texts(paths: Iterable[Path], rows: pd.DataFrame) -> dict[tuple[str, str], Text]:
    """Targets and outputs of `rows` by (key, metric), read again from the records below `paths`."""
    wanted = set(zip(rows["key"].astype("str"), rows["metric"].astype("str"), strict=True))
    keys = {key.encode() for key, _ in wanted}
    longest = max(200, min(LONGEST, TEXT // max(len(rows), 1)))
    found: dict[tuple[str, str], Text] = {}
    scored: set[tuple[str, str]] = set()
    for run in (run for path in paths for run in frame.expand(path)):
        for file in [run] if run.is_file() else store.record_files(run):
            for record in _records(file, keys):
                name = (record.key, record.metric)
                # As in the frame: the first without an error, else the last.
                if name in wanted and name not in scored:
                    found[name] = Text(record.target[:longest], record.output[:longest], len(record.output))
                    if record.error is None:
                        scored.add(name)
    return found


def _records(file: Path, keys: set[bytes]) -> Iterable[schema.Record]:
    try:
        with open(file, "rb") as lines:
            for line in lines:
                here = _KEY.search(line, 0, 1000)
                if here and here[1] in keys:
                    try:
                        yield schema.from_line(line.decode("utf-8", "replace"))
                    except DataError:
                        continue  # a damaged line, which reading the frame has named
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def columns(rows: pd.DataFrame, found: dict[tuple[str, str], Text]) -> dict[str, Any]:
    """`rows` as one list a column; runs, outcomes and errors as places in a list of their values."""
    names = zip(rows["key"].astype("str"), rows["metric"].astype("str"), strict=True)
    said = [found.get(name, Text("", "", 0)) for name in names]
    return {
        "cell": rows["cell"].to_list(),
        "id": rows["sample_id"].astype("str").to_list(),
        "score": [None if score != score else float(f"{score:.6g}") for score in rows["score"].to_list()],
        "depth": [None if depth != depth else round(depth, 6) for depth in rows["depth"].to_list()],
        "prompt_tokens": rows["prompt_tokens"].to_list(),
        "output_tokens": rows["output_tokens"].to_list(),
        "truncated": rows["truncated_tokens"].to_list(),
        "early": [int(early) for early in rows["decided_early"].to_list()],
        "target": [text.target for text in said],
        "output": [text.output for text in said],
        "characters": [text.characters if text.characters > len(text.output) else 0 for text in said],
        "run": _coded(rows["run_id"]),
        "outcome": _coded(rows["outcome"]),
        "error": _coded(rows["error"]),
        "seed": _coded(rows["seed"]),
    }


def _coded(column: pd.Series[Any]) -> dict[str, list[Any]]:
    import pandas as pd

    codes, values = pd.factorize(column.astype("str"))
    return {"values": [str(value) for value in values], "codes": codes.tolist()}
