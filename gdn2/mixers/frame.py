"""What a mixer is: a layer that lets tokens of one sequence see earlier ones, through a state of known size.

Axes: N sequences, T tokens of all sequences together, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from gdn2.kernels import Implementation
from gdn2.ragged import Ragged

LayerState = dict[str, Tensor]  # every tensor has N first; what one layer remembers of N sequences


class Cost(NamedTuple):
    """What one layer costs. Stated by formula and checked against the built module."""

    params: int
    flops_per_token: int  # forward, recurrent form; a multiply-add is 2; a sliding window counts as full
    state_bytes: int  # a sequence, at bf16 activations and fp32 recurrent state
    flops_per_past_token: int = 0  # full attention: what each earlier token adds to flops_per_token
    bytes_per_token: int = 0  # full attention: what each token adds to state_bytes


class Mixer(nn.Module, ABC):
    """One sequence mixer. A new one is a subclass in its own file and a line in the registry (`gdn2/mixers`).

    `implementation` names the kernels to use; None chooses from the device (see `gdn2.kernels.choose`).
    """

    kind: ClassVar[str]  # "recurrent", "attention", or "hybrid" for both in one layer
    implementation: Implementation | None = None

    @abstractmethod
    def forward(self, x: Tensor, ragged: Ragged, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Mix packed tokens x [T, D], continuing from `state` where given: y [T, D] and the state after each sequence.

        `state` is left as it is. A sequence's result depends on no other sequence and on no later token.
        """

    @abstractmethod
    def step(self, x: Tensor, state: LayerState) -> Tensor:
        """One more token of each of N sequences, x [N, D] to y [N, D]; `state` moves on in place."""

    @abstractmethod
    def new_state(self, n: int) -> LayerState:
        """The state of n sequences that have not begun, on the module's device."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh parameters from torch's global generator."""

    @abstractmethod
    def cost(self) -> Cost:
        """Parameters, FLOPs a token and state bytes a sequence, from the configuration alone."""
