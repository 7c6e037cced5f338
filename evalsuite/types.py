"""The vocabulary of the harness: what a task asks, what a backend answers, what a score says.

A task turns a `Setting` into `Sample`s; each sample holds the `Request`s a model must answer; a backend answers
requests in any order with `Response`s; the task turns the responses of one sample into `Score`s, one record each.
The three kinds of request are lm-eval's (loglikelihood, loglikelihood_rolling, generate_until).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evalsuite.groups import Group
from gdn2.errors import UserError

Ids = NDArray[np.int32]


class Tokenizer(Protocol):
    """Text to ids and back. Special-token strings inside a text are encoded as plain text, never as control tokens."""

    digest: str  # sha256 of what defines it
    name: str  # where it came from, for people
    vocab_size: int
    bos_id: int | None  # put once before every prompt when not None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS or EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out."""


class Prompt:
    """A text and its token ids (BOS included where the model takes one).

    Long prompts are spliced from token ids, so their text is only built when somebody reads it.
    """

    __slots__ = ("_text", "ids")

    def __init__(self, ids: Ids, text: str | Callable[[], str]) -> None:
        self.ids = ids  # int32 [n]
        self._text = text

    @property
    def text(self) -> str:
        return self._text if isinstance(self._text, str) else self._text()


@dataclass(frozen=True, slots=True)
class Decision:
    """When a generated text can no longer change its score: all, or any, references have appeared (case folded)."""

    references: tuple[str, ...]
    need: Literal["all", "any"] = "all"

    def settled(self, text: str) -> bool:
        folded = text.lower()
        found = (reference.lower() in folded for reference in self.references)
        return all(found) if self.need == "all" else any(found)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Tokens are drawn from softmax(logits / temperature): of the `top_k` most likely, the fewest with mass `top_p`.

    What chance decides is a function of `seed` and of a token's position in the answer.
    """

    temperature: float  # 0 takes the most likely token
    seed: int  # 0 to 2**64 - 1; of this one request
    top_p: float = 1.0  # above 0; 1 is all
    top_k: int = 0  # 0 is all

    def __post_init__(self) -> None:
        if not (0 <= self.temperature <= 1000 and 0 < self.top_p <= 1 and self.top_k >= 0 and 0 <= self.seed < 1 << 64):
            raise ValueError(f"a temperature is 0 to 1000, top_p above 0 and at most 1, top_k 0 or more: {self}")


@dataclass(frozen=True, slots=True)
class Generate:
    """Continuation of `prompt`; ends at EOS, a stop string, `max_tokens`, or when `decision` is settled.

    Greedy without `sampling`.
    """

    prompt: Prompt
    max_tokens: int
    stop: tuple[str, ...] = ()
    decision: Decision | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Sum of log-probabilities of `continuation` after `context`, and whether greedy decoding would produce it.

    `ranked` also asks for the rank of its least likely token.
    """

    context: Prompt
    continuation: Prompt  # ids without BOS
    ranked: bool = False


@dataclass(frozen=True, slots=True)
class Rolling:
    """Log-likelihood of a whole document, in windows of `window` tokens with one token of context (lm-eval's rule).

    `window` None: one pass from BOS over the whole document, possible for recurrent models.
    """

    document: Prompt
    window: int | None = None


Request = Generate | LogLikelihood | Rolling


@dataclass(frozen=True, slots=True)
class Response:
    """What a backend says to one request. Exactly the fields of the request's kind are filled; `error` excludes all."""

    text: str = ""  # generated
    tokens: int = 0  # generated, or scored
    logprob: float | None = None  # natural log, summed
    greedy: bool | None = None
    rank: int | None = None  # the largest of the scored tokens' ranks, 1 the most likely; where it was asked for
    ended: Literal["eos", "stop", "length", "decided", "scored", "error"] = "scored"
    truncated: int = 0  # prompt tokens that did not fit the model's window
    latency_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One question. `id` is the same for every model, tokenizer and process count, so that comparisons are paired."""

    id: str
    requests: tuple[Request, ...]
    target: tuple[str, ...]
    depth: float | None = None  # 0..1, where the needle sits in the haystack
    facts: Mapping[str, object] = field(default_factory=dict)  # what the scorer needs besides


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one sample: becomes one record. Exactly one of `value`, `error` and `item` is not None.

    A metric that is made from all samples together, such as F1 over a whole set, has no value of one of them: `item` is
    what `aggregation` needs of it.
    """

    metric: str
    value: float | None
    target: str
    output: str
    outcome: str = ""  # what happened, in one word: target, distractor, other, nothing, ...
    weight: float = 1.0  # units `value` stands for (words of a page, for word perplexity)
    error: str | None = None
    item: str | None = None  # as `evalsuite.items` writes it
    aggregation: str | None = None  # see `evalsuite.lm_eval_bridge.corpus`


@dataclass(frozen=True, slots=True)
class Setting:
    """How a task is asked: one cell of the sweep."""

    protocol: str  # a profile name
    length: int | None = None  # window in tokens, generation budget included; None for tasks without one
    samples: int | None = None  # first n samples; None is all
    seed: int = 42
    options: Mapping[str, str] = field(default_factory=dict)  # task options, such as the haystack


class Task(Protocol):
    """A family member such as niah_single_2. One file in `tasks/` may define several."""

    name: str
    version: int  # raised whenever a prompt or a score changes
    suite: str  # the family it belongs to: ruler, commonsense, ...
    has_lengths: bool
    protocols: tuple[str, ...]  # names it accepts; the first is the default

    def samples(self, setting: Setting, tokenizer: Tokenizer) -> Sequence[Sample]:
        """All samples of one cell. Raises `gdn2.errors.UserError` for a setting that cannot be met."""

    def data_digest(self, setting: Setting) -> str:
        """sha256 of the data the samples are made from (haystack, word lists, benchmark file)."""

    def score(self, sample: Sample, responses: Sequence[Response]) -> Sequence[Score]:
        """Scores of one sample from its responses, in request order."""


@dataclass(frozen=True, slots=True)
class Field:
    """A choice a protocol leaves open. `pattern` is what a value must match in full; a default may be several."""

    default: str
    pattern: str
    meaning: str


@runtime_checkable
class Adjustable(Protocol):
    """A task whose protocols have fields: "NAME:field=value:field=value" asks it with others than the defaults.

    Several values, as in "pairs=4/8/16", ask for every combination: one protocol each.
    """

    name: str
    fields: Mapping[str, Field]

    def expand(self, profile: str) -> tuple[str, ...]:
        """The protocols meant, as records name them. Raises UserError for a field or value it does not have."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A task as a suite asks it; what is None is up to the command. In all else it is the task."""

    task: Task
    protocol: str | None = None
    lengths: tuple[int, ...] | None = None
    samples: int | None = None
    groups: tuple[Group, ...] = ()  # it was named by

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def expanded(
    task: str, protocols: Sequence[str], fields: Mapping[str, Field], profile: str, brief: bool = False
) -> tuple[str, ...]:
    """What `Adjustable.expand` gives: the profile's name and all its fields, or with `brief` those not at the default.

    Args:
        task: its name, for an error.
        protocols: names the task knows.

    Raises UserError naming the field and what it may be.
    """
    name, *pairs = profile.split(":")
    if name not in protocols:
        raise UserError(f"task {task} has no profile {name[:60]!r}; it has {', '.join(protocols)}")
    given: dict[str, list[str]] = {}
    for pair in pairs:
        field_name, sign, values = pair.partition("=")
        if not sign or field_name not in fields or field_name in given:
            known = ", ".join(f"{key}={one.default}" for key, one in fields.items()) or "none"
            raise UserError(f"profile {name} of {task} has no field {pair[:60]!r}, or is given it twice: {known}")
        given[field_name] = list(dict.fromkeys(values.split("/")))
        for value in given[field_name]:
            if not re.fullmatch(fields[field_name].pattern, value):
                raise UserError(f"{field_name} {value[:60]!r} of {task} is not {fields[field_name].meaning}")
    choices = [given.get(key, one.default.split("/")) for key, one in fields.items()]
    made = [dict(zip(fields, values, strict=True)) for values in product(*choices)]
    shown = [[f"{key}={v}" for key, v in one.items() if not brief or v != fields[key].default] for one in made]
    return tuple(":".join([name, *parts]) for parts in shown)


def field_values(fields: Mapping[str, Field], protocol: str) -> dict[str, str]:
    """The fields of a protocol that `expanded` gave, defaults included."""
    pairs = (pair.partition("=") for pair in protocol.split(":")[1:])
    return {key: one.default for key, one in fields.items()} | {key: value for key, _, value in pairs}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a record says about the model that answered."""

    name: str
    mixer: str
    family: Literal["recurrent", "hybrid", "transformer", "other"]
    params: int
    checkpoint: str  # sha256 over weights and configuration
    tokenizer: str  # sha256
    window: int | None = None  # tokens it can see; None is unlimited
    details: Mapping[str, object] = field(default_factory=dict)  # device, dtype, kernels: goes into run.json


class Numbers(NamedTuple):
    """What a run gives up of exactness, knowingly; each is part of a record's key."""

    fast: bool = False  # products of all rows at once: last bits may depend on the batch
    lm_eval_rounding: bool = False  # log-probabilities rounded to the model's dtype, as lm-eval's are


EXACT = Numbers()


class Backend(Protocol):
    """A model behind the three verbs. Implementations: native, hf, scripted."""

    info: ModelInfo
    tokenizer: Tokenizer

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Answer all requests, yielding (index, response) as each is known, in any order.

        A request that fails yields a response with `error`; the others go on. Closing the iterator stops the work.
        An answer never depends on the other requests.
        """


@runtime_checkable
class Accountable(Protocol):
    """A backend that proves itself before a run and says afterwards what the run took."""

    def self_check(self) -> Mapping[str, float]:
        """The largest differences between ways to the same answer. Raises SelfCheckError where one is out of bounds."""

    def report(self) -> Mapping[str, object]:
        """Counts since it was made, in plain JSON types: tokens_asked, tokens_read, tokens_shared, events, ..."""
