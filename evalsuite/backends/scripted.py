"""A model that is a function: for tests, and to try a run before a real model is there (`--model scripted:perfect`).

Its tokenizer is its own: one token a byte of UTF-8, so lengths are bytes.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from evalsuite.names import quoted
from evalsuite.types import Generate, LogLikelihood, ModelInfo, Request, Response, Rolling, Tokenizer
from gdn2.errors import UserError

_NEEDLE = re.compile(r"One of the special magic \w+ for (.+?) is: (\S+?)\.(?=\s|$)")
_QUESTION = re.compile(r"What (?:is|are all) the special magic \w+ for (.+) mentioned in the provided text\?")
_SPEC = re.compile(r"scripted:([a-z]+)(?::([0-9]{1,5})ms)?")


class ByteTokenizer:
    """Text as its UTF-8 bytes; 256 is BOS, 257 EOS. Lone surrogates pass."""

    digest = hashlib.sha256(b"bytes of UTF-8, surrogates pass, BOS 256, EOS 257").hexdigest()
    name = "bytes"
    vocab_size = 258
    bos_id: int | None = 256
    eos_id: int | None = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        data = bytes(i for i in ids if i < 256)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


def perfect(prompt: str) -> str:
    """The values of the needles that the prompt's last question asks for."""
    asked = _QUESTION.findall(prompt)
    keys = set(re.split(r",? and |, ", asked[-1])) if asked else set()
    return ", ".join(value for key, value in _NEEDLE.findall(prompt) if key in keys or (asked and key == asked[-1]))


def last(prompt: str) -> str:
    """The value of the last needle, whichever was asked for."""
    return next((value for _, value in reversed(_NEEDLE.findall(prompt))), "")


def nothing(prompt: str) -> str:
    """No answer."""
    return ""


MODES: dict[str, Callable[[str], str]] = {"perfect": perfect, "last": last, "nothing": nothing}


class ScriptedBackend:
    """Answers generate requests by `answer_text(prompt)`, likelihoods by a hash of the token ids.

    Args:
        name: of the model; its checkpoint digest is made from it.
        delay_s: seconds before each answer.
        fail: gives the error of a request that is to fail, None for the others.
    """

    def __init__(
        self,
        answer_text: Callable[[str], str],
        name: str = "scripted",
        delay_s: float = 0.0,
        fail: Callable[[Request], str | None] = lambda _: None,
    ) -> None:
        checkpoint = hashlib.sha256(f"scripted {name}".encode()).hexdigest()
        self.tokenizer: Tokenizer = ByteTokenizer()
        details = {"identity": {"device": "cpu", "dtype": "none", "kernels": "none"}}
        self.info = ModelInfo(name, "scripted", "other", 0, checkpoint, self.tokenizer.digest, None, details)
        self._answer_text = answer_text
        self._delay_s = delay_s
        self._fail = fail

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Answer in order; see `evalsuite.types.Backend`."""
        for index, request in enumerate(requests):
            start = time.monotonic()
            if self._delay_s:
                time.sleep(self._delay_s)
            error = self._fail(request)
            response = Response(ended="error", error=error) if error else self._respond(request)
            yield index, replace(response, latency_s=time.monotonic() - start)

    def _respond(self, request: Request) -> Response:
        if not isinstance(request, Generate):
            return _likelihood(request)
        text = self._answer_text(request.prompt.text)
        stops = [at for stop in request.stop if (at := text.find(stop)) >= 0]
        ids = self.tokenizer.encode(text[: min(stops)] if stops else text)
        kept = self.tokenizer.decode(ids[: request.max_tokens])
        ended: Literal["decided", "length", "stop", "eos"] = "stop" if stops else "eos"
        if request.decision is not None and request.decision.settled(kept):
            ended = "decided"
        elif len(ids) > request.max_tokens:
            ended = "length"
        return Response(text=kept, tokens=min(len(ids), request.max_tokens), ended=ended)


def load(spec: str) -> ScriptedBackend:
    """The backend of "scripted:MODE", or of "scripted:MODE:20ms" with a delay before each answer."""
    found = _SPEC.fullmatch(spec)
    if not found or found[1] not in MODES:
        raise UserError(f"model {quoted(spec)} is not scripted:{{{','.join(MODES)}}}, with :20ms behind it for a delay")
    return ScriptedBackend(MODES[found[1]], f"scripted-{found[1]}", int(found[2] or 0) / 1000)


def _likelihood(request: LogLikelihood | Rolling) -> Response:
    parts = [request.document] if isinstance(request, Rolling) else [request.context, request.continuation]
    scored = len(parts[-1].ids)
    digest = hashlib.sha256(b"|".join(part.ids.tobytes() for part in parts)).digest()
    greedy = digest[1] < 128
    rank = (1 if greedy else 2 + digest[2]) if isinstance(request, LogLikelihood) and request.ranked else None
    return Response(tokens=scored, logprob=-scored * (1 + digest[0] / 64), greedy=greedy, rank=rank)
