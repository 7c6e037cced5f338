"""What a model is, as data: sizes, a pattern of layers, and the options of each mixer in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

LIMITS = {"d_model": 1 << 17, "d_ff": 1 << 20, "vocab_size": 1 << 21, "n_layers": 1 << 12}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: x += mixer(norm(x)); x += mlp(norm(x)) per layer, then a norm and the output head."""

    d_model: int
    vocab_size: int
    pattern: tuple[str, ...]  # one name of `mixers` a layer
    mixers: Mapping[str, Mapping[str, Any]]  # name -> {"mixer": registry name, options...}
    d_ff: int | None = None  # SwiGLU width; None leaves the MLP out
    tied: bool = False  # output head is the embedding
    norm_eps: float = 1e-5
    post_norm: tuple[str, ...] = ()  # layers whose norms come after: x += norm(mixer(x)); x += norm(mlp(x))
    residual_fp32: bool = False  # x itself stays fp32 in a model of half precision (mamba_ssm)
    train_length: int | None = None  # tokens the model was trained on, for plots
    name: str = field(default="model", compare=False)

    def __post_init__(self) -> None:
        for key, value in {"d_model": self.d_model, "vocab_size": self.vocab_size, "d_ff": self.d_ff or 1}.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LIMITS[key]:
                raise ValueError(f"{key} must be an integer from 1 to {LIMITS[key]}, got {value!r}")
        if not 1 <= len(self.pattern) <= LIMITS["n_layers"]:
            raise ValueError(f"pattern must name 1 to {LIMITS['n_layers']} layers, got {len(self.pattern)}")
        if unknown := sorted(set(self.pattern) - set(self.mixers)):
            raise ValueError(f"pattern names {unknown[0]!r}, which is not in mixers ({', '.join(self.mixers)})")
        if unknown := sorted(set(self.post_norm) - set(self.mixers)):
            raise ValueError(f"post_norm names {unknown[0]!r}, which is not in mixers ({', '.join(self.mixers)})")
        if not (isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1 and math.isfinite(self.norm_eps)):
            raise ValueError(f"norm_eps must lie between 0 and 1, got {self.norm_eps!r}")
        for name, options in self.mixers.items():
            if not isinstance(options, Mapping) or "mixer" not in options:
                raise ValueError(f"mixers[{name!r}] must name its mixer, got {options!r}")

    @property
    def n_layers(self) -> int:
        return len(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        data = asdict(self)
        data["pattern"], data["post_norm"] = list(self.pattern), list(self.post_norm)
        data["mixers"] = {name: dict(options) for name, options in self.mixers.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read `to_dict`'s form.

        Raises:
            ValueError: a key that is unknown or missing, or a value out of range; the message names it.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"unknown key {unknown[0]!r} in the model configuration; known: {', '.join(sorted(known))}"
            )
        if missing := sorted({"d_model", "vocab_size", "pattern", "mixers"} - set(data)):
            raise ValueError(f"the model configuration lacks {missing[0]!r}")
        if not isinstance(data["pattern"], list | tuple) or not isinstance(data["mixers"], Mapping):
            raise ValueError("pattern must be a list of names and mixers a table of them")
        if not isinstance(data.get("post_norm", []), list | tuple):
            raise ValueError(f"post_norm must be a list of names, got {data['post_norm']!r}")
        return cls(**{**data, "pattern": tuple(data["pattern"]), "post_norm": tuple(data.get("post_norm", ()))})
