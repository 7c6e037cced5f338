"""Shared stretches: every context comes back whole, and nothing shared is read twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.batching import Segment, share

contexts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12)


def whole(segments: list[Segment], number: int) -> list[int]:
    segment = segments[number]
    before = [] if segment.parent is None else whole(segments, segment.parent)
    return before + segment.ids.tolist()


@given(contexts, st.sampled_from([1, 2, 4]), st.booleans())
def test_every_context_is_the_path_to_its_segment(texts: list[list[int]], chunk: int, merge: bool) -> None:
    segments = share([np.array(t, dtype=np.int32) for t in texts], chunk, merge=merge)
    found = {context: whole(segments, i) for i, s in enumerate(segments) for context in s.contexts}
    assert found == dict(enumerate(texts))
    for i, segment in enumerate(segments):
        assert len(segment.ids)
        for child in segment.children:
            assert segments[child].parent == i
            assert len(whole(segments, i)) % chunk == 0


@given(contexts, st.sampled_from([1, 2, 4]))
def test_each_shared_block_is_read_once(texts: list[list[int]], chunk: int) -> None:
    segments = share([np.array(t, dtype=np.int32) for t in texts], chunk)
    blocks = {tuple(t[: end + chunk]) for t in texts for end in range(0, len(t) - chunk + 1, chunk)}
    tails = {tuple(t) for t in texts if len(t) % chunk}
    assert sum(len(s.ids) for s in segments) == len(blocks) * chunk + sum(len(t) % chunk for t in tails)


def test_a_needle_at_every_depth_reads_the_haystack_about_half_as_often() -> None:
    hay = np.arange(100, 4100, dtype=np.int32)
    texts = [np.concatenate([hay[:at], [i], hay[at:]]).astype(np.int32) for i, at in enumerate(range(0, 4000, 80))]
    read = sum(len(s.ids) for s in share(texts, 64))
    assert read < 0.55 * sum(len(t) for t in texts)
