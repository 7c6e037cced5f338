"""What lm-eval's requests and metrics become here, piece by piece; the whole is held to lm-eval itself elsewhere."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.lm_eval_bridge import generating, index, loading, measures, task
from evalsuite.lm_eval_bridge.encoding import DOCUMENT_FIELDS, documents, pairs, prompt
from evalsuite.types import Generate, LogLikelihood, Prompt, Response, Rolling, Sampling, Setting, expanded
from gdn2.errors import UserError
from tests.tasks.test_splice import Letters

BEFORE = Prompt(np.array([1], np.int32), "a")


class Bos(Letters):
    bos_id = 1


def instance(kind: str, *args: object) -> Any:
    return SimpleNamespace(request_type=kind, args=args, task_name="toy", doc_id=4, idx=0, repeats=3)


def asked(*instances: Any, profile: str = "lm-eval") -> list:
    return [request for made in task._requests("lm_eval:toy", instances, Bos(), Setting(profile)) for request in made]


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
    made = generating.generation("x", BEFORE, settings, 5)
    assert (made.max_tokens, made.stop, made.decision, made.sampling) == (tokens, stop, None, None)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"do_sample": True, "temperature": 0.2}, Sampling(0.2, 5)), ({"temperature": "0.3"}, Sampling(0.3, 5)),
        ({"do_sample": True, "temperature": 1, "top_p": 0.95, "top_k": "40"}, Sampling(1.0, 5, 0.95, 40)),
        ({"do_sample": None, "temperature": 2, "top_p": None, "num_beams": 1}, Sampling(2.0, 5)),
        ({"top_p": 0.95}, None), ({"do_sample": False, "temperature": 1, "top_p": 0.9, "top_k": 3}, None),
        ({"temperature": 0, "top_p": 0.9, "repetition_penalty": 1.0}, None),
    ],
)  # fmt: skip
def test_settings_of_a_sampled_answer(settings: dict, sampling: Sampling | None) -> None:
    assert generating.generation("x", BEFORE, settings, 5).sampling == sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 10}, "x asks for num_beams=10; only do_sample, temperature, top_p, top_k, until and"),
        ({"repetition_penalty": 1.2}, r"x asks for repetition_penalty=1\.2; "), ({"seed": 3}, "x asks for seed=3; "),
        ({"do_sample": True}, r"x samples its answers \(do_sample\) at no temperature"),
        ({"do_sample": True, "temperature": None}, "at no temperature"),
        ({"temperature": "hot"}, "x has temperature='hot', which is not a number"),
        ({"temperature": -1}, "x samples its answers in a way that is none: a temperature is 0 to 1000"),
        ({"temperature": 1, "top_p": 0}, "in a way that is none"), ({"temperature": 1, "top_k": -2}, "that is none"),
        ({"temperature": 1, "top_k": "nan"}, "that is none"), ({"temperature": "inf"}, "that is none"),
    ],
)  # fmt: skip
def test_settings_that_nobody_follows_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generating.generation("x", BEFORE, settings, 5)
    assert "\n" not in str(caught.value)


def test_every_repeat_of_a_sampled_question_has_its_own_seed() -> None:
    sampled = instance("generate_until", "a", {"do_sample": True, "temperature": 0.5})
    made = asked(sampled)
    assert len(made) == 3 == len({one.sampling.seed for one in made}) and len({id(one.prompt) for one in made}) == 1
    assert [one.sampling.seed for one in made] == [generating.seed_of(42, sampled, number) for number in range(3)]
    for change in ({"doc_id": 5}, {"idx": 1}, {"task_name": "other"}):
        other = SimpleNamespace(**{**vars(sampled), **change})
        assert generating.seed_of(42, other, 0) not in {one.sampling.seed for one in made}
    assert generating.seed_of(43, sampled, 0) != made[0].sampling.seed
    assert len(asked(instance("generate_until", "a", {"temperature": 0.0}))) == 1  # three equal ones are asked once
    (cold,) = asked(sampled, profile="lm-eval:temperature=0:top_p=1:top_k=all")
    assert cold.sampling is None
    (one, *_) = asked(sampled, profile="lm-eval:temperature=0.7:top_p=0.9:top_k=8")
    assert one.sampling == replace(made[0].sampling, temperature=0.7, top_p=0.9, top_k=8)


def test_fields_of_tasks_that_sample() -> None:
    assert generating.sampling_fields({"do_sample": False, "temperature": 1.0}) == {}
    assert generating.sampling_fields({}) == generating.sampling_fields({"do_sample": True, "temperature": 0.0}) == {}
    fields = generating.sampling_fields({"do_sample": True, "temperature": 1, "top_p": 0.95})
    assert {name: field.default for name, field in fields.items()} == {
        "temperature": "1", "top_p": "0.95", "top_k": "all",
    }  # fmt: skip
    (profile,) = expanded("t", ("lm-eval",), fields, "lm-eval:top_k=5:temperature=0.25")
    assert profile == "lm-eval:temperature=0.25:top_p=0.95:top_k=5"
    assert generating.chosen(profile) == {"do_sample": True, "temperature": "0.25", "top_p": "0.95", "top_k": "5"}
    assert generating.chosen("lm-eval") == {} == generating.chosen("lm-eval:window=7:bos=once")
    for wrong in ("temperature=hot", "top_p=0", "top_p=0.0", "top_p=1.5", "top_k=0", "temperature=-1"):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            expanded("t", ("lm-eval",), fields, f"lm-eval:{wrong}")


def test_a_result_is_what_lm_eval_expects_of_its_kind() -> None:
    said = Response(text="t", logprob=-2.0, greedy=True)
    assert task._result("generate_until", said) == "t" and task._result("loglikelihood_rolling", said) == -2.0
    assert task._result("loglikelihood", said) == (-2.0, True)


def test_a_weighted_mean_of_scores_is_lm_evals_aggregate() -> None:
    """Perplexity is exp(-mean), by words exp(-sum / words), bits sum / units / ln 2: here as score and weight."""
    rows = [(-12.0, 4), (-3.0, 1), (-10.0, 5)]

    def mean(part: measures.Part) -> float:
        made = [part(row) for row in rows]
        return sum(score * weight for score, weight in made) / sum(weight for _, weight in made)

    assert mean(measures._nats_a_unit) == pytest.approx(25 / 10)
    assert mean(measures._bits_a_unit) == pytest.approx(25 / 10 / math.log(2))
    assert measures._nats(-1.5) == (1.5, 1.0)
    assert measures._mean(True) == (1.0, 1.0) and measures._mean("0.5") == (0.5, 1.0)
    assert measures._nats_a_unit((-3.0, 0)) == (3.0, 0.0)  # a document without units weighs nothing


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
    monkeypatch.setattr(index, "_files", lambda: pytest.fail("the files were read"))
    with pytest.raises(UserError, match="is not the name of a task$") as caught:
        index.find(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120
