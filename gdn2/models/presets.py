"""Named sizes. Widths of the published configurations are data of theirs (arXiv 2605.22791 and its code)."""

from __future__ import annotations

from collections.abc import Callable

from gdn2.models.config import ModelConfig


def _gdn2(name: str, *, d_model: int, n_layers: int, d_ff: int, heads: int, width: int, **rest: object) -> ModelConfig:
    mixer = {"mixer": "gdn2", "n_heads": heads, "d_key": width, "d_value": width}
    return ModelConfig(
        d_model=d_model, d_ff=d_ff, pattern=("gdn2",) * n_layers, mixers={"gdn2": mixer}, name=name,
        **{"vocab_size": 32000, "train_length": 4096, **rest},  # type: ignore[arg-type]
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    # As published: the code's configuration has width 2304, the paper's text says 2048.
    "gdn2-1.3b": lambda: _gdn2("gdn2-1.3b", d_model=2304, n_layers=18, d_ff=6208, heads=16, width=128),
    "gdn2-1.3b-d2048": lambda: _gdn2("gdn2-1.3b-d2048", d_model=2048, n_layers=18, d_ff=6208, heads=16, width=128),
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`.

    Raises:
        KeyError: no such preset.
    """
    return PRESETS[name]()
