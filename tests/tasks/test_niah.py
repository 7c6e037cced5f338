"""What the NIAH tasks ask and how they score, whatever makes the prompt."""

from collections.abc import Callable

import pytest

import tasks
from evalsuite.types import Response, Sample, Setting
from gdn2.errors import UserError
from tasks.ruler.niah import NiahTask
from tasks.ruler.templates import NIAH_TASKS


def cell(trained: Callable, name: str, count: int = 3, length: int = 1024, **options: str) -> list[Sample]:
    return list(tasks.get(name).samples(Setting("exact", length, count, options=options), trained("plain")))


def outcome(name: str, sample: Sample, text: str) -> tuple[float | None, str]:
    (score,) = tasks.get(name).score(sample, [Response(text=text)])
    assert score.metric == "string_match_all" and score.output == text and score.target == ", ".join(sample.target)
    return score.value, score.outcome


def test_wording_in_the_singular_and_the_plural() -> None:
    one, many = NIAH_TASKS[2], NIAH_TASKS[7]
    assert one.introduction == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it."
        " I will quiz you about the uuid afterwards."
    )
    assert one.question("k") == "What is the special magic uuid for k mentioned in the provided text?"
    assert one.answer_prefix("k") == "The special magic uuid for k mentioned in the provided text is"
    assert one.needle("k", "v") == "One of the special magic uuids for k is: v."
    assert many.introduction.startswith("Some special magic numbers are hidden")
    assert many.question("a, and b").startswith("What are all the special magic numbers for a, and b mentioned")
    assert many.answer_prefix("k").endswith("provided text are")


def test_requests(trained: Callable) -> None:
    for name in [task.name for task in NIAH_TASKS]:
        for sample in cell(trained, name, budget="64"):
            (request,) = sample.requests
            assert request.max_tokens == 64 and request.stop == ()
            assert request.decision.references == sample.target and request.decision.need == "all"
            assert len(request.prompt.ids) + 64 <= 1024
            assert sample.facts["length"] == 1024 and sample.facts["profile"] == "exact"
            assert sample.facts["key"] in request.prompt.text.splitlines()[-1]
    assert [len(cell(trained, name)[0].target) for name in ("niah_single_1", "niah_multivalue", "niah_multiquery")] == [
        1,
        4,
        4,
    ]


def test_the_target_is_found_as_ruler_finds_it(trained: Callable) -> None:
    (sample,) = cell(trained, "niah_single_3", 1)
    value = sample.target[0]
    assert outcome("niah_single_3", sample, f" {value.upper()}.\x00\n\nmore") == (1.0, "target")
    assert outcome("niah_single_3", sample, value[:-1]) == (0.0, "other")
    assert outcome("niah_single_3", sample, "") == (0.0, "nothing")


def test_distractors_are_named_by_recency(trained: Callable) -> None:
    for sample in cell(trained, "niah_multikey_1", 4):
        needles = sample.facts["needles"]
        assert len(needles) == 4
        for rank, (_, value) in enumerate(reversed(needles), start=1):
            want = (1.0, "target") if value in sample.target else (0.0, f"distractor:{rank}")
            assert outcome("niah_multikey_1", sample, f" {value}") == want
        said = [value for _, value in needles if value not in sample.target]
        assert (
            outcome("niah_multikey_1", sample, " and ".join(said))[1] == outcome("niah_multikey_1", sample, said[0])[1]
        )
        assert outcome("niah_multikey_1", sample, "is: 1000000.") == (0.0, "other")
        assert outcome("niah_multikey_1", sample, "I do not know, sorry") == (0.0, "nothing")


def test_fractions_are_partial(trained: Callable) -> None:
    (sample,) = cell(trained, "niah_multivalue", 1)
    assert outcome("niah_multivalue", sample, f"{sample.target[1]}, {sample.target[3]}") == (0.5, "partial")
    assert outcome("niah_multivalue", sample, ", ".join(reversed(sample.target))) == (1.0, "target")


def test_lines_of_a_needle_haystack_are_distractors(trained: Callable) -> None:
    (sample,) = cell(trained, "niah_multikey_2", 1)
    needles = sample.facts["needles"]
    assert len(needles) > 10
    last = next(value for _, value in reversed(needles) if value not in sample.target)
    assert outcome("niah_multikey_2", sample, last)[1] in ("distractor:1", "distractor:2")


def test_an_error_has_no_score(trained: Callable) -> None:
    (sample,) = cell(trained, "niah_single_1", 1)
    (score,) = tasks.get("niah_single_1").score(sample, [Response(text="x", error="out of memory", ended="error")])
    assert score.value is None and score.error == "out of memory"


BAD = [
    (Setting("exat", 1024), "profile"),
    (Setting("exact", None), "length"),
    (Setting("exact", 0), "length"),
    (Setting("exact", 1024, -1), "samples"),
    (Setting("exact", 1024, options={"budget": "0"}), "budget"),
    (Setting("exact", 1024, options={"budget": "1e3"}), "budget"),
    (Setting("exact", 1024, options={"budget": "²"}), "budget"),
    (Setting("exact", 1024, options={"haystack_offset": "-1"}), "haystack_offset"),
    (Setting("exact", 1024, options={"haystack_offset": "some"}), "random"),
    (Setting("exact", 1024, options={"haystack_offset": "100001"}), "beyond 100000"),
    (Setting("exact", 1024, options={"haystack_offset": "9" * 5000}), "haystack_offset"),
    (Setting("nvidia-main", 1024, options={"haystack_offset": "3"}), "haystack_offset"),
    (Setting("exact", 64), "too short"),
    (Setting("exact", 200), "use at least"),
]


@pytest.mark.parametrize(("setting", "said"), BAD)
def test_bad_settings_are_refused_at_once(trained: Callable, setting: Setting, said: str) -> None:
    for task in NIAH_TASKS:
        with pytest.raises(UserError, match=said) as caught:
            tasks.get(task.name).samples(setting, trained("plain"))
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_no_samples_and_all_samples(trained: Callable) -> None:
    task = tasks.get("niah_single_1")
    assert isinstance(task, NiahTask) and task.has_lengths and task.protocols[0] == "exact"
    assert len(task.samples(Setting("exact", 1024, 0), trained("plain"))) == 0
    assert len(task.samples(Setting("exact", 1024), trained("plain"))) == 500
    with pytest.raises(IndexError):
        task.samples(Setting("exact", 1024, 3), trained("plain"))[3]
