"""Plans: lengths are read strictly, keys hold all that determines an answer, and run names only what is shared."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite import plan as plan_module
from evalsuite.backends.scripted import ScriptedBackend, perfect
from evalsuite.plan import Ask, make_plan, option_digest, parse_lengths
from evalsuite.types import Decision, Generate, LogLikelihood, Prompt, Rolling
from gdn2.errors import UserError

ASK = Ask((256, 512), 3)


def backend(**changes):
    made = ScriptedBackend(perfect)
    made.info = dataclasses.replace(made.info, **changes)
    return made


def keys(plan):
    return [entry.key for cell in plan.cells for entry in cell.entries]


@pytest.mark.parametrize(
    "text, lengths", [("1k,2K,4096,1m", (1024, 2048, 4096, 1 << 20)), (" 128 , 16m", (128, 1 << 24))]
)
def test_lengths_are_read(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text",
    ["", ",", "1k,", "0", "127", "17m", "1k,1024", "-1k", "1.5k", "1e3", "0x80", "1k 2k", "４k", "1kk", "9" * 400, "k"],
)
def test_bad_lengths_are_named(text):
    with pytest.raises(UserError, match="length '"):
        parse_lengths(text)


@given(st.text(max_size=12))
def test_any_text_is_a_length_or_a_user_error(text):
    try:
        lengths = parse_lengths(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(128 <= n <= 1 << 24 for n in lengths) and len(set(lengths)) == len(lengths) >= 1


def test_cells_are_tasks_times_lengths(toy):
    plan = make_plan(backend(), [toy.Find(), toy.Choose()], ASK)
    found = [(c.task, c.protocol, c.length, c.samples, c.done, c.requests) for c in plan.summary(lambda _: False)]
    assert found == [
        ("toy_find", "exact", 256, 3, 0, 3),
        ("toy_find", "exact", 512, 3, 0, 3),
        ("toy_choose", "exact", None, 3, 0, 12),
    ]
    done = set(keys(plan)[:2])
    first = plan.summary(done.__contains__)[0]
    assert (first.done, first.requests) == (2, 1) and 200 < first.tokens <= 256


def test_keys_are_stable_and_differ_between_samples(toy):
    tasks = [toy.Find(), toy.Choose()]
    assert keys(make_plan(backend(), tasks, ASK)) == keys(make_plan(backend(), tasks, ASK))
    assert len(set(keys(make_plan(backend(), tasks, ASK)))) == 9


def test_more_samples_lengths_and_tasks_extend_the_same_run(toy):
    small = make_plan(backend(), [toy.Find()], ASK)
    large = make_plan(backend(), [toy.Choose(), toy.Find()], Ask((256, 512, 1024), 5))
    assert small.run_id == large.run_id and set(keys(small)) < set(keys(large))


@pytest.mark.parametrize(
    "model, ask",
    [
        ({"checkpoint": "0"}, {}),
        ({"tokenizer": "0"}, {}),
        ({"details": {"identity": {"device": "cuda"}}}, {}),
        ({}, {"seed": 1}),
        ({}, {"profile": "other"}),
        ({}, {"options": {"haystack": "x"}}),
    ],
    ids=["checkpoint", "tokenizer", "compute", "seed", "profile", "options"],
)
def test_what_may_not_be_mixed_has_a_run_of_its_own(toy, model, ask):
    plan = make_plan(backend(), [toy.Find()], ASK)
    other = make_plan(backend(**model), [toy.Find()], dataclasses.replace(ASK, **ask))
    assert plan.run_id != other.run_id
    if "options" not in ask:  # a task says by its data digest which options matter
        assert not set(keys(plan)) & set(keys(other))


@pytest.mark.parametrize("change", ["version", "name", "data", "prompt"])
def test_a_task_that_changes_changes_its_keys(toy, change):
    task = toy.Find()
    if change == "data":
        task.data_digest = lambda setting: "moss"
    elif change == "prompt":
        sample = task.sample
        task.sample = lambda i, setting, tokenizer: dataclasses.replace(
            sample(i + 1, setting, tokenizer), id=sample(i, setting, tokenizer).id
        )
    else:
        setattr(task, change, {"version": 2, "name": "toy_other"}[change])
    assert not set(keys(make_plan(backend(), [toy.Find()], ASK))) & set(keys(make_plan(backend(), [task], ASK)))


def test_every_part_of_a_request_is_in_the_key():
    a, b = (Prompt(np.array(ids, np.int32), "") for ids in ([1, 2], [1, 3]))
    requests = [
        Generate(a, 8),
        Generate(b, 8),
        Generate(a, 9),
        Generate(a, 8, ("\n",)),
        Generate(a, 8, (), Decision(("x",))),
        Generate(a, 8, (), Decision(("x",), "any")),
        LogLikelihood(a, b),
        LogLikelihood(b, a),
        LogLikelihood(Prompt(np.array([1], np.int32), ""), Prompt(np.array([2, 1, 3], np.int32), "")),
        Rolling(a),
        Rolling(a, 2),
    ]
    digests = [plan_module._request_digest(request) for request in requests]
    assert all(x != y for x, y in itertools.combinations(digests, 2))


def test_the_default_profile_named_is_the_default(toy):
    named = make_plan(backend(), [toy.Find()], dataclasses.replace(ASK, profile="exact"))
    assert named.run_id == make_plan(backend(), [toy.Find()], ASK).run_id
    with pytest.raises(UserError, match="task toy_choose has no profile 'other'; it has exact"):
        make_plan(backend(), [toy.Find(), toy.Choose()], dataclasses.replace(ASK, profile="other"))


def test_an_option_that_is_a_file_counts_by_content(tmp_path):
    file, directory = tmp_path / "hay.txt", tmp_path / "hay"
    file.write_text("one")
    directory.mkdir()
    (directory / "a").write_text("one")
    first, listed = option_digest(str(file)), option_digest(str(directory))
    copy = tmp_path / "copy.txt"
    copy.write_text("one")
    assert option_digest(str(copy)) == first != listed
    file.write_text("two")
    (directory / "a").rename(directory / "b")
    assert option_digest(str(file)) != first and option_digest(str(directory)) != listed
    assert option_digest("bundled") == "bundled"


def test_two_samples_with_one_id_are_a_bug(toy):
    task = toy.Find()
    task.samples = lambda setting, tokenizer: [toy.Find().sample(0, setting, tokenizer)] * 2
    with pytest.raises(ValueError, match="toy_find gives one sample id"):
        make_plan(backend(), [task], ASK)


def test_large_cells_are_made_twice_and_grouped(toy, monkeypatch):
    monkeypatch.setattr(plan_module, "KEPT_TOKENS", 1000)
    made = []

    class Counting(toy.Find):
        def samples(self, setting, tokenizer):
            made.append(setting.length)
            return super().samples(setting, tokenizer)

    plan = make_plan(backend(), [Counting()], Ask((256, 512, 1024), 3))
    assert [[cell.setting.length for cell in group] for group in plan.groups()] == [[256], [512], [1024]]
    for cell in plan.cells:
        assert [s.id for s in cell.samples()] == [e.sample_id for e in cell.entries]
    assert made == [256, 512, 1024, 512, 1024]
