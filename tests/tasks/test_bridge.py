"""What lm-eval's requests and metrics become here, piece by piece; the whole is held to lm-eval itself elsewhere."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.lm_eval_bridge import loading, task
from evalsuite.lm_eval_bridge.encoding import DOCUMENT_FIELDS, documents, pairs, prompt
from evalsuite.types import Generate, LogLikelihood, Prompt, Response, Rolling
from gdn2.errors import UserError
from tests.tasks.test_splice import Letters


class Bos(Letters):
    bos_id = 1


def instance(kind: str, *args: object) -> Any:
    return SimpleNamespace(request_type=kind, args=args)


def asked(*instances: Any, profile: str = "lm-eval") -> list:
    return task._requests("lm_eval:toy", instances, Bos(), profile)


def test_each_kind_of_request_is_one_of_ours() -> None:
    one, two = asked(instance("loglikelihood", "a ", "b"), instance("loglikelihood", "", "c"))
    assert isinstance(one, LogLikelihood) and one.context.text == "a" and one.continuation.text == " b"
    assert two.context.ids.tolist() == [1] and two.continuation.ids.tolist() == [ord("c")]
    (made,) = asked(instance("generate_until", "a", {"until": ["\n", ""], "max_gen_toks": 5}))
    assert isinstance(made, Generate) and (made.max_tokens, made.stop) == (5, ("\n",))
    assert made.prompt.ids.tolist() == [1, ord("a")]
    (whole,) = asked(instance("loglikelihood_rolling", "ab"), profile="lm-eval:window=7:bos=once")
    assert isinstance(whole, Rolling) and whole.window == 7 and whole.document.ids.tolist() == [97, 98]
    assert asked() == []


def test_requests_that_nobody_here_answers_are_refused() -> None:
    with pytest.raises(UserError, match="^lm_eval:toy asks about images or sounds, which no model here takes$"):
        asked(instance("generate_until", "a", {}, {"visual": []}))
    with pytest.raises(UserError, match=r"mixes requests of several kinds \(generate_until, loglikelihood\)"):
        asked(instance("loglikelihood", "a", "b"), instance("generate_until", "a", {}))
    with pytest.raises(UserError, match=r"mixes requests of several kinds \(multiple_choice\)"):
        asked(instance("multiple_choice", "a", "b"))


@pytest.mark.parametrize(
    ("settings", "tokens", "stop"),
    [
        ({}, 256, ()), ({"until": None}, 256, ()), ({"until": "x"}, 256, ("x",)),
        ({"until": ["a", "b"]}, 256, ("a", "b")),
        ({"until": ["", "a"]}, 256, ("a",)), ({"until": []}, 256, ()), ({"max_gen_toks": 9}, 9, ()),
        ({"max_new_tokens": 8}, 8, ()), ({"max_gen_toks": 9, "max_new_tokens": 8}, 9, ()),
        ({"max_gen_toks": "7"}, 7, ()),
        ({"max_gen_toks": None}, 256, ()), ({"do_sample": True, "temperature": 0.0}, 256, ()),
        ({"do_sample": False, "temperature": 0.7}, 256, ()),
    ],
)  # fmt: skip
def test_settings_of_a_generation(settings: dict, tokens: int, stop: tuple[str, ...]) -> None:
    made = task.generation("x", Prompt(np.array([1], np.int32), "a"), settings)
    assert (made.max_tokens, made.stop, made.decision) == (tokens, stop, None)


@pytest.mark.parametrize("temperature", [{}, {"temperature": None}, {"temperature": 1}, {"temperature": "0.3"}])
def test_sampled_answers_are_refused(temperature: dict) -> None:
    with pytest.raises(UserError, match="^x samples its answers; only greedy decoding is supported$"):
        task.generation("x", Prompt(np.array([1], np.int32), "a"), {"do_sample": True, **temperature})


def test_a_result_is_what_lm_eval_expects_of_its_kind() -> None:
    said = Response(text="t", logprob=-2.0, greedy=True)
    assert task._result("generate_until", said) == "t" and task._result("loglikelihood_rolling", said) == -2.0
    assert task._result("loglikelihood", said) == (-2.0, True)


def test_a_weighted_mean_of_scores_is_lm_evals_aggregate() -> None:
    """Perplexity is exp(-mean), by words exp(-sum / words), bits sum / units / ln 2: here as score and weight."""
    rows = [(-12.0, 4), (-3.0, 1), (-10.0, 5)]

    def mean(measure: task.Measure) -> float:
        made = [measure(row) for row in rows]
        return sum(score * weight for score, weight in made) / sum(weight for _, weight in made)

    assert mean(task._nats_a_unit) == pytest.approx(25 / 10)
    assert mean(task._bits_a_unit) == pytest.approx(25 / 10 / math.log(2))
    assert task._nats(-1.5) == (1.5, 1.0) and task._mean(True) == (1.0, 1.0) and task._mean("0.5") == (0.5, 1.0)
    assert task._nats_a_unit((-3.0, 0)) == (3.0, 0.0)  # a document without units weighs nothing


@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), max_size=4))
def test_one_context_is_one_prompt(texts: list[tuple[str, str]]) -> None:
    made = pairs(Bos(), texts)
    by_text: dict[str, int] = {}
    for one, (context, continuation) in zip(made, texts, strict=True):
        assert one.context.text + one.continuation.text == context + continuation
        assert by_text.setdefault(one.context.text, id(one.context)) == id(one.context)  # so that it is read once
        assert one.context.ids[0] == 1 and one.context.ids.dtype == one.continuation.ids.dtype == np.int32


def test_documents_begin_with_bos_as_the_field_says() -> None:
    for fields, ids, window in (
        ("", [1, 97], 2048), (":bos=once", [97], 2048), (":window=whole", [1, 97], None), (":window=1", [1, 97], 1),
    ):  # fmt: skip
        (made,) = documents(Bos(), ["a"], f"lm-eval{fields}")
        assert (made.document.ids.tolist(), made.window) == (ids, window)
    (bare,) = documents(Letters(), ["a"], "lm-eval:bos=once")
    assert bare.document.ids.tolist() == [97]  # without a BOS there is none to leave out
    assert documents(Bos(), [], "lm-eval") == []
    assert prompt(Bos(), "ab", [9]).ids.tolist() == [1, 9] and prompt(Letters(), "").ids.tolist() == []
    assert set(DOCUMENT_FIELDS) == {"window", "bos"}


def test_the_same_data_have_the_same_name() -> None:
    plain = loading.question("a/b", None, {})
    assert plain == "a/b/default" == loading.question("a/b", None, {"revision": None, "trust_remote_code": True})
    assert loading.question("a/b", "c", {}) == "a/b/c"
    one, other = (loading.question("a/b", "c", {"data_dir": name, "revision": "x"}) for name in "pq")
    assert one != other and one.startswith("a/b/c-") and len(one) == len("a/b/c-") + 8
    assert one == loading.question("a/b", "c", {"revision": "x", "data_dir": "p"})  # in any order
    assert loading.question("a/b", "c", {"data_files": {"test": [1]}}) != loading.question(
        "a/b", "c", {"data_files": {}}
    )


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "x" * 121, "a\nb", "é" * 121, "a;b"])
def test_names_that_are_none_are_refused_without_a_scan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_files", lambda: pytest.fail("the files were read"))
    with pytest.raises(UserError, match="is not the name of a task$") as caught:
        loading.find(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120
