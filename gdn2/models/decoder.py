"""The model on one page: embedding, layers of mixer and SwiGLU, norm, output head.

Axes: N sequences, T tokens of all sequences together (packed, never padded), D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdn2 import numerics
from gdn2.kernels import Implementation
from gdn2.kernels.contract import SPLIT
from gdn2.mixers import Mixer, build
from gdn2.mixers.conv import ShortConv
from gdn2.mixers.linear import BLOCK, Linear, blocked, rows_at_once
from gdn2.models.config import ModelConfig
from gdn2.models.state import LayerState, State
from gdn2.ragged import Ragged

# Rows of one matrix product: of prompts, and of a step of decoding. A step of few rows fills a block with zeros, which
# costs a CPU their arithmetic; a GPU's smallest tile is as large, and larger ones suit its prompts.
PROMPT_ROWS = {"cpu": 64, "cuda": 256}
STEP_ROWS = {"cpu": 16, "cuda": 64}

FP32_PARAMETERS = ("A_log", "dt_bias")  # rates of decay, never rounded to half precision


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return numerics.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Linear(d, width), Linear(d, width), Linear(width, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(numerics.silu_times(self.gate(x), self.up(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        options = dict(config.mixers[name])
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: Mixer = build(options.pop("mixer"), config.d_model, options)
        if config.d_ff is not None:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = SwiGLU(config.d_model, config.d_ff)
        self.has_mlp = config.d_ff is not None
        self.norm_after = name in config.post_norm

    def mixer_input(self, x: Tensor) -> Tensor:
        """What the mixer reads of the residual stream x [T, D]."""
        return self._before(self.mixer_norm, x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream x [T, D] after the mixer's output y [T, D] and the MLP."""
        x = x + self._after(self.mixer_norm, y)
        return x + self._after(self.mlp_norm, self.mlp(self._before(self.mlp_norm, x))) if self.has_mlp else x

    def _before(self, norm: RMSNorm, x: Tensor) -> Tensor:
        return (x if self.norm_after else norm(x)).to(norm.weight.dtype)

    def _after(self, norm: RMSNorm, y: Tensor) -> Tensor:
        return norm(y) if self.norm_after else y


class Decoder(nn.Module):
    """A causal language model over packed sequences.

    A row's numbers do not depend on the other rows, unless `fast` is set: then products are made of all rows at once.
    With `recompute` a layer keeps its input alone for the backward pass and runs again there, to the same bits.
    """

    fast = False
    recompute = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.d_model)
        if not weight.is_meta:  # a draw on the meta device imports torch's decompositions: a second at every start
            weight.normal_()
        self.embed = nn.Embedding(config.vocab_size, config.d_model, _weight=weight)
        self.layers = nn.ModuleList(Layer(config, name) for name in config.pattern)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.head = Linear(config.d_model, config.vocab_size)

    def blocks(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in self.layers]

    def forward(self, ids: Tensor, ragged: Ragged, state: State | None = None) -> tuple[Tensor, State]:
        """Read packed tokens ids [T], continuing from `state` where given.

        Returns:
            hidden [T, D] after the final norm (see `logits`), and the state after each sequence. `state` is unchanged.
        """
        if ids.ndim != 1 or ids.shape[0] != ragged.n_tokens:
            raise ValueError(f"ids must be the {ragged.n_tokens} packed tokens of the batch, got {list(ids.shape)}")
        x = self._embedded(ids)
        layers = []
        for i, layer in enumerate(self.blocks()):
            through = (layer, x, ragged, None if state is None else state.layers[i])
            if self.recompute and torch.is_grad_enabled():
                x, new = checkpoint(self._through, *through, use_reentrant=False, preserve_rng_state=False)
            else:
                x, new = self._through(*through)
            layers.append(new)
        return self._final(x), State(layers, ragged.counts.clone() if state is None else state.seen + ragged.counts)

    def _through(
        self, layer: Layer, x: Tensor, ragged: Ragged, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        with self._products(PROMPT_ROWS):
            y, new = layer.mixer(layer.mixer_input(x), ragged, state)
            return layer.add(x, y), new

    def step(self, ids: Tensor, state: State) -> Tensor:
        """One more token ids [N] of each sequence: hidden [N, D]; `state` moves on in place."""
        x = self._embedded(ids)
        with self._products(STEP_ROWS):
            for layer, layer_state in zip(self.blocks(), state.layers, strict=True):
                x = layer.add(x, layer.mixer.step(layer.mixer_input(x), layer_state))
        state.seen += 1
        return self._final(x)

    @contextmanager
    def _products(self, rows: Mapping[str, int]) -> Iterator[None]:
        """Products of so many rows a block and, without gradients, no sequence split: it may be cut at will then."""
        token = SPLIT.set(SPLIT.get() and (self.fast or torch.is_grad_enabled()))
        try:
            with rows_at_once(None if self.fast else rows.get(self.embed.weight.device.type, BLOCK)):
                yield
        finally:
            SPLIT.reset(token)

    def _embedded(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x.float() if self.config.residual_fp32 and x.dtype != torch.float64 else x

    def _final(self, x: Tensor) -> Tensor:
        return self.norm(x).to(self.norm.weight.dtype)

    def logits(self, hidden: Tensor, *, stepped: bool = False) -> Tensor:
        """Next-token logits [n, vocabulary] of hidden [n, D] from `forward`, or `step`; in fp32 outside training."""
        with self._products(STEP_ROWS if stepped else PROMPT_ROWS):
            out = _product(hidden, self.embed.weight if self.config.tied else self.head.weight)
        return out if torch.is_grad_enabled() else out.float()

    def new_state(self, n: int) -> State:
        """The state of n sequences that have not begun."""
        device = self.embed.weight.device
        seen = torch.zeros(n, dtype=torch.int64, device=device)
        return State([layer.mixer.new_state(n) for layer in self.blocks()], seen)

    def use(self, implementation: Implementation | None) -> Decoder:
        """Choose the kernels of every mixer; None chooses from the device."""
        for part in self.modules():
            if isinstance(part, (Mixer, ShortConv)):
                part.implementation = implementation
        return self

    def cast(self, dtype: torch.dtype) -> Decoder:
        """All parameters to `dtype`, except the rates of decay, which stay fp32."""
        for name, parameter in self.named_parameters():
            if name.rsplit(".", 1)[-1] not in FP32_PARAMETERS:
                parameter.data = parameter.data.to(dtype)
        return self

    def reset_parameters(self, seed: int, mixer_gain: float | None = None) -> None:
        """Fresh parameters, the same for the same seed. MLP outputs shrink with depth, as in the published models.

        With `mixer_gain` the mixers' matrices are Xavier-uniform of that gain. The published 2^-2.5 starts narrow
        mixers so close to zero that retrieval is not learnt for a long time.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.embed.weight, std=0.02)
            if not self.config.tied:
                nn.init.normal_(self.head.weight, std=0.02)
            for layer in self.blocks():
                layer.mixer.reset_parameters()
                for part in layer.mixer.modules():
                    if mixer_gain is not None and isinstance(part, Linear):
                        nn.init.xavier_uniform_(part.weight, gain=mixer_gain)
                if layer.has_mlp:
                    for linear in (layer.mlp.gate, layer.mlp.up, layer.mlp.down):
                        nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
                    layer.mlp.down.weight.data /= (2 * self.config.n_layers) ** 0.5

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def n_block_params(self) -> int:
        """Parameters without embedding, output head and final norm: what "1.3B" counts."""
        return sum(p.numel() for p in self.layers.parameters())


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled() or hidden.shape[0] == 0:
        return nn.functional.linear(hidden, weight)
    return blocked(hidden, weight)
