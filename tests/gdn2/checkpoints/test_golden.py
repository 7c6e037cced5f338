"""Golden checkpoints of other codes: our logits and greedy tokens are theirs, by prefill and by decoding."""

from pathlib import Path

import pytest

from tests.gdn2.checkpoints import golden

NAMES = ["fla_gated_deltanet_gva", "fla_kda_gva", "nvlabs_gdn1_recurrent", "nvlabs_gdn2_recurrent"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_by_prefill_and_by_decoding(shared: Path, name: str) -> None:
    directory = shared / "golden" / "checkpoints" / name
    model, ids = golden.opened(directory).model, golden.inputs(directory)
    theirs = golden.recorded(directory)
    for ours in (golden.prefill(model, ids), golden.decode(model, ids)):
        for mine, wanted in zip(ours, theirs, strict=True):
            assert golden.error(mine, wanted) < golden.TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_equal(shared: Path, name: str) -> None:
    directory = shared / "golden" / "checkpoints" / name
    model = golden.opened(directory).model
    assert golden.continue_greedily(model, golden.inputs(directory), 20) == golden.greedy(directory)
