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


@given(contexts, st.sampled_from([1, 2, 4]), st.sampled_from([1, 3, 8, 100]))
def test_what_saves_little_is_read_more_than_once(texts: list[list[int]], chunk: int, worth: int) -> None:
    given_ = [np.array(t, dtype=np.int32) for t in texts]
    segments, all_shared = share(given_, chunk, worth=worth), share(given_, chunk)
    found = {context: whole(segments, i) for i, s in enumerate(segments) for context in s.contexts}
    assert found == dict(enumerate(texts))
    for i, segment in enumerate(segments):
        assert all(segments[child].parent == i for child in segment.children)
        if segment.children:
            assert len(segment.ids) * (len(segment.children) + bool(segment.contexts) - 1) >= worth
            assert len(whole(segments, i)) % chunk == 0
        else:
            assert segment.contexts
    read, least = (sum(len(s.ids) for s in x) for x in (segments, all_shared))
    assert least <= read <= sum(map(len, texts))


def test_a_chain_of_short_stretches_becomes_one_of_few_long_ones() -> None:
    hay = np.arange(100, 4196, dtype=np.int32)
    texts = [np.concatenate([hay[:at], [i], hay[at:]]).astype(np.int32) for i, at in enumerate(range(64, 4096, 64))]
    segments, every = share(texts, 64, worth=512), share(texts, 64)
    assert len([s for s in every if s.children]) > 60 and 6 <= len([s for s in segments if s.children]) <= 8
    assert sum(len(s.ids) for s in segments) < 0.6 * sum(len(t) for t in texts)
