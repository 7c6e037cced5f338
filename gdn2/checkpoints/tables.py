"""Checkpoint formats as data: a table says which tensors of theirs are which of ours, and is used in both directions.

A table is strict: applied to a model it must name every parameter once, and a file must hold exactly the tensors it
names. The shapes a file must have come from running the table backwards over the model on the meta device, so nothing
is stated twice and nothing is allocated before everything fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gdn2.checkpoints.safe import Shape, check_values, mismatches, refuse_mismatches
from gdn2.checkpoints.sources import Source
from gdn2.errors import CheckpointError
from gdn2.mixers import REGISTRY
from gdn2.models import Decoder, ModelConfig
from gdn2.models.decoder import FP32_PARAMETERS

Tensors = tuple[Tensor, ...]


def _same(*tensors: Tensor) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Entry:
    """Some tensors of theirs and the parameters of ours that hold the same numbers."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[..., Tensors] = _same  # their tensors -> ours
    save: Callable[..., Tensors] = _same  # ours -> theirs; must also run on the meta device

    def under(self, theirs: str, ours: str) -> Entry:
        """The same entry with prefixes before its names."""
        return Entry(tuple(theirs + n for n in self.theirs), tuple(ours + n for n in self.ours), self.load, self.save)


@dataclass(frozen=True)
class LayerNames:
    """How one layer is called in a format.

    `names` maps a name of ours inside the layer to theirs; a key that ends in `*` maps every name it begins.
    `entries` are tensors that do not correspond one to one, names relative to the layer.
    """

    prefix: str
    names: Mapping[str, str]
    entries: Sequence[Entry] = ()
    ignored: Sequence[str] = ()

    def theirs(self, name: str) -> str:
        if name in self.names:
            return self.prefix + self.names[name]
        for ours, theirs in self.names.items():
            if ours.endswith("*") and name.startswith(ours[:-1]):
                return self.prefix + theirs + name[len(ours) - 1 :]
        raise ValueError(f"no name for parameter {name} in this format")


@dataclass(frozen=True)
class Table:
    """Every tensor of one checkpoint. `ignored` may be there and has no effect (a name, or all that begin with what
    stands before a `*`); `copies` may be there and must be equal to another tensor of theirs (a tied output head that
    was stored twice)."""

    entries: Sequence[Entry]
    ignored: frozenset[str] = frozenset()
    copies: Mapping[str, str] = field(default_factory=dict)
    audit: Callable[[Source], None] | None = None  # looks at values before anything is loaded, and may refuse

    def shapes(self, model: Decoder) -> dict[str, Shape]:
        """Shapes their tensors must have for this model (on any device, meta included)."""
        with torch.device("meta"):
            parameters = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
        return {name: tuple(t.shape) for entry in self.entries for name, t in _saved(entry, parameters)}

    def check(self, source: Source, model: Decoder) -> list[str]:
        """Every way in which the file's tensors differ from what the model needs."""
        prefixes = tuple(name[:-1] for name in self.ignored if name.endswith("*"))
        known = {name for name in source.tensors if prefixes and name.startswith(prefixes)}
        return mismatches(source.tensors, self.shapes(model), {*known, *self.ignored, *self.copies})

    def load(self, source: Source, model: Decoder, device: torch.device | str, *, check: bool = True) -> None:
        """Fill `model`, built on the meta device, from a file that fits.

        Raises:
            CheckpointError: tensors that do not fit, or values no trained model has (NaN, Inf, a matrix of zeros)
                unless `check` is off.
        """
        refuse_mismatches(source.where, self.check(source, model))
        if self.audit is not None:
            self.audit(source)
        parameters = dict(model.named_parameters())
        for copy, original in self.copies.items():
            if copy in source.tensors and not torch.equal(source.read(copy), source.read(original)):
                raise CheckpointError(f"{source.where}: {copy} differs from {original}, which the configuration ties")
        for entry in self.entries:
            found = tuple(source.read(name) for name in entry.theirs)
            if check:
                for name, tensor in zip(entry.theirs, found, strict=True):
                    check_values(source.where, name, tensor)
            for name, tensor in zip(entry.ours, entry.load(*found), strict=True):
                if tensor.shape != parameters[name].shape:
                    raise ValueError(f"{name} came out as {list(tensor.shape)}, not {list(parameters[name].shape)}")
                _assign(model, name, tensor, device)

    def save(self, model: Decoder) -> dict[str, Tensor]:
        """Their tensors of our model, each with memory of its own."""
        parameters = {name: p.detach().cpu() for name, p in model.named_parameters()}
        return {name: t.clone().contiguous() for entry in self.entries for name, t in _saved(entry, parameters)}


def _saved(entry: Entry, parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return list(zip(entry.theirs, entry.save(*(parameters[name] for name in entry.ours)), strict=True))


def _assign(model: nn.Module, name: str, tensor: Tensor, device: torch.device | str) -> None:
    owner, _, leaf = name.rpartition(".")
    tensor = tensor.float() if leaf in FP32_PARAMETERS else tensor
    # A parameter on the meta device cannot be filled in place, so it is replaced.
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device).contiguous(), requires_grad=False))


def build_table(
    model: Decoder, top: Mapping[str, str], layers: Sequence[LayerNames], tied_copy: str | None = None,
    ends: Sequence[Entry] = (),
) -> Table:  # fmt: skip
    """The table of a model whose layers are called as `layers` says and everything else as `top` says.

    Args:
        model: may be on the meta device.
        top: our name -> theirs, for parameters outside the layers; an entry that the model lacks is left out.
        tied_copy: name under which a tied output head may be stored once more.
        ends: entries outside the layers that are not one to one.

    Raises:
        ValueError: a parameter that has no name in the format.
    """
    special = {name for entry in ends for name in entry.ours}
    outside = [name for name, _ in model.named_parameters() if not name.startswith("layers.") and name not in special]
    entries = [*ends, *(Entry((top[name],), (name,)) for name in outside)]
    for i, (layer, names) in enumerate(zip(model.layers, layers, strict=True)):
        ours = f"layers.{i}."
        entries += [entry.under(names.prefix, ours) for entry in names.entries]
        covered = {name for entry in names.entries for name in entry.ours}
        rest = [name for name, _ in layer.named_parameters() if name not in covered]
        entries += [Entry((names.theirs(name),), (ours + name,)) for name in rest]
    ignored = frozenset(names.prefix + name for names in layers for name in names.ignored)
    copies = {tied_copy: top["embed.weight"]} if model.config.tied and tied_copy else {}
    return Table(entries, ignored, copies)


def mixer_config(config: ModelConfig, name: str) -> Any:
    """The options of the layers called `name`, defaults filled in."""
    options = dict(config.mixers[name])
    return REGISTRY[options.pop("mixer")][1](d_model=config.d_model, **options)


def on_meta(config: ModelConfig, where: object) -> Decoder:
    """The model of a configuration, without memory.

    Raises:
        CheckpointError: sizes that do not go together; `where` is named.
    """
    try:
        with torch.device("meta"):
            return Decoder(config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {' '.join(str(error).split())[:300]}") from error


def scaled(theirs: str, ours: str, factor: float) -> Entry:
    """One tensor that a configuration multiplies by `factor` wherever it is used: ours holds the product."""

    def load(tensor: Tensor) -> Tensors:
        return (tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype),)

    def save(tensor: Tensor) -> Tensors:
        return (tensor if factor == 1 else (tensor.float() / factor).to(tensor.dtype),)

    return Entry((theirs,), (ours,), load, save)


def rows(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Entry:
    """One tensor of theirs that holds several of ours below each other, `sizes` rows each."""
    return Entry((theirs,), tuple(ours), lambda t: t.split(list(sizes)), lambda *parts: (torch.cat(parts),))


def rows_of(theirs: str, ours: str, sizes: Sequence[int], factors: Sequence[float]) -> Entry:
    """One tensor whose rows, `sizes` of them at a time, a configuration multiplies by `factors`."""

    def times(tensor: Tensor, by: Sequence[float]) -> Tensor:
        parts = tensor.float().split(list(sizes))
        return torch.cat([part * factor for part, factor in zip(parts, by, strict=True)]).to(tensor.dtype)

    return Entry((theirs,), (ours,), lambda t: (times(t, factors),), lambda t: (times(t, [1 / f for f in factors]),))


def around_one(theirs: str, ours: str) -> Entry:
    """A norm weight that is stored as its difference from one; ours is the weight itself, in fp32."""
    return Entry((theirs,), (ours,), lambda t: (t.float() + 1,), lambda t: (t.float() - 1,))
