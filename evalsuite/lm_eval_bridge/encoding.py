"""How lm-eval turns texts into token ids (`TemplateLM` and `HFLM` of 0.4.13), with our tokenizers.

Two differences, both meant: a special token's name inside a text stays text, and an empty continuation is one that is
certain. lm-eval would take the first as the token and stop at the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evalsuite.types import Field, LogLikelihood, Prompt, Rolling, Tokenizer, field_values

PROTOCOL = "lm-eval"

# How whole documents are read, which lm-eval leaves to the model behind it; the defaults are its own backend's.
DOCUMENT_FIELDS = {
    "window": Field("2048", "[1-9][0-9]{0,6}|whole", "a number of tokens, or whole: one window of any size"),
    "bos": Field("twice", "twice|once", "twice (BOS, where there is one, is scored as a first token too) or once"),
}


def pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
    """Requests for (context, continuation) texts.

    White space at the end of a context moves to its continuation; the continuation's ids are what the whole text has
    beyond the context's. BOS stands before the context, once, where the model takes one; before an empty context
    without BOS the backend puts what it puts before an empty text.
    """
    moved = [_moved(context, continuation) for context, continuation in texts]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encoded = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    prompts = {context: prompt(tokenizer, context, ids) for context, ids in encoded.items()}
    return [
        LogLikelihood(
            prompts[context],
            Prompt(np.array(whole[len(encoded[context]) if context else 0 :], dtype=np.int32), continuation),
        )
        for (context, continuation), whole in zip(moved, wholes, strict=True)
    ]


def documents(tokenizer: Tokenizer, texts: Sequence[str], protocol: str) -> list[Rolling]:
    """Requests for whole texts, read as the fields of `protocol` say."""
    fields = field_values(DOCUMENT_FIELDS, protocol)
    window = None if fields["window"] == "whole" else int(fields["window"])
    found = [prompt(tokenizer, text, ids) for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)]
    if fields["bos"] == "once" and tokenizer.bos_id is not None:
        found = [Prompt(document.ids[1:], document.text) for document in found]
    return [Rolling(document, window) for document in found]


def prompt(tokenizer: Tokenizer, text: str, ids: Sequence[int] | None = None) -> Prompt:
    """A text that begins with BOS, once, where the model takes one; `ids` are its own where they are known."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = tokenizer.encode(text) if ids is None else ids
    return Prompt(np.array([*bos, *found], dtype=np.int32), text)


def _moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
