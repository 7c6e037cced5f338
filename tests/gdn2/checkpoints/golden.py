"""What the golden checkpoints record, and how our models are held to it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gdn2.checkpoints import Loaded, Options, open_model
from gdn2.models import Decoder
from gdn2.ragged import Ragged

TOLERANCE = 1e-5  # of the largest logit, as the golden READMEs name it


def checkpoint(directory: Path) -> tuple[Path, Options]:
    """Path and options that open a golden checkpoint."""
    if directory.name.startswith("nvlabs"):
        eps = json.loads((directory / "model_config.json").read_text())["lit_gpt_config"]["norm_eps"]
        path = directory / "final-model-ckpt.pth"
        return path, Options(allow_pickle_weights=True, values={"norm_eps": str(eps)})
    if directory.name.startswith("mamba_ssm"):
        return directory, Options(allow_pickle_weights=True, values={"a_activation": "heavy_tail"})
    return directory, Options()


def opened(directory: Path) -> Loaded:
    path, options = checkpoint(directory)
    return open_model(str(path), options=options)


def inputs(directory: Path) -> list[list[int]]:
    return json.loads((directory / "inputs.json").read_text())["input_ids"]


def recorded(directory: Path, name: str = "logits") -> Tensor:
    return load_file(directory / "logits.safetensors")[name]


def greedy(directory: Path) -> list[list[int]]:
    return json.loads((directory / "generate.json").read_text())["greedy"]


def prefill(model: Decoder, ids: list[list[int]]) -> list[Tensor]:
    """Logits [T, V] of each sequence, all read in one ragged batch."""
    ragged = Ragged([len(one) for one in ids])
    with torch.inference_mode():
        hidden, _ = model(torch.tensor([i for one in ids for i in one]), ragged)
        return list(model.logits(hidden).split(ragged.lengths))


def decode(model: Decoder, ids: list[list[int]]) -> list[Tensor]:
    """The same logits, token by token for all sequences together (of equal length)."""
    tokens = torch.tensor(ids)
    state = model.new_state(len(ids))
    with torch.inference_mode():
        rows = [model.logits(model.step(tokens[:, t], state)) for t in range(tokens.shape[1])]
    return list(torch.stack(rows, dim=1))


def continue_greedily(model: Decoder, ids: list[list[int]], n: int) -> list[list[int]]:
    """n greedy tokens after each sequence: prefill, then decoding steps."""
    ragged = Ragged([len(one) for one in ids])
    with torch.inference_mode():
        hidden, state = model(torch.tensor([i for one in ids for i in one]), ragged)
        token = model.logits(hidden[ragged.last]).argmax(-1)
        out = [token]
        for _ in range(n - 1):
            token = model.logits(model.step(token, state)).argmax(-1)
            out.append(token)
    return torch.stack(out, dim=1).tolist()


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
