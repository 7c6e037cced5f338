"""Samples written to a file for use elsewhere: `gdn2-eval data ruler`.

One JSON object a line, with the fields of the generator the profile stands for (index, input, outputs, length, ...)
and after them ours:

    sample   its number. `index` stays what upstream wrote: in nvidia-main that is the answer's character offset.
    depth    of the first answer's needle, 0..1
    key      asked for; several as the question lists them (needle tasks)

Profile `exact` has the fields of nvidia-main; `input + answer_prefix` is the prompt, and `length` counts it, BOS
included, and the tokens to generate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from evalsuite.types import Generate, Sample, Setting, Tokenizer
from gdn2.errors import StorageError, UserError
from tasks.ruler.more import PREFIXES, RulerTask
from tasks.ruler.niah import NiahTask
from tasks.ruler.templates import query_of

RulerFamily = NiahTask | RulerTask


def records(task: RulerFamily, setting: Setting, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, object]]:
    """What is written, line by line."""
    if isinstance(task, RulerTask):
        yield from _plain(task, setting, tokenizer, count)
    else:
        yield from _needles(task, setting, tokenizer, count)


def _plain(task: RulerTask, setting: Setting, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, object]]:
    if setting.protocol != "exact":
        for made in islice(task.compatible(setting, tokenizer), count):
            yield {**made.record, "sample": made.index}
        return
    for sample in task.samples(setting, tokenizer):
        (request,) = sample.requests
        assert isinstance(request, Generate)
        text = request.prompt.text
        cut = text.rindex(PREFIXES[task.name])
        yield {
            "index": int(sample.id),
            "input": text[:cut],
            "outputs": list(sample.target),
            "length": len(request.prompt.ids) + request.max_tokens,
            "answer_prefix": text[cut:],
            "sample": int(sample.id),
            "depth": sample.depth,
        }


def _needles(task: NiahTask, setting: Setting, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, object]]:
    if setting.protocol != "exact":
        for i, made in enumerate(islice(task.compatible(setting, tokenizer), count)):
            ours = {"sample": i, "depth": made.draft.depth, "key": query_of(made.draft.queries)}
            yield {**made.record, **ours}
        return
    for i, sample in enumerate(task.samples(setting, tokenizer)):
        (request,) = sample.requests
        assert isinstance(request, Generate)
        text = request.prompt.text
        cut = text.rindex("? ") + 1
        body = text[:cut]
        yield {
            "index": i,
            "input": body,
            "outputs": list(sample.target),
            "length": len(request.prompt.ids) + request.max_tokens,
            "answer_prefix": text[cut:],
            "token_position_answer": _position(task, sample, tokenizer),
            "sample": i,
            "depth": sample.depth,
            "key": sample.facts["key"],
        }


def _position(task: NiahTask, sample: Sample, tokenizer: Tokenizer) -> int:
    """Tokens before the first answer, BOS not counted."""
    answer = sample.target[0]
    needles = sample.facts["needles"]
    start = sample.facts["needle_token"]
    assert isinstance(needles, tuple) and isinstance(start, int)
    key = next(key for key, value in needles if value == answer)
    # As it comes out in the middle of a text, where a space belongs to the token after it.
    mark = f".{task.spec.separator}"
    lead = mark + task.spec.needle(key, answer).partition(answer)[0]
    inside = len(tokenizer.encode(lead)) - len(tokenizer.encode(mark.rstrip(" ")))
    return start - (tokenizer.bos_id is not None) + inside


def write_samples(task: RulerFamily, setting: Setting, tokenizer: Tokenizer, out: Path) -> int:
    """Write the samples of one cell to `out`, all or nothing, and return how many.

    Raises UserError for a setting that cannot be met, StorageError where `out` cannot be written.
    """
    count = len(task.samples(setting, tokenizer))
    if count == 0:
        raise UserError("samples must be at least 1, got 0")
    if not out.name:
        raise StorageError(f"cannot write {out}: it is a directory")
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        try:
            with open(partial, "w", encoding="ascii", newline="\n") as file:
                for record in records(task, setting, tokenizer, count):
                    file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
        _sync_directory(out.parent)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    return count


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
