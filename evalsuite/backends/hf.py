"""Any causal language model of transformers behind the three verbs, as a reference and for outside baselines.

Sequences run one at a time, whole: slow, but nothing is padded and no answer depends on another. In fp32 likelihoods
have the very bits of lm-eval's HFLM with batches of one: logits of all positions, sums in fp32, windows of a document
added up in Python. (In less than fp32 HFLM rounds its sums to the model's type; we do not.) Nothing of a checkpoint is
executed: `trust_remote_code` is never on, weights are safetensors unless pickles are allowed, and the
headers are checked by the same strict parser as our own formats.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evalsuite.backends.decoding import append
from evalsuite.backends.reading import ranks
from evalsuite.backends.sampling import choose
from evalsuite.batching import windows
from evalsuite.types import Generate, Ids, ModelInfo, Request, Response, Rolling, Tokenizer
from gdn2.checkpoints import Options, hub, native
from gdn2.checkpoints.safe import check_values, read_json
from gdn2.checkpoints.sources import find_weights, open_source
from gdn2.errors import CheckpointError, UserError
from gdn2.tokenizer import load_tokenizer

OLDEST = (5, 5)  # of transformers: earlier ones could be made to run code from a configuration (CVE-2026-5241)
# Longer sequences get logits where they are scored only, for memory; the last bits may then differ from HFLM's.
ALL_LOGITS = 4096  # tokens
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")


class HFBackend:
    """Answers requests with a model of transformers.

    Args:
        model: an `AutoModelForCausalLM`, in evaluation mode, on its device.
        tokenizer: ours, of the same files.
        info: what records say about the model; prompts longer than its window are cut on the left, and it is counted.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self.model, self.tokenizer, self.info = model, tokenizer, info
        accepted = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        # `cache` from transformers 5.24 on; before that, state-space models had a name of their own.
        self._cache = next(name for name in ("cache", "cache_params", "past_key_values") if name in accepted)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Answer in order; see `evalsuite.types.Backend`."""
        for index, request in enumerate(requests):
            started = time.monotonic()
            try:
                with torch.inference_mode():  # never across a yield
                    response = self._one(request)
            except (UserError, torch.OutOfMemoryError) as error:
                response = Response(ended="error", error=" ".join(str(error).split())[:300])
            yield index, _timed(response, started)

    def _one(self, request: Request) -> Response:
        if isinstance(request, Generate):
            return self._generate(request)
        if isinstance(request, Rolling):
            return self._roll(request)
        context, rest = self._context(request.context.ids), request.continuation.ids
        if not len(rest):
            return Response(logprob=0.0, greedy=True)
        if self.info.window is not None and len(rest) > self.info.window:
            raise UserError(f"a continuation of {len(rest)} tokens does not fit the window of {self.info.window}")
        ids, cut = self._fit([*context, *(int(i) for i in rest[:-1])], 0)
        logprobs, greedy, rank = self._logprobs(ids, rest, request.ranked)
        return replace(_scored([logprobs], greedy, cut), rank=rank)

    def _roll(self, request: Rolling) -> Response:
        ids, size = request.document.ids, self.info.window
        if request.window is not None and size is not None and request.window > size:
            raise UserError(
                f"windows of {request.window} tokens are more than the {size} that {self.info.name} sees: "
                "choose a profile with smaller ones"
            )
        cuts = windows(ids, self._prefix(), request.window or size)
        return _scored([self._logprobs(part, targets)[0][skip:] for part, skip, targets in cuts], None, 0)

    def _generate(self, request: Generate) -> Response:
        ids, cut = self._fit(self._context(request.prompt.ids), request.max_tokens)
        logits, past = self._run(ids, None, 1)
        answer: list[int] = []
        while True:
            if not bool(torch.isfinite(logits).all()):
                error = f"the model gave logits that are not finite after {len(answer)} generated tokens"
                return Response(ended="error", error=error, tokens=len(answer), truncated=cut)
            token = int(choose(logits[-1:], [request.sampling], [len(answer)]))
            text, ended = append(answer, token, request, self.tokenizer)
            if ended is not None:
                return Response(text=text, tokens=len(answer), ended=ended, truncated=cut)
            logits, past = self._run([token], past, 1)

    def _run(self, ids: Sequence[int] | Ids, past: Any, keep: int, whole: bool = False) -> tuple[Tensor, Any]:
        """Logits [keep, V] of the last tokens in fp32, and the cache."""
        tensor = torch.tensor([[int(i) for i in ids]], device=self.model.device)
        options = {"logits_to_keep": keep} if self._keeps and not whole else {}
        out = self.model(input_ids=tensor, use_cache=True, **{self._cache: past}, **options)
        return out.logits[0, -keep:].float(), getattr(out, self._cache)

    def _logprobs(
        self, ids: Sequence[int] | Ids, targets: Ids, ranked: bool = False
    ) -> tuple[Tensor, bool, int | None]:
        """Log-probabilities [n] of the n targets after the last n tokens, whether each is the most likely, and the
        largest rank where it is asked for."""
        logits, _ = self._run(ids, None, len(targets), whole=len(ids) <= ALL_LOGITS)
        wanted = torch.tensor([int(i) for i in targets], device=logits.device)
        table = logits.log_softmax(-1)
        found = table.gather(-1, wanted[:, None])[:, 0]
        rank = int(ranks(logits, wanted).max()) if ranked else None
        return found.cpu(), bool((table.argmax(-1) == wanted).all()), rank

    def _context(self, ids: Ids) -> list[int]:
        return [int(i) for i in ids] if len(ids) else [self._prefix()]

    def _fit(self, ids: list[int], room: int) -> tuple[list[int], int]:
        """The last tokens that leave `room` in the window, and how many were cut off."""
        if self.info.window is None:
            return ids, 0
        cut = max(0, len(ids) + room - self.info.window)
        if cut >= len(ids):
            raise UserError(f"{room} tokens of answer leave no room for a prompt in {self.info.window} tokens")
        return ids[cut:], cut

    def _prefix(self) -> int:
        return next((i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None), 0)


def _scored(parts: Sequence[Tensor], greedy: bool | None, cut: int) -> Response:
    """The sum of log-probabilities that were found in `parts`: in fp32 within one, in fp64 over them."""
    total, tokens = sum(float(part.sum()) for part in parts), sum(map(len, parts))
    if not math.isfinite(total):
        error = "the model gave log-probabilities that are not finite"
        return Response(ended="error", error=error, tokens=tokens, truncated=cut)
    return Response(logprob=total, greedy=greedy, tokens=tokens, truncated=cut)


def _timed(response: Response, started: float) -> Response:
    return replace(response, latency_s=time.monotonic() - started)


def load(source: str, *, device: str = "cpu", dtype: str | None = None, options: Options | None = None) -> HFBackend:
    """Open a causal language model with transformers.

    Args:
        source: a directory, or hf:OWNER/REPO[@REVISION].
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and bfloat16 on a GPU.
        options: permissions, and another tokenizer.

    Raises:
        UserError: transformers is not installed or too old, or the device is not there.
        CheckpointError: the checkpoint was refused.
    """
    transformers, options = _library(), options or Options()
    allow_pickle, path = options.allow_pickle_weights, Path(source)
    if source.startswith("hf:"):
        path = hub.download(source, allow_pickle=allow_pickle, offline=options.offline)
    if not path.is_dir():
        raise UserError(f"no model {source!r}: not a directory, and not hf:OWNER/REPO")
    config = read_json(path / "config.json")
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{source} brings its own code, which is never run")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch sees no GPU")
    kind = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else torch.bfloat16
    with ExitStack() as stack:
        open_source(path, stack, allow_pickle=allow_pickle)
    digest = _digest(path)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, local_files_only=True, use_safetensors=not allow_pickle, dtype=kind,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot open {source}: {' '.join(str(error).split())[:300]}") from error
    _refuse_gaps(source, report)
    for name, parameter in () if options.allow_bad_values else model.named_parameters():
        check_values(source, name, parameter)
    own = load_tokenizer(options.tokenizer or path, options.bos)
    name = source if source.startswith("hf:") else path.resolve().name
    model = model.to(where).eval().requires_grad_(False)
    return HFBackend(model, own, describe(model, name, digest, own))


def describe(model: Any, name: str, digest: str, tokenizer: Tokenizer) -> ModelInfo:
    """What records say about a model of transformers."""
    config = model.config.get_text_config()
    mixer = str(config.model_type)
    window = getattr(config, "max_position_embeddings", None)
    identity = {
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": f"transformers {_library().__version__}",
    }
    params = sum(p.numel() for p in model.parameters())
    recurrent = mixer in RECURRENT
    return ModelInfo(
        name=name, mixer=mixer, family="recurrent" if recurrent else "other", params=params, checkpoint=digest,
        tokenizer=tokenizer.digest, window=window if isinstance(window, int) and not recurrent else None,
        details={"identity": identity},
    )  # fmt: skip


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("this model needs transformers: pip install 'gdn2-eval[hf]'") from error
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise UserError(f"transformers {transformers.__version__} is too old: {'.'.join(map(str, OLDEST))} or newer")
    return transformers


def _refuse_gaps(source: str, report: dict[str, Any]) -> None:
    """transformers fills what a file lacks with random numbers and says so only in a warning."""
    lacking = [f"{name} is missing" for name in sorted(report.get("missing_keys", ()))]
    lacking += [f"{name} has another shape" for name in sorted(str(k) for k in report.get("mismatched_keys", ()))]
    if lacking:
        raise CheckpointError(f"{source} does not fit its configuration, {len(lacking)}: {'; '.join(lacking[:5])}")


def _digest(path: Path) -> str:
    files = [*find_weights(path)[1], path / "config.json"]
    sums = [native.file_digest(file) for file in files]
    return hashlib.sha256("".join(sums).encode()).hexdigest()
