"""Which format a checkpoint has, and how each is read: one place that knows all formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from gdn2.checkpoints import falcon, fla, huggingface, kimi, mamba, mamba1, native, nvlabs
from gdn2.checkpoints.fields import Fields, Values
from gdn2.checkpoints.safe import TensorInfo, inside, read_json, shown
from gdn2.checkpoints.tables import Entry, Table
from gdn2.errors import CheckpointError
from gdn2.models import Decoder, ModelConfig

Read = Callable[[Fields, Mapping[str, TensorInfo], Values], tuple[ModelConfig, Callable[[Decoder], Table]]]


class Reading(NamedTuple):
    """How one checkpoint is to be understood."""

    format: str
    config: ModelConfig
    table: Callable[[Decoder], Table]


class Family(NamedTuple):
    """The checkpoints of one model type."""

    format: str
    read: Read
    about: str


def _fla(read: Read, about: str) -> Family:
    return Family("fla", read, about)


def _hf(read: Read, about: str) -> Family:
    return Family("transformers", read, about)


FAMILIES: dict[str, Family] = {
    "gated_deltanet": _fla(fla.read, "Gated DeltaNet, with attention layers where `attn` says so"),
    "kda": _fla(fla.read, "Kimi Delta Attention, with attention layers where `attn` says so"),
    "delta_net": _fla(fla.read, "DeltaNet, with attention layers where `attn` says so"),
    "transformer": _fla(fla.read, "softmax attention, full or windowed"),
    "gdn2": _fla(fla.read, "GDN-2 layers in fla's naming: sigmoid output gate"),
    "samba": _fla(mamba1.samba, "Mamba-1 with windows of attention where `attn` says so"),
    "mamba": Family("transformers/fla", mamba1.mamba, "Mamba-1, as transformers and fla write it"),
    "mamba2": Family("transformers/fla", mamba.mamba2, "Mamba-2, as transformers and fla write it (Codestral-Mamba)"),
    "mamba3": Family("fla", mamba.mamba3, "Mamba-3, SISO and MIMO"),
    "mamba_ssm": Family(
        "mamba_ssm", mamba.mamba_ssm, "state-spaces/mamba: Mamba-1, -2 and -3, attention among them, transformer++"
    ),
    "qwen3_next": _hf(huggingface.qwen, "Gated DeltaNet with full attention; layers of experts are refused"),
    "qwen3_5": _hf(huggingface.qwen, "Gated DeltaNet with full attention: the text model of Qwen3.5"),
    "qwen3_5_text": _hf(huggingface.qwen, "Gated DeltaNet with full attention"),
    "olmo_hybrid": _hf(huggingface.olmo, "Gated DeltaNet with full attention"),
    "bamba": _hf(huggingface.bamba, "Mamba-2 with full attention"),
    "falcon_h1": _hf(falcon.falcon_h1, "attention and Mamba-2 side by side in every layer"),
    "kimi_linear": _hf(kimi.kimi, "Kimi Delta Attention with latent attention; layers of experts are refused"),
    "granitemoehybrid": _hf(huggingface.granite, "Mamba-2 with full attention; layers of experts are refused"),
}

REFUSED = {
    "nemotron_h": "its layers are single blocks of another shape",
    "zamba2": "its layers share an attention block",
}


def listing() -> list[tuple[str, str, str]]:
    """(format, model type, what it is) of everything that can be opened."""
    rows = [
        ("native", "", "our own: model.safetensors, config.json, tokenizer.json, checksums.json"),
        ("nvlabs", "", "the authors' .pth: GDN-2 and the first Gated DeltaNet, recurrent and hybrid"),
    ]
    rows += [(f.format, "" if kind == f.format else kind, f.about) for kind, f in FAMILIES.items()]
    rows += [("hf", kind, f"through transformers: {why}") for kind, why in REFUSED.items()]
    rows.append(("hf", "(any other)", "any causal language model of transformers, as a reference: transformers:PATH"))
    return rows


def configuration(path: Path) -> Fields | None:
    """config.json of a checkpoint directory; None where there is none."""
    if not path.is_dir() or not ((path / "config.json").exists() or (path / "config.json").is_symlink()):
        return None
    return Fields(read_json(inside(path, path / "config.json")), path / "config.json")


def detect(path: Path, raw: Fields | None, tensors: Mapping[str, TensorInfo]) -> str:
    """The format of a checkpoint, or its model type where config.json states one that is known.

    Raises:
        CheckpointError: no format that is known; the message says what it is and what would open it.
    """
    if raw is None:
        if nvlabs.looks_like(tensors):
            return "nvlabs"
        first = shown(next(iter(tensors), "nothing"))
        raise CheckpointError(f"{path} has no config.json, and its tensors ({first}, ...) are not the authors' either")
    if raw.data.get("format") == native.FORMAT:
        return "native"
    kind = raw.data.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return kind
    if isinstance(kind, str):
        why = REFUSED.get(kind, "no mixer of ours computes it")
        raise CheckpointError(
            f"{path}: model type {shown(kind)} cannot be opened natively ({why}); use transformers:{path}"
        )
    if "d_model" in raw.data and "n_layer" in raw.data:
        return "mamba_ssm"
    raise CheckpointError(f"{path}/config.json names no model type")


def understand(path: Path, raw: Fields | None, tensors: Mapping[str, TensorInfo], values: Values) -> Reading:
    """Format, configuration and table of a checkpoint, from its headers.

    Raises:
        CheckpointError: it cannot be served; UserError: something has to be said by name.
    """
    kind = detect(path, raw, tensors)
    try:
        if kind == "native":
            reading = Reading("native", native.read_header(path).config, identity)
        elif raw is None:
            reading = Reading("nvlabs", nvlabs.configure(tensors, values, path), nvlabs.table)
        else:
            family = FAMILIES[kind]
            reading = Reading(family.format, *family.read(raw, tensors, values))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    values.refuse_unused(path)
    if reading.config.n_layers > len(tensors):
        raise CheckpointError(f"{path}: {reading.config.n_layers} layers cannot be in a file of {len(tensors)} tensors")
    return reading


def identity(model: Decoder) -> Table:
    """The table of our own format."""
    return Table([Entry((name,), (name,)) for name, _ in model.named_parameters()])
