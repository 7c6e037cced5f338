"""The weighted loss and exact answers, against a plain computation."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gdn2.models import Decoder
from gdn2.ragged import Ragged
from gdn2.train.data import Batch, make_batch
from gdn2.train.loss import evaluate, place, weighted_loss
from tests.gdn2.train.sources import Copies

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny) -> Decoder:
    out = Decoder(tiny().model)
    out.reset_parameters(1)
    return out


@pytest.fixture
def batch() -> Batch:
    return make_batch(Copies(3, "train", (10, 14)), 0, 60)


def test_loss_is_the_weighted_sum_over_documents(model: Decoder, batch: Batch) -> None:
    total, right = weighted_loss(model, place(batch, CPU))
    start, expected, hits = 0, 0.0, []
    for n in batch.lengths:
        ids = torch.from_numpy(batch.ids[start : start + n]).long()
        weights = torch.from_numpy(batch.weights[start : start + n])
        logits = model.logits(model(ids, Ragged([n]))[0])
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        expected += (losses * weights[1:]).sum().item()
        hits += (logits[:-1].argmax(-1) == ids[1:]).tolist()
        start += n
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert right.tolist() == hits


class Oracle:
    """Stands for a model: says token ids[t + 1] but at the places `wrong`."""

    def __init__(self, ids: np.ndarray, wrong: tuple[int, ...]) -> None:
        said = torch.from_numpy(np.roll(ids, -1)).long()
        said[list(wrong)] += 1
        self.said = F.one_hot(said, 40).float() * 50

    def __call__(self, ids: torch.Tensor, ragged: Ragged) -> tuple[torch.Tensor, None]:
        return self.said, None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_an_answer_is_exact_when_all_of_its_tokens_are(batch: Batch) -> None:
    n = len(batch.lengths)
    assert evaluate(Oracle(batch.ids, ()), [batch], CPU).exact == 1.0
    end = batch.lengths[0]
    result = evaluate(Oracle(batch.ids, (end - 3, end - 2)), [batch], CPU)
    assert result.exact == pytest.approx((n - 1) / n)
    assert result.tokens == pytest.approx((3 * n - 2) / (3 * n))
    filler = evaluate(Oracle(batch.ids, (4,)), [batch], CPU)
    assert filler.exact == 1.0 and filler.loss > 0.01


def test_text_has_a_loss_and_no_answers(model: Decoder) -> None:
    plain = Batch(np.arange(10, dtype=np.int32), np.array([0.0] + [0.5] * 9, dtype=np.float32), (10,))
    result = evaluate(model, [plain], CPU)
    assert result.exact is None and result.tokens is None and result.loss == pytest.approx(np.log(32), abs=0.3)
