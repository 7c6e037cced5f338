"""Language modelling: perplexity of WikiText-2 by word, and LAMBADA's last words, as lm-eval 0.4.13 measures them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalsuite.lm_eval_bridge.encoding import DOCUMENT_FIELDS, PROTOCOL, documents, pairs
from evalsuite.types import Field, Response, Sample, Score, Setting, Tokenizer, expanded
from tasks import data
from tasks.data.formats import read_text

# What lm-eval undoes in a page: WikiText's separators, then spaces inside brackets and quotes, then headings.
_SEPARATORS = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_SEPARATORS += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_INSIDE = [
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
]  # fmt: skip
_REST = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n")]
_REST += [(" N ", " 1 "), (" 's", "'s")]


@dataclass(frozen=True, slots=True)
class WikitextTask:
    """Log-likelihood of whole pages, for each word and byte of the page as it was."""

    name: str = "wikitext"
    version: int = 1
    suite: str = "language"
    has_lengths: bool = False
    protocols: tuple[str, ...] = (PROTOCOL,)

    @property
    def fields(self) -> Mapping[str, Field]:
        """How a page is read."""
        return DOCUMENT_FIELDS

    def expand(self, profile: str) -> tuple[str, ...]:
        """Protocols with their fields; see `evalsuite.types.Adjustable`."""
        return expanded(self.name, self.protocols, DOCUMENT_FIELDS, profile)

    @property
    def datasets(self) -> tuple[data.Dataset, ...]:
        return (WIKITEXT,)

    @property
    def examples(self) -> int | None:
        """Samples of the complete set."""
        return WIKITEXT.records

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The pages, in the order of the file. Raises DataError where the file is not there."""
        pages = [row["page"] for row in data.rows(WIKITEXT)[: setting.samples]]
        requests = documents(tokenizer, [detokenized(page) for page in pages], setting.protocol)
        return [
            Sample(str(i), (request,), (), facts={"page": page})
            for i, (page, request) in enumerate(zip(pages, requests, strict=True))
        ]

    def data_digest(self, setting: Setting) -> str:
        """sha256 of the file."""
        return data.digest(WIKITEXT)

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """Nats a word and a byte, whose exponentials over all pages are the perplexities, and bits a byte."""
        nats = -(responses[0].logprob or 0.0)
        page = str(sample.facts["page"])
        words = len(re.split(r"\s+", page))
        size = len(page.encode("utf-8", "surrogatepass"))
        return [
            Score("word_perplexity", nats / words, "", "", "scored", float(words)),
            Score("byte_perplexity", nats / max(size, 1), "", "", "scored", float(size)),
            Score("bits_per_byte", nats / max(size, 1) / math.log(2), "", "", "scored", float(size)),
        ]


@dataclass(frozen=True, slots=True)
class LambadaTask:
    """The last word of a passage: its perplexity, and whether greedy decoding gives it."""

    name: str = "lambada_openai"
    version: int = 1
    suite: str = "language"
    has_lengths: bool = False
    protocols: tuple[str, ...] = (PROTOCOL,)

    @property
    def datasets(self) -> tuple[data.Dataset, ...]:
        return (LAMBADA,)

    @property
    def examples(self) -> int | None:
        """Samples of the complete set."""
        return LAMBADA.records

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """The passages, in the order of the file. Raises DataError where the file is not there."""
        split = [row["text"].rpartition(" ") for row in data.rows(LAMBADA)[: setting.samples]]
        requests = pairs(tokenizer, [(context, f" {word}") for context, _, word in split])
        return [
            Sample(str(i), (request,), (word,))
            for i, (request, (_, _, word)) in enumerate(zip(requests, split, strict=True))
        ]

    def data_digest(self, setting: Setting) -> str:
        """sha256 of the file."""
        return data.digest(LAMBADA)

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """Nats, whose exponential over all passages is the perplexity, and 1 for a greedy word."""
        (response,) = responses
        outcome = "target" if response.greedy else "other"
        return [
            Score("perplexity", -(response.logprob or 0.0), sample.target[0], "", "scored"),
            Score("acc", float(bool(response.greedy)), sample.target[0], "", outcome),
        ]


def detokenized(page: str) -> str:
    """A page as ordinary text, by lm-eval's rules and in their order."""
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in _SEPARATORS:
        text = text.replace(old, new)
    for pattern, new in _INSIDE:
        text = re.sub(pattern, new, text)
    for old, new in _REST:
        text = text.replace(old, new)
    return text


def _pages(path: Path) -> Iterator[data.Row]:
    """Pages of the raw file: each begins at a heading of the first level."""
    text = read_text(path).replace("\r\n", "\n")
    before, *pages = re.split(r"\n(?= = [^=\n](?:.*[^=\n])? = \n)", text)
    if before.strip() or not pages:
        raise ValueError("the file does not begin with a page's heading")
    return ({"page": page} for page in pages)


WIKITEXT = data.Dataset(
    "wikitext", {"page": "text"}, "EleutherAI/wikitext_document_level", "test", "wikitext-2-raw-v1", 62,
    "CC BY-SA 3.0", original=_pages,
)  # fmt: skip
LAMBADA = data.Dataset(
    "lambada_openai", {"text": "text"}, "EleutherAI/lambada_openai", "test", "default", 5153, "MIT"
)

TASKS = [WikitextTask(), LambadaTask()]
