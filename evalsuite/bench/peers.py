"""Contenders of `bench engine`: our engine, transformers on its own, and lm-eval's HFLM, with the same weights.

Every contender gets the same token ids. Prompts are numbers in text for lm-eval, whose tokenizer maps each to the id it
names, so nobody's tokenizer decides.

Axes: N sequences, T tokens of the longest.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evalsuite.types import Generate, LogLikelihood, Request
from gdn2.errors import UserError

if TYPE_CHECKING:
    from evalsuite.backends.native import NativeBackend

FLA_TYPES = ("gated_deltanet", "kda", "delta_net")


class Answer(NamedTuple):
    """To one request: generated ids, or the log-probability of the continuation and whether it was greedy."""

    ids: tuple[int, ...] = ()
    logprob: float = 0.0
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Contender:
    """Somebody who answers requests; `batch` 0 is its own choice."""

    name: str
    batch: int
    answer: Callable[[Sequence[Request]], list[Answer]]


class Numbers:
    """A tokenizer whose texts are ids in decimal, between spaces. Nothing ends a text."""

    digest, name = "numbers", "numbers"
    bos_id: int | None = None
    eos_id: int | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def ours(backend: NativeBackend, *, fast: bool = False) -> Contender:
    """Our engine, exact or as `--fast` has it."""

    def answer(requests: Sequence[Request]) -> list[Answer]:
        backend.model.fast = fast
        found = dict(backend.answer(requests))
        out = []
        for index in range(len(requests)):
            response = found[index]
            if response.error is not None:
                raise UserError(f"our engine failed in the benchmark: {response.error}")
            ids = tuple(int(word) for word in response.text.split())
            out.append(Answer(ids, response.logprob or 0.0, bool(response.greedy)))
        return out

    return Contender("fast" if fast else "ours", 0, answer)


def open_peer(path: Path, device: str, dtype: str) -> Any:
    """The checkpoint at `path` as transformers opens it.

    Raises:
        UserError: transformers is not installed or cannot open it.
    """
    import torch

    try:
        import transformers

        if json.loads((path / "config.json").read_text("utf-8"))["model_type"] in FLA_TYPES:
            importlib.import_module("fla.models")  # registers its models with transformers
    except ImportError as error:
        which = "flash-linear-attention" if str(error.name).startswith("fla") else "'gdn2-eval[hf]'"
        raise UserError(f"--against needs {error.name}: pip install {which}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=False, local_files_only=True, use_safetensors=True, dtype=getattr(torch, dtype)
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"transformers cannot open {path}: {' '.join(str(error).split())[:200]}") from error
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(device).eval().requires_grad_(False)


def transformers_alone(model: Any, batch: int) -> Contender:
    """transformers' forward and `generate` on batches of `batch` rows.

    Likelihood rows are padded on the right, where a causal model's earlier outputs do not see it; prompts of one
    generation batch have one length.
    """
    import torch

    def likelihoods(requests: Sequence[LogLikelihood]) -> list[Answer]:
        rows = [np.concatenate([r.context.ids, r.continuation.ids]) for r in requests]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.from_numpy(tokens)
        ids = ids.to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        out = []
        for row, request, tokens in zip(range(len(rows)), requests, rows, strict=True):
            begin, end = len(request.context.ids), len(tokens)
            table = logits[row, begin - 1 : end - 1].float().log_softmax(-1)
            wanted = ids[row, begin:end]
            logprob = float(table.gather(1, wanted[:, None]).sum())
            out.append(Answer((), logprob, bool((table.argmax(-1) == wanted).all())))
        return out

    def generations(requests: Sequence[Generate]) -> list[Answer]:
        ids = torch.from_numpy(np.stack([r.prompt.ids for r in requests]).astype(np.int64)).to(model.device)
        new = requests[0].max_tokens
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True
        )
        return [Answer(tuple(row)) for row in found[:, ids.shape[1] :].tolist()]

    def answer(requests: Sequence[Request]) -> list[Answer]:
        out: list[Answer] = []
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for at in range(0, len(requests), batch):
                part = requests[at : at + batch]
                asked = [r for r in part if isinstance(r, LogLikelihood)]
                out += likelihoods(asked) if asked else generations([r for r in part if isinstance(r, Generate)])
        return out

    return Contender("hf", batch, answer)


def lm_eval_hflm(model: Any, batch: int, window: int) -> Contender:
    """lm-eval's HFLM with batches of `batch`, told that the model takes `window` tokens.

    Raises:
        UserError: lm-eval's own support of transformers is not installed.
    """
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"--against lm-eval needs pip install 'lm-eval[hf]': {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = HFLM(
            pretrained=model, tokenizer=_numbers(model.config.vocab_size), batch_size=batch, max_length=window,
            device=str(model.device),
        )  # fmt: skip

    def instance(index: int, request: Request) -> Any:
        if isinstance(request, LogLikelihood):
            arguments: tuple[Any, ...] = (request.context.text, " " + request.continuation.text)
            return Instance("loglikelihood", {}, arguments, index)
        assert isinstance(request, Generate)
        settings = {"until": [], "max_gen_toks": request.max_tokens, "do_sample": False}
        return Instance("generate_until", {}, (request.prompt.text, settings), index)

    def answer(requests: Sequence[Request]) -> list[Answer]:
        asked = [instance(index, request) for index, request in enumerate(requests)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(requests[0], LogLikelihood):
                return [Answer((), logprob, greedy) for logprob, greedy in lm.loglikelihood(asked, disable_tqdm=True)]
            return [Answer(tuple(map(int, t.split()))) for t in lm.generate_until(asked, disable_tqdm=True)]

    return Contender("lm-eval", batch, answer)


def _numbers(vocab_size: int) -> Any:
    """`Numbers` as transformers wants it: a word for each id, and one beyond them that marks ends and is never used."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<end>"
    words = {str(i): i for i in range(vocab_size)} | {end: vocab_size}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=end, eos_token=end, bos_token=None)


def write_fla(name: str, folder: Path, device: str, dtype: str) -> Path:
    """Our preset `name` with random weights, as a checkpoint directory that fla opens with transformers.

    Raises:
        CheckpointError: fla has no such model.
    """
    import torch
    from safetensors.torch import save_file

    from gdn2.checkpoints import fla
    from gdn2.models import Decoder, preset

    with torch.device(device):
        model = Decoder(preset(name))
        model.reset_parameters(0)
    model.requires_grad_(False).cast(getattr(torch, dtype))
    folder.mkdir()
    save_file(fla.table(model).save(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fla.describe(model.config)), "utf-8")
    return folder


def write_random(kind: str, size: str, folder: Path) -> Path:
    """A model of transformers with random weights at the sizes of our preset `kind`-`size`, as a checkpoint directory.

    Args:
        kind: mamba2, whose layers have no MLP there; or gdn, where every fourth layer is full attention.

    Raises:
        UserError: another kind.
    """
    import torch
    import transformers

    from gdn2.models import preset

    config = preset(f"{kind}-{size}")
    mixer = config.mixers[config.pattern[0]]
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mamba2":
            expand, rest = divmod(mixer["n_heads"] * mixer["d_head"], config.d_model)
            if rest:
                raise UserError(f"transformers' Mamba-2 needs a whole expansion, which {kind}-{size} has not")
            model: Any = transformers.Mamba2ForCausalLM(
                transformers.Mamba2Config(
                    **sizes, num_heads=mixer["n_heads"], head_dim=mixer["d_head"], state_size=mixer["d_state"],
                    n_groups=1, expand=expand, chunk_size=64,
                )
            )  # fmt: skip
        elif kind == "gdn":
            heads, width = mixer["n_heads"], mixer["d_key"]
            model = transformers.Qwen3_5ForCausalLM(
                transformers.Qwen3_5TextConfig(
                    **sizes, intermediate_size=config.d_ff or 0, num_attention_heads=heads, num_key_value_heads=heads,
                    head_dim=width, linear_num_key_heads=heads, linear_num_value_heads=heads,
                    linear_key_head_dim=width, linear_value_head_dim=mixer["d_value"],
                )
            )  # fmt: skip
        else:
            raise UserError(f"transformers has no model like {kind}: choose random:gdn-{size} or random:mamba2-{size}")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(20)  # choices far apart, so that rounding decides none
    model.save_pretrained(folder)
    return folder
