"""Several mixers side by side in one layer, their outputs added (Falcon-H1: softmax attention and Mamba-2).

    y_t = sum_p mixer_p(x)_t

The state is the parts' states, each tensor under its part's name.

Axes: T tokens, N sequences, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gdn2.mixers.frame import Cost, LayerState, Mixer
from gdn2.ragged import Ragged

_DEFAULT = {"attention": {"mixer": "attention"}, "mamba2": {"mixer": "mamba2"}}


@dataclass(frozen=True)
class ParallelConfig:
    """The parts, by name: {"mixer": registry name, options...} as in a model's own table of mixers."""

    d_model: int
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _DEFAULT)

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping) or not self.parts:
            raise ValueError(f"parts must be a table of mixers, got {self.parts!r}")
        for name, options in self.parts.items():
            if not name.isidentifier() or not isinstance(options, Mapping) or "mixer" not in options:
                raise ValueError(f"parts[{name!r}] must name its mixer, got {options!r}")


class Parallel(Mixer):
    """The layer. Parameters of a part are under `parts` and its name."""

    kind = "hybrid"

    def __init__(self, config: ParallelConfig) -> None:
        from gdn2.mixers import build

        super().__init__()
        self.config = config
        built = {}
        for name, given in config.parts.items():
            options = dict(given)
            built[name] = build(options.pop("mixer"), config.d_model, options)
        self.parts = nn.ModuleDict(built)

    def named_parts(self) -> list[tuple[str, Mixer]]:
        """The parts in the order of the configuration, each with the implementation chosen for the layer."""
        found = []
        for name, part in self.parts.items():
            assert isinstance(part, Mixer)
            part.implementation = self.implementation
            found.append((name, part))
        return found

    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        outputs: list[Tensor] = []
        new: LayerState = {}
        for name, part in self.named_parts():
            y, after = part(x, ragged, None if state is None else _of(state, name))
            outputs.append(y)
            new |= {f"{name}.{key}": tensor for key, tensor in after.items()}
        return _added(outputs), new

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        outputs = []
        for name, part in self.named_parts():
            own = _of(state, name)
            outputs.append(part.step(x, own))
            state.update({f"{name}.{key}": tensor for key, tensor in own.items()})  # a cache that grew is a new tensor
        return _added(outputs)

    def new_state(self, n: int) -> LayerState:
        return {f"{name}.{key}": t for name, part in self.named_parts() for key, t in part.new_state(n).items()}

    def reset_parameters(self) -> None:
        """Each part's own initialisation."""
        for _, part in self.named_parts():
            part.reset_parameters()

    def cost(self) -> Cost:
        return Cost(*(sum(values) for values in zip(*(part.cost() for _, part in self.named_parts()), strict=True)))


def _of(state: LayerState, name: str) -> LayerState:
    return {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}


def _added(outputs: list[Tensor]) -> Tensor:
    total = outputs[0]
    for y in outputs[1:]:
        total = total + y
    return total
