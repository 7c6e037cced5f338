"""The scripted model answers as its mode says, and deterministically."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.backends.scripted import MODES, ByteTokenizer, ScriptedBackend, load, perfect
from evalsuite.types import Decision, Generate, LogLikelihood, Prompt, Rolling
from gdn2.errors import UserError

NEEDLES = (
    "One of the special magic numbers for red-fox is: 1111111. Grass.\n"
    "One of the special magic numbers for blue-cat is: 2222222. "
    "One of the special magic numbers for red-fox is: 3333333."
)
ONE = f"{NEEDLES} What is the special magic number for blue-cat mentioned in the provided text?"
ALL = f"{NEEDLES} What are all the special magic numbers for red-fox, and blue-cat mentioned in the provided text?"


def prompt(text):
    return Prompt(np.array(ByteTokenizer().encode(text), np.int32), text)


def answers(backend, *requests):
    found = dict(backend.answer(requests))
    return [found[i] for i in range(len(requests))]


@pytest.mark.parametrize(
    "mode, text, answer",
    [
        ("perfect", ONE, "2222222"),
        ("perfect", ALL, "1111111, 2222222, 3333333"),
        ("perfect", "no question", ""),
        ("last", ONE, "3333333"),
        ("last", "", ""),
        ("nothing", ONE, ""),
    ],
)
def test_modes(mode, text, answer):
    assert MODES[mode](text) == answer
    assert answers(load(f"scripted:{mode}"), Generate(prompt(text), 64))[0].text == answer


def test_generation_ends_for_the_reason_given():
    backend = ScriptedBackend(lambda _: "abc def")
    requests = [
        Generate(prompt("x"), 64),
        Generate(prompt("x"), 3),
        Generate(prompt("x"), 64, (" ", "b")),
        Generate(prompt("x"), 64, (), Decision(("DEF",))),
    ]
    found = [(r.text, r.tokens, r.ended) for r in answers(backend, *requests)]
    assert found == [("abc def", 7, "eos"), ("abc", 3, "length"), ("a", 1, "stop"), ("abc def", 7, "decided")]


def test_likelihoods_depend_on_the_request_alone():
    requests = [
        LogLikelihood(prompt("a"), prompt("bc")),
        LogLikelihood(prompt("ab"), prompt("c")),
        Rolling(prompt("abc")),
    ]
    one = [(r.logprob, r.greedy, r.tokens) for r in answers(ScriptedBackend(perfect), *requests)]
    two = [(r.logprob, r.greedy, r.tokens) for r in answers(ScriptedBackend(perfect), *reversed(requests))]
    assert one == two[::-1] and len(set(one)) == 3 and all(r[0] < 0 for r in one)


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_the_tokenizer_gives_back_any_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, *tokenizer.encode(text), 257]) == text
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


@pytest.mark.parametrize(
    "spec", ["scripted:", "scripted:perfct", "scripted:perfect:", "scripted:perfect:1s", "scripted:last:-1ms"]
)
def test_a_wrong_mode_is_named(spec):
    with pytest.raises(UserError, match=f"model '{spec}' is not scripted:.perfect,last,nothing"):
        load(spec)


def test_models_differ_by_mode_not_by_delay():
    digest = {spec: load(f"scripted:{spec}").info.checkpoint for spec in ("perfect", "last", "perfect:1ms")}
    assert digest["perfect"] == digest["perfect:1ms"] != digest["last"]
    start = answers(load("scripted:nothing:20ms"), Generate(prompt("x"), 1))[0]
    assert start.latency_s >= 0.02
