"""The checkpoints that ship: whole, small, and alike where the line-up says so."""

from dataclasses import replace

import pytest

from gdn2 import zoo
from gdn2.checkpoints import native, open_model
from gdn2.models import PRESETS, describe
from gdn2.models.presets import SCALES

LINEUP = sorted(set(zoo.names()) & set(SCALES["tiny"].d_ff))
LARGEST = 60e6  # bytes, all together


def test_all_of_it_is_small() -> None:
    assert sum(file.stat().st_size for file in zoo.DIRECTORY.rglob("*") if file.is_file()) <= LARGEST


@pytest.mark.parametrize("name", zoo.names())
def test_a_checkpoint_is_whole_has_the_tokenizer_of_all_and_a_card(name: str) -> None:
    loaded = open_model(name)
    path = zoo.path(name)
    assert path is not None and loaded.name == name and loaded.format == "native"
    assert native.file_digest(path / native.TOKENIZER) == native.file_digest(zoo.DIRECTORY / native.TOKENIZER)
    assert loaded.config.vocab_size == loaded.tokenizer.vocab_size  # type: ignore[union-attr]
    assert (path / "README.md").read_text().startswith(f"# {name}\n")


@pytest.mark.parametrize("name", LINEUP)
def test_a_model_of_the_line_up_is_its_preset_and_says_how_it_was_trained(name: str) -> None:
    header = native.read_header(zoo.path(name))  # type: ignore[arg-type]
    assert replace(header.config, train_length=None) == replace(PRESETS[f"{name}-tiny"](), train_length=None)
    training = [native.read_header(zoo.path(n)).extra["training"] for n in LINEUP]  # type: ignore[arg-type]
    assert {"seed", "step", "tokens", "device", "digest"} <= set(training[0])
    assert len({t["seed"] for t in training}) == 1


def test_the_line_up_is_matched() -> None:
    totals = [describe(PRESETS[f"{name}-tiny"]())["params"] for name in SCALES["tiny"].d_ff]
    assert max(totals) / min(totals) < 1.03
