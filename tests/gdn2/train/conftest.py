"""A training run of seconds."""

from pathlib import Path

import pytest

from gdn2.train.config import TrainConfig, parse
from tests.gdn2.train.sources import TOKENIZER


@pytest.fixture
def tiny(tmp_path: Path):
    """`tiny(**tables)`: a configuration; each keyword is merged into the table of that name."""
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)

    def make(**tables: object) -> TrainConfig:
        data = {
            "name": "tiny",
            "tokenizer": "tokenizer.json",
            "model": {
                "d_model": 16,
                "vocab_size": 32,
                "pattern": ["a"],
                "d_ff": 32,
                "mixers": {"a": {"mixer": "gdn2", "n_heads": 1, "d_key": 16, "d_value": 16}},
            },
            "optimizer": {"lr": 1e-2, "warmup_steps": 5},
            "run": {"steps": 20, "log_every": 1, "evaluate_every": 1000, "checkpoint_every": 1000},
            "stages": [{"source": "copies", "length": [10, 14], "batch_tokens": 100}],
        }
        for name, value in tables.items():
            data[name] = {**data[name], **value} if isinstance(value, dict) else value
        return parse(data, tmp_path)

    return make
