"""What was asked, for some of the samples: prompts made again and cut to the needles and the question.

Records do not hold prompts, which a run can make again. Only what has the record's key is shown: the key hashes the
prompt, so it is the one the model read. No model is loaded for that, only its tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from evalsuite import backends, runfile, show
from evalsuite.names import task_options
from evalsuite.plan import Cell, key_base
from evalsuite.progress import Progress
from evalsuite.reports import frame
from evalsuite.types import ModelInfo, Sample, Setting, Task
from gdn2 import env
from gdn2.errors import DataError, UserError

if TYPE_CHECKING:
    import pandas as pd

MOST = 2_000  # excerpts of one page
TOKENS = 1 << 26  # of the prompts made again for one page
HEAD, AROUND, TAIL = 120, 240, 360  # characters kept at the start, around a needle, and at the end
WHOLE = 1_200  # characters of a prompt that is shown whole
_WORD = re.compile(r"[\w-]+")
_NUMBER = re.compile("[0-9]{1,5}")  # a sample's place in its cell; the samples before it may have to be made

Resolve = Callable[[str], Sequence[Task]]
# A text and what it is: "" plain, "needle" asked for, "distractor" another needle, "cut" a number of characters.
Part = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Samples of one cell of one run, whose prompts are to be made: key by sample id."""

    run: Path
    task: str
    protocol: str
    length: int
    seed: int
    keys: Mapping[str, str]


def excerpts(
    paths: Sequence[Path], rows: pd.DataFrame, count: int, resolve: Resolve, progress: Progress
) -> tuple[dict[str, list[Part]], list[str]]:
    """Excerpts by record key for the first `count` samples of each cell among `rows`, and why some are missing.

    `rows` are by cell and sample. Fewer than `count` where that would be more than `MOST` in all; the shortest prompts
    first, until `TOKENS` are made.
    """
    found: dict[str, list[Part]] = {}
    reasons: dict[str, None] = {}
    wanted = _wanted(paths, rows, count)
    progress.start(sum(len(item.keys) for item in wanted), sum(item.length * len(item.keys) for item in wanted))
    models: dict[Path, _Model | str] = {}
    left = TOKENS
    for item in sorted(wanted, key=lambda item: item.length):
        left -= item.length * len(item.keys)
        if left < 0:
            reasons[f"prompts of {item.length} tokens and more are not shown: making them would take long"] = None
            break
        if item.run not in models:
            models[item.run] = _model(item.run)
        model = models[item.run]
        if isinstance(model, str):
            reasons[f"{item.run.name}: {model}"] = None
            continue
        try:
            with env.using_data(model.data):
                for key, sample in model.samples(item, resolve):
                    found[key] = cut(sample)
                    progress.advance(item.length, failed=False)
        except UserError as error:
            reasons[f"{item.run.name}, {item.task}: {error}"] = None
    progress.close()
    return found, list(reasons)


def _wanted(paths: Sequence[Path], rows: pd.DataFrame, count: int) -> list[_Wanted]:
    runs = {run.name: run for path in paths for run in frame.expand(path) if (run / runfile.NAME).is_file()}
    here = rows[rows["run_id"].isin(list(runs))].drop_duplicates("key")
    names = ["run_id", "cell", "task", "protocol", "length", "seed"]
    cells = here.groupby(names, observed=True, sort=False)
    count = min(count, MOST // max(len(cells), 1))
    found = []
    for (run_id, _, task, protocol, length, seed), group in cells:
        first = group.head(count)
        keys = dict(zip(first["sample_id"].astype("str"), first["key"].astype("str"), strict=True))
        found.append(_Wanted(runs[run_id], task, protocol, int(length), int(seed), keys))
    return [item for item in found if item.keys]


class _Model:
    """The tokenizer and the settings of a run."""

    def __init__(self, run: Path) -> None:
        content, passed = runfile.read(run), show.passed(run)
        try:
            self.info = ModelInfo(**{field.name: content["model"][field.name] for field in fields(ModelInfo)})
            name = str(passed["model"])
            key_base(self.info)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{run / runfile.NAME} does not say what the model was ({error!r:.60})") from None
        self.options = task_options(passed)
        self.data = str(passed["data"]) if passed.get("data") else None
        tokenizer = backends.tokenizer_of(name, passed)
        if tokenizer is None or tokenizer.digest != self.info.tokenizer:
            raise DataError(f"the tokenizer of {name} is not the one of the run")
        self.tokenizer = tokenizer

    def samples(self, item: _Wanted, resolve: Resolve) -> Iterator[tuple[str, Sample]]:
        """Key and sample of those wanted that can be made again."""
        (task,) = resolve(item.task)
        numbers = {name: int(name) for name in item.keys if _NUMBER.fullmatch(name)}
        count = max(numbers.values(), default=0) + 1
        setting = Setting(item.protocol, item.length or None, count, item.seed, self.options)
        cell = Cell(task, setting, self.tokenizer)
        base = key_base(self.info)
        made = cell.samples()
        for name, key in item.keys.items():
            sample = made[numbers[name]] if numbers.get(name, len(made)) < len(made) else None
            if sample is None or sample.id != name:
                sample = next((other for other in made if other.id == name), None)
            if sample is None or cell.entry(sample, base).key != key:
                raise DataError("the task or its data have changed since: these prompts cannot be made again")
            yield key, sample


def _model(run: Path) -> _Model | str:
    try:
        return _Model(run)
    except UserError as error:
        return str(error)


def cut(sample: Sample) -> list[Part]:
    """The prompt of a sample around what matters in it, as parts in order."""
    text = _text(sample)
    values = _values(sample)
    if len(text) <= WHOLE:
        return _marked(text, values)
    windows = [(0, HEAD), (len(text) - TAIL, len(text))]
    for value in sample.target:
        if value and values and (at := text.find(value)) >= 0:
            windows.append((max(0, at - AROUND), min(len(text), at + len(value) + AROUND)))
    parts: list[Part] = []
    end = 0
    for start, stop in _merged(windows):
        if start > end:
            parts.append((f"{start - end:,}", "cut"))
        parts += _marked(text[start:stop], values)
        end = stop
    return parts


def _text(sample: Sample) -> str:
    """The prompt; of several what they share, and below it how each goes on."""
    texts = [show.prompt_text(request) for request in sample.requests]
    if len(texts) == 1:
        return texts[0]
    shared = re.sub(r"\S*$", "", commonprefix(texts))
    return "\n> ".join([shared.rstrip(), *(text[len(shared) :] for text in texts)])


def _values(sample: Sample) -> dict[str, str]:
    """What each needle's value is: asked for, or a distractor."""
    needles = sample.facts.get("needles", ())
    values = [str(needle[1]) for needle in needles] if isinstance(needles, tuple | list) else []
    return {value: "needle" if value in sample.target else "distractor" for value in values}


def _merged(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(windows):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _marked(text: str, values: Mapping[str, str]) -> list[Part]:
    """`text` with the sentences that hold a value told from the rest."""
    parts: list[Part] = []
    end = 0
    for found in _WORD.finditer(text):
        kind = values.get(found[0])
        if kind is None or found.start() < end:
            continue
        start = max(text.rfind("\n", end, found.start()), text.rfind(". ", end, found.start()) + 1, end - 1) + 1
        start += len(text[start : found.start()]) - len(text[start : found.start()].lstrip())
        stops = [at for mark in (".", "\n") if (at := text.find(mark, found.end())) >= 0]
        stop = min(stops, default=len(text))
        stop += text[stop : stop + 1] == "."
        parts += [(text[end:start], ""), (text[start:stop], kind)]
        end = stop
    return [part for part in [*parts, (text[end:], "")] if part[0]]
