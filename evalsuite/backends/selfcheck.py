"""Proof, on the model at hand, that the engine's short cuts change nothing: done before every run.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evalsuite.backends.reading import CHUNK
from gdn2.models import Decoder, State
from gdn2.ragged import Ragged

TOKENS = 2 * CHUNK + 9  # two whole chunks and a part of one
STEPS = 9  # of decoding, before and behind where a chunk ends; and twice as many from an empty state

# Largest difference of a final hidden state, relative to the largest one. Chunk form and token form add in another
# order, so only they may differ; the bounds are for the rounding of the model's dtype.
RECURRENT_BOUND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}


class SelfCheck(NamedTuple):
    """Largest relative differences of hidden states between two ways to the same answer."""

    chunk_against_recurrent: float
    pieces_against_whole: float
    packed_against_single: float
    copied_against_own_state: float

    def failures(self, dtype: torch.dtype, exact: bool = True) -> list[str]:
        """What is out of bounds, in words. Where products are not exact, all may differ by rounding."""
        loose = RECURRENT_BOUND[dtype]
        bounds = (loose, *[0.0 if exact else loose] * 3)
        return [
            f"{name.replace('_', ' ')} differ by {value:.2g} (bound {bound:.2g})"
            for name, value, bound in zip(self._fields, self, bounds, strict=True)
            if not value <= bound
        ]


@torch.inference_mode()
def self_check(model: Decoder, seed: int = 0) -> SelfCheck:
    """Read the same tokens token by token, in pieces, packed with others, and from a copied state."""
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (TOKENS,), generator=generator).to(device)
    other = torch.randint(model.config.vocab_size, (CHUNK + 1,), generator=generator).to(device)
    whole, _ = model(ids, Ragged([TOKENS], device))

    # Weights may hold values that are not finite: the requests that meet them fail by name, later.
    sound = torch.isfinite(whole).all(-1)

    def relative(found: Tensor) -> float:
        if not sound.any():
            return 0.0
        expected = whole[sound].float()
        return float((found[sound].float() - expected).abs().max() / expected.abs().max())

    recurrent = whole.clone()
    _, across = model(ids[: CHUNK - STEPS], Ragged([CHUNK - STEPS], device))
    for begin, state in ((0, model.new_state(1)), (CHUNK - STEPS, across)):
        for t in range(begin, begin + 2 * STEPS):
            recurrent[t] = model.step(ids[t : t + 1], state)[0]
    front, cut = model(ids[:CHUNK], Ragged([CHUNK], device))
    back, _ = model(ids[CHUNK:], Ragged([TOKENS - CHUNK], device), cut)
    packed, _ = model(torch.cat([other, ids, other]), Ragged([len(other), TOKENS, len(other)], device))
    pool = State.concat([model.new_state(1), cut, model.new_state(1)]).select([2, 1, 0])
    rest = Ragged([len(other), TOKENS - CHUNK, len(other)], device)
    copied, _ = model(torch.cat([other, ids[CHUNK:], other]), rest, pool)
    return SelfCheck(
        relative(recurrent),
        relative(torch.cat([front, back])),
        relative(packed[len(other) : -len(other)]),
        relative(torch.cat([front, copied[len(other) : -len(other)]])),
    )


@torch.inference_mode()
def first_bad_part(model: Decoder, ids: Tensor, piece: int = 8192) -> str:
    """Name of the first part of the model whose output on tokens ids [T] has a value that is not finite.

    Read in pieces of `piece` tokens, so that memory does not grow with T.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, object]], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, object]) -> None:
            y = output if isinstance(output, Tensor) else output[0]
            if not found and not torch.isfinite(y).all():
                found.append(name)

        return hook

    parts: dict[str, nn.Module] = {"embedding": model.embed}
    for i, layer in enumerate(model.blocks()):
        parts |= {f"layer {i} {name}": part for name, part in layer.named_children()}
    parts["final norm"] = model.norm
    hooks = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    try:
        state = None
        for part in ids.split(piece):
            _, state = model(part, Ragged([len(part)], ids.device), state)
            if found:
                break
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else "output head"
