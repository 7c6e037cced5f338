"""Models behind the three verbs of `evalsuite.types.Backend`. Nothing heavy is imported before a model is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from evalsuite import ranks
from evalsuite.names import quoted, suggest
from evalsuite.types import EXACT, Backend, Numbers, Tokenizer
from gdn2 import env, zoo
from gdn2.errors import UserError

if TYPE_CHECKING:
    from gdn2.checkpoints import Options

ZOO = "zoo"


def names() -> dict[str, str]:
    """Models that go by a name, and what they are."""
    from evalsuite.backends.scripted import MODES

    shipped = dict.fromkeys(zoo.names(), "trained checkpoint, part of the package")
    shipped[ZOO] = "all of them, one after another (run)"
    return shipped | {f"scripted:{mode}": "no model: answers from a function, for trying a run" for mode in MODES}


def expand(models: str) -> list[str]:
    """The models of a list separated by commas, each once; `zoo` stands for every checkpoint of the package.

    Raises:
        UserError: one of them is blank or unknown: nothing is run before all can be found.
    """
    if models != ZOO and os.path.exists(models):  # a path may hold commas
        return [models]
    parts = [part.strip() for part in models.split(",")]
    if not all(parts):
        raise UserError(f"model {quoted(models)} holds a blank name; separate names by single commas")
    found = dict.fromkeys(name for part in parts for name in (zoo.names() if part == ZOO else [part]))
    for name in found:
        _check_known(name)
    return list(found)


def opening(given: Mapping[str, object]) -> Options:
    """What a user said about opening a checkpoint: the options of `evalsuite.options` by their names, others ignored.

    Raises:
        UserError: `given` is not NAME=VALUE,...
    """
    from gdn2.checkpoints import Options

    pairs = [pair.partition("=") for pair in str(given.get("given") or "").split(",") if pair.strip()]
    if odd := [name for name, sign, value in pairs if not (name.strip() and sign and value.strip())]:
        raise UserError(f"--set takes NAME=VALUE, separated by commas; {quoted(odd[0])} is not")
    return Options(
        allow_pickle_weights=bool(given.get("allow_pickle_weights")),
        allow_bad_values=bool(given.get("allow_bad_values")),
        tokenizer=str(given["tokenizer"]) if given.get("tokenizer") else None,
        bos={"yes": "yes", "no": "no"}.get(str(given.get("bos")), "auto"),  # type: ignore[arg-type]
        offline=bool(given.get("offline") or env.get("GDN2_DATA")),
        values={name.strip(): value.strip() for name, _, value in pairs},
    )


def load(
    model: str, *, device: str = "auto", dtype: str | None = None, batch_tokens: int | None = None,
    given: Mapping[str, object] | None = None, share_prefixes: bool = True, numbers: Numbers = EXACT,
) -> Backend:  # fmt: skip
    """Open a model: a name of `names()`, a preset, a path, hf:OWNER/REPO[@REVISION], or transformers: before either.

    Args:
        device: cpu, cuda or cuda:N; auto is the first GPU, else the CPU.
        dtype: float32, bfloat16 or float16; None is the device's default.
        batch_tokens: prompt tokens read at once; bounds memory, never changes an answer. None is the device's default.
        given: how a checkpoint is opened; see `opening`.
        share_prefixes: read what prompts have in common once; never changes an answer.
        numbers: what is given up of exactness, for models of ours.

    Raises:
        UserError: no such model or device, or `numbers` that the model's backend does not have.
        CheckpointError: the checkpoint was refused.
    """
    if numbers != EXACT and model.startswith(("scripted:", "transformers:")):
        raise UserError(f"--fast and --lm-eval-rounding are for models of ours, not for {quoted(model)}")
    if model.startswith("scripted:"):
        from evalsuite.backends import scripted

        return scripted.load(model)
    _check_known(model)
    plain = model.removeprefix("transformers:")
    options = opening(given or {})
    if plain != model:
        from evalsuite.backends import hf

        return hf.load(plain, device=_resolved(device), dtype=dtype, options=options)
    from evalsuite.backends import native

    return native.load(
        model, device=_resolved(device), dtype=dtype, batch_tokens=batch_tokens, options=options,
        share_prefixes=share_prefixes, numbers=numbers,
    )  # fmt: skip


def open_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a file, directory or hub name. Raises CheckpointError where there is none."""
    from gdn2.tokenizer import load_tokenizer

    return load_tokenizer(source)


def _check_known(model: str) -> None:
    if model.startswith("scripted:"):
        from evalsuite.backends import scripted

        scripted.load(model)
        return
    plain = model.removeprefix("transformers:")
    if not plain.startswith("hf:") and plain not in zoo.names() and not os.path.exists(plain) and not _preset(model):
        raise UserError(
            f"model {quoted(model)} is neither known nor a checkpoint nor hf:OWNER/REPO; {suggest(model, names())}"
        )


def tokenizer_of(model: str, given: Mapping[str, object] | None = None) -> Tokenizer | None:
    """The tokenizer of what `load` would open, without its weights and without fetching anything; None without one.

    Raises:
        UserError: no such model, or its tokenizer cannot be read.
    """
    if model.startswith("scripted:"):
        return load(model).tokenizer
    from gdn2.checkpoints import open_tokenizer

    return open_tokenizer(model.removeprefix("transformers:"), replace(opening(given or {}), offline=True))


def _preset(name: str) -> bool:
    from gdn2.models import PRESETS

    return name in PRESETS


def _resolved(device: str) -> str:
    if device != "auto":
        return ranks.device(device)
    import torch

    return ranks.device("cuda") if torch.cuda.is_available() else "cpu"
