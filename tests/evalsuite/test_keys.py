"""Keys and names are frozen: a run that was stored before must be found and gone on with by every later version."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from evalsuite import plan as plan_module
from evalsuite.backends.scripted import ScriptedBackend, perfect
from evalsuite.plan import (
    Ask,
    Cell,
    Entry,
    Plan,
    check_data,
    check_profile,
    make_plan,
    option_digest,
    parse_lengths,
    request_tokens,
    settings,
)  # fmt: skip
from evalsuite.types import Chosen, Decision, Generate, LogLikelihood, ModelInfo, Prompt, Rolling, Sample, Setting
from gdn2.errors import DataError, UserError

INFO = ModelInfo(
    "some/model", "gdn2", "recurrent", 7, "c" * 64, "t" * 64, None, {"identity": {"dtype": "float32", "fast": False}}
)


def prompt(*ids):
    return Prompt(np.array(ids, np.int32), "")


REQUESTS = {
    "generate": Generate(prompt(1, 2, 3), 16, ("\n",)),
    "decided": Generate(prompt(1, 2, 3), 16, ("\n",), Decision(("a", "é"), "all")),
    "choice": LogLikelihood(prompt(1, 2), prompt(3)),
    "ranked": LogLikelihood(prompt(1, 2), prompt(3), True),
    "windowed": Rolling(prompt(1, 2, 3), 2048),
    "whole": Rolling(prompt(1, 2, 3), None),
    "large": Generate(prompt(2**31 - 1, 0), 1),
}


class Toy:
    """A task of the samples it is given."""

    version, suite, has_lengths, protocols = 3, "toys", True, ("exact", "loose")

    def __init__(self, name="toy", requests=tuple(REQUESTS.values()), data="d" * 64, **changes):
        self.name, self._requests, self._data = name, requests, data
        for key, value in changes.items():
            setattr(self, key, value)

    def samples(self, setting, tokenizer):
        return [Sample(str(i), (request,), ()) for i, request in enumerate(self._requests)][: setting.samples]

    def data_digest(self, setting):
        if self._data is None:
            raise DataError(f"no data of {self.name} at {setting.length}")
        return self._data


def backend(info=INFO):
    made = ScriptedBackend(perfect)
    made.info = info
    return made


def planned(ask=None, info=INFO, **changes):
    return make_plan(backend(info), [Toy(**changes)], ask or Ask((1024,), None, None, 42))


def keys(plan):
    return [entry.key for cell in plan.cells for entry in cell.entries]


FROZEN = {
    "generate": "cbac41f09c0c249570979e9b7b52fb35",
    "decided": "a39c693ab9b2219082311de593822986",
    "choice": "dbc3ad7cfd777742799388eea203e7ef",
    "ranked": "84231fe636e1b88e6e7b2da453154b5c",
    "windowed": "356d766f55570c4a58ef163af4f2749c",
    "whole": "378d1194a5c65925a6d7f7324e5df170",
    "large": "33aeb744ac434479cbf9df3d6482283c",
}


def test_the_key_of_every_kind_of_request_is_frozen():
    assert dict(zip(REQUESTS, keys(planned()), strict=True)) == FROZEN


def test_the_name_of_a_run_is_frozen():
    options = {"haystack": "essays", "budget": "64"}
    assert planned().run_id == "some-model-d01c39219f43-6f203ce10993"
    assert planned(Ask((1024,), 2, "loose", 7, options)).run_id == "some-model-d01c39219f43-4c199c3ab7e8"
    assert planned().identity == {
        "schema": 1, "model": "some/model", "checkpoint": "c" * 64, "tokenizer": "t" * 64,
        "compute": {"dtype": "float32", "fast": False}, "profile": None, "seed": 42, "options": {},
    }  # fmt: skip


def test_the_digest_of_what_an_option_names_is_frozen(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "sub").mkdir()
    assert option_digest(str(tmp_path)) == "sha256:de7a23b57ff7f755dc6f2ee7d7dff043ab459e2a575b20c60003d24d956cbd7c"
    one = option_digest(str(tmp_path / "a.txt"))
    assert one == "sha256:2f036a24abed6e06feafb79183de5b2e317d9942f64355f92eb94450158f7219"
    (tmp_path / "c.txt").write_bytes(b"one")
    assert option_digest(str(tmp_path / "c.txt")) == one  # by content, not by name
    assert option_digest("bundled") == "bundled" and option_digest("x" * 20) == "x" * 20
    with pytest.raises(DataError, match="^cannot read 'a"):
        option_digest("a" * 5000)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("task", {"name": "other"}), ("task version", {"version": 4}), ("data", {"data": "e" * 64}),
        ("protocol", {"ask": Ask((1024,), profile="loose")}), ("length", {"ask": Ask((2048,))}),
        ("seed", {"ask": Ask((1024,), seed=43)}),
        ("checkpoint", {"info": dataclasses.replace(INFO, checkpoint="d" * 64)}),
        ("tokenizer", {"info": dataclasses.replace(INFO, tokenizer="u" * 64)}),
        ("compute", {"info": dataclasses.replace(INFO, details={"identity": {"dtype": "bfloat16"}})}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_all_that_determines_an_answer_is_in_its_key(what, changes):
    assert not set(keys(planned(**changes))) & set(keys(planned())), what


@pytest.mark.parametrize(
    "changes",
    [
        {"ask": Ask((1024,), 3)}, {"ask": Ask((1024,), options={"haystack": "x"})}, {"suite": "others"},
        {"info": dataclasses.replace(INFO, name="renamed", params=8, details=INFO.details | {"device": "cuda"})},
    ],
)  # fmt: skip
def test_what_does_not_is_not(changes):
    made = keys(planned(**changes))
    assert made == keys(planned())[: len(made)]


def test_tokens_are_those_a_model_reads():
    assert {name: request_tokens(request) for name, request in REQUESTS.items()} == {
        "generate": 3, "decided": 3, "choice": 3, "ranked": 3, "windowed": 3, "whole": 3, "large": 2,
    }  # fmt: skip
    assert request_tokens(LogLikelihood(prompt(1, 2, 3, 4), prompt())) == 4
    (cell,) = planned().cells
    assert [entry.requests for entry in cell.entries] == [1] * 7 and sum(e.tokens for e in cell.entries) == 20


def asked(tasks, ask):
    return [(task.name, s.protocol, s.length, s.samples) for task, s in settings(tasks, ask)]


def test_each_setting_is_asked_once_with_the_most_samples_anybody_wants():
    one, two = Toy("one"), Toy("two")
    few, many, all_ = (Chosen(one, None, (1024,), n) for n in (5, 50, None))
    ask = Ask((512,))
    assert asked([few, many], ask) == asked([many, few], ask) == [("one", "exact", 1024, 50)]
    assert asked([few, all_, many], ask) == [("one", "exact", 1024, None)]
    assert asked([few, Chosen(one, "loose", (1024,), 9)], ask) == [("one", "exact", 1024, 5), ("one", "loose", 1024, 9)]
    assert asked([two, few, two], ask) == [("two", "exact", 512, None), ("one", "exact", 1024, 5)]
    # The command's number goes before every suite's; its lengths and profile only fill what is open.
    assert asked([few, two], Ask((512,), 7, "loose")) == [("one", "loose", 1024, 7), ("two", "loose", 512, 7)]
    assert asked([Chosen(one, "exact")], Ask((512,), profile="loose")) == [("one", "exact", 512, None)]
    assert asked([Toy("flat", has_lengths=False)], Ask((512, 1024))) == [("flat", "exact", None, None)]


def test_a_profile_is_checked_for_the_task_it_is_of():
    check_profile([Toy(), Chosen(Toy(), "loose")], None)
    check_profile([Toy()], "loose")
    check_profile([Chosen(Toy(), "exact")], "none of them")  # the suite's choice goes before
    for tasks, profile in (([Toy()], "lose"), ([Chosen(Toy(), "lose")], None)):
        with pytest.raises(UserError, match="^task toy has no profile 'lose'; it has exact, loose$"):
            check_profile(tasks, profile)


def test_missing_data_are_told_before_any_model_is_opened():
    check_data([Toy()], Ask((1024,)))
    with pytest.raises(DataError, match="^no data of late at 2048$"):
        check_data([Toy(), Chosen(Toy("late", data=None), None, (2048,))], Ask((1024,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1x", "length '1x' is not a number of tokens such as 4096, 4k or 1m"),
        ("127", "length '127' is outside 128 to 16777216 tokens"), ("17m", "length '17m' is outside"),
        ("1k,1024", "length '1024' is given twice"), ("1k, 1K", "length ' 1K' is given twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_length_is_said(text, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse_lengths(text)


def test_samples_are_kept_while_there_is_room():
    def entered(room):
        cell = Cell(Toy(), Setting("exact", 1024), backend().tokenizer)
        return cell.enter(plan_module.key_base(INFO), room), cell._kept is not None

    assert entered(20) == (20, True) and entered(21) == (20, True) and entered(19) == (0, False)
    cell = Cell(Toy(), Setting("exact", 1024), backend().tokenizer)
    cell.enter(plan_module.key_base(INFO), 0)
    assert [s.id for s in cell.samples()] == [e.sample_id for e in cell.entries]  # made again, the same ones


def test_cells_are_asked_together_as_far_as_they_fit(monkeypatch):
    monkeypatch.setattr(plan_module, "KEPT_TOKENS", 10)

    def groups(*sizes):
        cells = []
        for size in sizes:
            cell = Cell(Toy(), Setting("exact", 1024), None)
            cell.entries = (Entry("0", "k", 1, size),) if size else ()
            cells.append(cell)
        plan = Plan("r", {}, INFO, tuple(cells))
        return [[sum(e.tokens for e in cell.entries) for cell in group] for group in plan.groups()]

    assert groups(4, 6, 1) == [[4, 6], [1]] and groups(4, 7) == [[4], [7]] and groups(11, 12, 1) == [[11], [12], [1]]
    assert groups(10, 0, 0, 1) == [[10, 0, 0], [1]] and groups(5, 5, 5, 5) == [[5, 5], [5, 5]] and groups() == []


def test_done_samples_cost_nothing_in_a_dry_run():
    plan = planned()
    (whole,) = plan.summary(lambda key: False)
    assert (whole.samples, whole.done, whole.requests, whole.tokens) == (7, 0, 7, 20)
    some = {entry.key for entry in plan.cells[0].entries[:3]}
    (rest,) = plan.summary(some.__contains__)
    assert (rest.samples, rest.done, rest.requests, rest.tokens) == (7, 3, 4, 11)
