"""Batches are the same whoever makes them."""

from pathlib import Path

import numpy as np
import pytest

import gdn2
from gdn2.errors import DataError, UserError
from gdn2.train.data import Batches, Opening, TextRows, make_batch
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
