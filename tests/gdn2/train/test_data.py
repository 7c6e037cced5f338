"""Batches are the same whoever makes them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gdn2
from gdn2.errors import DataError, UserError
from gdn2.train.data import STRIDE, Batches, Opening, TextRows, make_batch
from tests.gdn2.train.sources import open_copies

MIXTURE = {"length": (10, 14), "bare": False, "text_weight": 0.1}
TOKENIZER = Path(gdn2.__file__).parent / "zoo" / "tokenizer.json"


def opening(**fields: object) -> Opening:
    return Opening(open_copies, Path(), (), {**MIXTURE, **fields}, seed=7)


def test_batches_fill_the_budget_without_splitting_documents() -> None:
    source = opening().open()
    batch = make_batch(source, 3, 100)
    assert sum(batch.lengths) == len(batch.ids) == len(batch.weights) <= 100 < sum(batch.lengths) + 14
    starts = np.cumsum([0, *batch.lengths[:-1]])
    assert (batch.weights[starts] == 0).all() and (batch.ids[starts] == 0).all()
    assert len(make_batch(source, 3, 1).lengths) == 1


def test_workers_change_nothing() -> None:
    alone = Batches(opening(), 60, 5, workers=0)
    pool = Batches(opening(), 60, 5, workers=2)
    try:
        for _ in range(9):
            a, b = alone.take(), pool.take()
            assert a.lengths == b.lengths and (a.ids == b.ids).all() and (a.weights == b.weights).all()
    finally:
        pool.close()


def test_a_mistake_inside_a_worker_reaches_the_user() -> None:
    pool = Batches(opening(bare=True), 60, 0, workers=1)
    try:
        with pytest.raises(UserError, match="copies cannot be bare"):
            pool.take()
    finally:
        pool.close()


def test_text_rows_cover_their_own_split(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{i:03d}" for i in range(1000)))
    ids = {}
    for split in ("train", "eval"):
        rows = TextRows(TOKENIZER, (file,), {"length": (30, 60), "text_weight": 0.5}, 1, split)
        documents = [rows.document(i) for i in range(50)]
        assert all(30 <= len(row) <= 60 and w[0] == 0 and (w[1:] == 0.5).all() for row, w in documents)
        ids[split] = {tuple(row[:9]) for row, _ in documents}
        assert (rows.document(4)[0] == documents[4][0]).all()
    assert ids["train"].isdisjoint(ids["eval"])


def test_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    mixture = {"length": (30, 30), "text_weight": 1.0}
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("few words")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="fewer than length 30"):
        TextRows(TOKENIZER, (short,), mixture, 0, "train")
    with pytest.raises(DataError, match="binary.txt as UTF-8"):
        TextRows(TOKENIZER, (binary,), mixture, 0, "train")


class Counted:
    """Document i is i + 1 tokens long and holds its own number, as far as it goes."""

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = index % STRIDE + 1
        return np.full(size, index, np.int32), np.concatenate([[0], np.ones(size - 1)]).astype(np.float32)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 9))
def test_a_batch_takes_documents_in_order_until_one_does_not_fit(number: int, tokens: int, fill: int) -> None:
    batch = make_batch(Counted(), number, tokens, fill)
    sizes = [max(i + 1, fill) for i in range(len(batch.lengths))]
    assert list(batch.lengths) == sizes and len(batch.ids) == len(batch.weights) == sum(sizes)
    following = max(len(sizes) + 1, fill)
    assert len(sizes) == 1 or sum(sizes) <= tokens
    assert sum(sizes) + following > tokens
    starts = np.cumsum([0, *sizes[:-1]])
    assert [batch.ids[start] for start in starts] == [number * STRIDE + i for i in range(len(sizes))]
    # What fills a document up repeats its last token and weighs nothing.
    for i, start in enumerate(starts):
        assert (batch.weights[start + i + 1 : start + sizes[i]] == 0).all()
        assert (batch.ids[start : start + sizes[i]] == number * STRIDE + i).all()


def test_rows_of_text_end_inside_it_and_the_splits_share_nothing(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(400))
    (tmp_path / "a.txt").write_text(words, encoding="utf-8")
    (tmp_path / "b.txt").write_text("é北京🙂 " * 20, encoding="utf-8")
    mixture = {"length": (3, 9), "text_weight": 0.25}
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    train, held_out = (TextRows(TOKENIZER, files, mixture, 1, split) for split in ("train", "eval"))
    assert len(train._ids) == 9 * (len(train._ids) + len(held_out._ids)) // 10
    seen = set()
    for index in range(200):
        ids, weights = train.document(index)
        assert 3 <= len(ids) <= 9 and ids.dtype == np.int32 and weights.dtype == np.float32
        assert weights[0] == 0 and (weights[1:] == 0.25).all()
        seen.add(len(ids))
        again, _ = train.document(index)
        assert (again == ids).all()
    assert seen == set(range(3, 10))
    whole = TextRows(TOKENIZER, files, {"length": (len(train._ids),) * 2, "text_weight": 1.0}, 1, "train")
    assert (whole.document(3)[0] == train._ids).all()  # the longest row there is
    with pytest.raises(
        DataError, match=f"the eval part of the text has {len(held_out._ids)} tokens, fewer than length"
    ):
        TextRows(TOKENIZER, files, {**mixture, "length": (1, len(held_out._ids) + 1)}, 1, "eval")
