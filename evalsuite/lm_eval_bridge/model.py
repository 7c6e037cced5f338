"""Our models under lm-eval's own program: importing this module registers the model type `gdn2` with lm-eval.

    import lm_eval
    import evalsuite.lm_eval_bridge.model
    lm_eval.simple_evaluate(model="gdn2", model_args="model=gdn2-tiny", tasks=["piqa"])

`python -m evalsuite.lm_eval_bridge` is lm-eval's command line with that import before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from evalsuite import backends
from evalsuite.lm_eval_bridge.encoding import PROTOCOL, documents, pairs, prompt
from evalsuite.lm_eval_bridge.generating import generation, seed_of
from evalsuite.types import Backend, Request, Response, Tokenizer
from gdn2 import env
from gdn2.errors import UserError


@register_model("gdn2")
class Gdn2LM(LM):  # type: ignore[misc]
    """A backend of ours as an lm-eval `LM`.

    Args:
        model: as `gdn2-eval run --model` takes it, or a backend that is open already.
        device: cpu, cuda, cuda:N or auto.
        dtype: float32, bfloat16 or float16; None is the device's default.
        tokenizer: another one than the checkpoint's.
        batch_tokens: tokens read at once; never changes an answer.
        profile: how whole documents are read: "lm-eval", with `encoding.DOCUMENT_FIELDS` as "lm-eval:window=4096".
        batch_size: lm-eval passes it; ignored, since no answer depends on it.
        max_batch_size: likewise.

    Raises:
        UserError: the model cannot be opened, or lm-eval was started by torchrun.
    """

    def __init__(
        self, model: str | Backend = "gdn2-tiny", device: str | None = None, dtype: str | None = None,
        tokenizer: str | None = None, batch_tokens: int | None = None, profile: str = PROTOCOL,
        batch_size: object = None, max_batch_size: object = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if env.launched()[1] > 1:
            raise UserError("model gdn2 of lm-eval is one process; gdn2-eval run shares work among several")
        self.backend: Backend = model if not isinstance(model, str) else backends.load(
            model, device=device or "auto", dtype=dtype, batch_tokens=batch_tokens,
            given={} if tokenizer is None else {"tokenizer": tokenizer},
        )  # fmt: skip
        self.profile = profile

    @property
    def tokenizer_name(self) -> str:
        """Digest of the tokenizer: lm-eval names its cache of requests after it."""
        return self.backend.tokenizer.digest

    @property
    def device(self) -> str:
        """Kind of device the model is on."""
        identity = self.backend.info.details.get("identity", {})
        return str(identity.get("device", "cpu")) if isinstance(identity, Mapping) else "cpu"

    def get_model_info(self) -> dict[str, object]:
        """For lm-eval's result file: which weights answered."""
        info = self.backend.info
        return {"model_num_parameters": info.params, "model_sha": info.checkpoint, "tokenizer_sha": info.tokenizer}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is greedy."""
        asked = pairs(self._tokenizer, [request.args for request in requests])
        return self._answered("loglikelihood", requests, asked, lambda r: (r.logprob, r.greedy))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document."""
        asked = documents(self._tokenizer, [request.args[0] for request in requests], self.profile)
        return self._answered("loglikelihood_rolling", requests, asked, lambda r: r.logprob)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuation of each context, greedy or drawn as its settings say.

        A drawn one depends on torch's seed, which lm-eval sets from its `--seed`, on the task and the document, and on
        how often the same was asked before it; on nothing else.
        """
        texts = [request.args[0] for request in requests]
        prompts = [
            prompt(self._tokenizer, text, ids)
            for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True)
        ]
        seed, repeats = torch.initial_seed(), Counter[tuple[Any, ...]]()
        asked = []
        for request, made in zip(requests, prompts, strict=True):
            who = request.task_name, request.doc_id, request.idx
            asked.append(generation(str(who[0]), made, request.args[1], seed_of(seed, request, repeats[who])))
            repeats[who] += 1
        return self._answered("generate_until", requests, asked, lambda r: r.text)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.backend.tokenizer

    def _answered(
        self, kind: str, requests: Sequence[Any], asked: Sequence[Request], value: Callable[[Response], Any]
    ) -> list[Any]:
        """Values in the order of the requests, each told to lm-eval's cache as it is known."""
        out: list[Any] = [None] * len(asked)
        for index, response in self.backend.answer(asked):
            if response.error is not None:
                raise RuntimeError(f"request {index}: {response.error}")
            out[index] = value(response)
            self.cache_hook.add_partial(kind, requests[index].args, out[index])
        return out
