"""Which stretches of tokens a set of contexts shares, so that each is read once and its state copied.

Contexts are merged into a forest over blocks of `chunk` tokens: two contexts share their common prefix, rounded down to
whole blocks, and equal contexts share everything. Reading from a state is bit for bit the same as reading on where the
cut is a multiple of the chunk length, so an answer never depends on what it was merged with. A stretch whose sharing
saves too little to be worth a batch of its own is read by each of those behind it instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from evalsuite.types import Ids


@dataclass(slots=True)
class Segment:
    """A stretch of tokens that is read once, from the end of `parent`."""

    ids: Ids
    parent: int | None
    children: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)  # the contexts that end here


def share(contexts: Sequence[Ids], chunk: int, *, merge: bool = True, worth: int = 0) -> list[Segment]:
    """Cut contexts into a forest of segments.

    Args:
        contexts: token ids from the first token of each sequence.
        chunk: tokens; contexts part at multiples of it.
        merge: off gives every context a segment of its own.
        worth: tokens that the sharing of a stretch must save, or else it is read more than once.
    """
    if not merge:
        return [Segment(ids, None, contexts=[i]) for i, ids in enumerate(contexts)]
    # Big-endian bytes sort like the token ids they hold, so neighbours share the longest prefixes.
    keys = [np.ascontiguousarray(ids, dtype=">u4").tobytes() for ids in contexts]
    order = sorted(range(len(contexts)), key=keys.__getitem__)
    segments: list[Segment] = []
    path: list[tuple[int, int]] = []  # (segment, tokens up to its end) of the previous context
    for previous, index in zip([None, *order], order, strict=False):
        if previous is not None and keys[previous] == keys[index]:
            segments[path[-1][0]].contexts.append(index)
            continue
        ids = contexts[index]
        common = 0 if previous is None else _common(contexts[previous], ids) // chunk * chunk
        _cut(segments, path, common)
        parent, begin = path[-1] if path else (None, 0)
        if begin == len(ids) and parent is not None:
            segments[parent].contexts.append(index)
            continue
        path.append((_add(segments, ids[begin:], parent), len(ids)))
        segments[path[-1][0]].contexts.append(index)
    return _without_small_savings(segments, worth) if worth else segments


def _without_small_savings(segments: list[Segment], worth: int) -> list[Segment]:
    """The forest without the inner segments that save fewer than `worth` tokens: those behind them begin with theirs.

    From the roots on, so that what a segment took over counts for it.
    """
    kept: list[Segment] = []
    waiting: list[tuple[Segment, int | None]] = [(segment, None) for segment in segments if segment.parent is None]
    while waiting:
        segment, parent = waiting.pop()
        readers = len(segment.children) + bool(segment.contexts)
        children = [segments[child] for child in segment.children]
        if children and len(segment.ids) * (readers - 1) < worth:
            for child in children:
                child.ids = np.concatenate([segment.ids, child.ids])
            waiting += [(child, parent) for child in children]
            if not segment.contexts:
                continue
            children = []
        kept.append(Segment(segment.ids, parent, contexts=segment.contexts))
        if parent is not None:
            kept[parent].children.append(len(kept) - 1)
        waiting += [(child, len(kept) - 1) for child in children]
    return kept


def _common(a: Ids, b: Ids) -> int:
    """Tokens at the start of both."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def _cut(segments: list[Segment], path: list[tuple[int, int]], at: int) -> None:
    """Shorten `path` to the first `at` tokens, splitting the segment across them."""
    while path and path[-1][1] > at:
        segment, end = path.pop()
        begin = path[-1][1] if path else 0
        if begin >= at:
            continue
        whole = segments[segment]
        back = _add(segments, whole.ids[at - begin :], segment)
        segments[back].children = [child for child in whole.children if child != back]
        for child in segments[back].children:
            segments[child].parent = back
        segments[back].contexts, whole.contexts = whole.contexts, []
        whole.ids, whole.children = whole.ids[: at - begin], [back]
        path.append((segment, at))


def _add(segments: list[Segment], ids: Ids, parent: int | None) -> int:
    segments.append(Segment(ids, parent))
    if parent is not None:
        segments[parent].children.append(len(segments) - 1)
    return len(segments) - 1


def windows(ids: Ids, prefix: int, size: int | None) -> Iterator[tuple[Ids, int, Ids]]:
    """Disjoint windows of a document of at most `size` tokens, each with one token of context (lm-eval's rule).

    The last window is filled up with earlier tokens, which are read but not scored.

    Yields:
        tokens to read, how many of their predictions are not scored, the token after each.
    """
    stream = np.concatenate([np.array([prefix], dtype=np.int32), ids])
    size = size or max(len(ids), 1)
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        context = begin if end - begin == size else max(end - size, 0)
        yield stream[context:end], begin - context, stream[context + 1 : end + 1]
