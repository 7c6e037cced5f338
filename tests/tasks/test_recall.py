"""Table 4's cloze tasks: the cutter's every branch, the prompts, what is left out, scores, fields and files."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.plan import Ask
from evalsuite.plan import settings as planned
from evalsuite.types import Response, Sample, Setting
from gdn2.errors import DataError, UserError
from tasks.data import commands
from tasks.recall import PROTOCOL, RecallTask, cut, without_question
from tests.tasks.test_splice import Letters

NAMES = ("swde", "squad", "fda", "triviaqa", "nq", "drop")
QUESTION = {"context": "", "question": "", "answers": ["x"]}
FILES = {  # as the hub documents them
    "based_swde": [
        {"text": "Film page. Directed by Ann Lee. 1999.\nSummary of information above...\nyear: 1999\ndirector:",
         "key": "director", "value": "Ann Lee", "doc_id": "1"},
        {"text": "No value here. \nSummary of information above...\nyear:", "key": "year", "value": "", "doc_id": "2"},
    ],
    "based_squad": [
        {"text": " Normandy is a region. It lies in the north of France. Normandy lies in ", "value": "France"},
        {"text": "A. The grade was", "value": "B"},
    ],
    "based_fda": [
        {"text": "510(k) SUMMARY\nThe device is a pump.\nProduct code: FRN\n\nproduct code:Product Code:",
         "key": "product code", "value": "FRN"},
    ],
    "based_triviaqa": [
        {"context": "[DOC] [TLE] Rome [PAR] Rome is old. The capital of Italy is",
         "question": "The capital of Italy is", "answers": ["Rome", "Roma"],
         "orig_question": "What is the capital of Italy?"},
    ],
    "based_nq_2048": [
        {"context": "The Nile flows north. ", "question": "The Nile flows ", "answers": ["north"], "tok_pos": 3,
         "orig_question": "where does the nile flow:", "alt_answers": []},
    ],
    "based_drop": [
        {"context": "They scored 3 goals.", "question": "The number of goals was", "answers": ["3"],
         "orig_question": "How many goals:"},
    ],
}  # fmt: skip


class Begun(Letters):
    """One token a letter, after a BOS."""

    bos_id = 1 << 17


def row(**more: object) -> dict:
    return {"text": "", "key": "size", "value": "large", "alt_answers": [], "tok_pos": -1} | more


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with a small file of each set."""
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    for name, rows in FILES.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        commands.import_copy(name, file, tmp_path / "data")
    return tmp_path / "data"


def samples(name: str, fields: str = "", tokenizer: object = None) -> list[Sample]:
    task = tasks.get(name)
    (protocol,) = task.expand(PROTOCOL + fields)
    return list(task.samples(Setting(protocol), tokenizer or Letters()))


def text(name: str, fields: str = "") -> str:
    return samples(name, fields)[0].requests[0].prompt.text


# The cutter, by hand: 40 letters, the answer at letter 20, a room of 10 tokens.
PAGE = "abcdefghij" * 2 + "LARGE" + "klmnopqrstuvwxy"


@pytest.mark.parametrize(
    ("page", "given_row", "keys", "room", "want"),
    [
        (PAGE, row(), ["value"], 10, "fghijLARGE"),  # half before, half after; case ignored
        (PAGE, row(), ["value"], 11, "fghijLARGEk"),  # an odd room: the smaller half before
        (PAGE, row(), ["key", "value"], 10, "fghijLARGE"),  # the key is not there
        ("size? " + PAGE, row(), ["key", "value"], 10, "size? abcd"),  # it is, and earlier: the window starts with it
        ("LARGE" + PAGE, row(), ["value"], 10, "LARGEabcde"),  # of two places the first
        (PAGE, row(), ["value"], 60, PAGE),  # all of it fits
        (PAGE, row(), ["value"], 30, "fghijabcdefghijLARGEklmnopqrst"),  # at letter 20 less 15
        (PAGE, row(value="absent"), ["value"], 10, "tuvwxy"),  # not found: the last half window, and a letter
        (PAGE, row(value="absent", alt_answers=["none", "Large", "abc"]), ["value"], 10, "fghijLARGE"),
        (PAGE, row(value="absent", alt_answers=["abc"]), ["value"], 10, PAGE[:10]),
        (PAGE, row(value="large", alt_answers=["abc"]), ["value"], 10, "fghijLARGE"),  # found: others do not count
        (PAGE, row(value="absent", tok_pos=8), ["value"], 10, "defghijabc"),  # the place the row names
        (PAGE, row(value="absent", tok_pos=8), ["value"], 50, PAGE[14:]),  # not where the document is short enough
        (PAGE, row(value="absent", tok_pos=0), ["value"], 10, PAGE[:10]),
        (PAGE, row(), [], 10, PAGE[:10]),  # no keys: the head
        (PAGE, row(value=""), ["value"], 10, None),  # left out: fewer than two letters
        (PAGE, row(value="x"), ["value"], 10, None),
        (PAGE, row(key="s"), ["key", "value"], 10, None),
        (PAGE, row(value="x"), [], 10, PAGE[:10]),
        (PAGE, row(answers=["LARGE", "abc"]), ["answers"], 10, "fghijLARGE"),  # of a list the first entry
        (PAGE, row(answers=["z", "LARGE"]), ["answers"], 10, None),
        (PAGE, row(answers=[]), ["answers"], 10, None),
        (f"  \n{PAGE}\n ", row(), ["value"], 10, "fghijLARGE"),  # white space around it does not count
        ("(a.b) LARGE?", row(value="(A.B)"), ["value"], 8, "(a.b) LA"),  # not a pattern
        ("", row(), ["value"], 10, ""),
        (PAGE, row(), ["value"], 1, "L"),
    ],
)
def test_the_window_by_hand(page: str, given_row: dict, keys: list[str], room: int, want: str | None) -> None:
    assert cut(Letters(), page, given_row, keys, room) == want


@pytest.mark.parametrize(
    ("keys", "room", "want"),
    [
        (["value"], 10, "fghijLARGE"),  # BOS moves the answer and the document alike
        (["value"], 60, PAGE),
        ([], 10, PAGE[:9]),  # at the head it takes a place of the window; the answer "stands" after it
    ],
)
def test_bos_is_counted(keys: list[str], room: int, want: str) -> None:
    assert cut(Begun(), PAGE, row(), keys, room) == want


def plainly(tokens: list[str], begun: bool, page: str, asked: dict, keys: list[str], room: int) -> str | None:
    """The same in the words of the protocol, on a list of tokens of one letter."""
    places = []
    for key in keys:
        answer = asked[key][0] if isinstance(asked[key], list) else asked[key]
        if len(answer) <= 1:
            return None
        places += [page.lower().find(answer.lower())]
    places = [place for place in places if place >= 0]
    for other in asked["alt_answers"]:
        if keys and not places and other.lower() in page.lower():
            places = [page.lower().index(other.lower())]
    place = min(places) if places else -1 if keys else 0
    at = len(page[:place]) + begun
    if place == -1 and asked["tok_pos"] >= 0 and at > room:
        at = asked["tok_pos"]
    every = ["<s>"] * begun + tokens
    first = max(0, at - room // 2)
    return "".join(one for one in every[first : at + room - (at - first)] if one != "<s>")


@settings(max_examples=300, deadline=None)
@given(
    st.text("abAB", max_size=30), st.text("abAB", max_size=3), st.text("ab", max_size=3), st.booleans(),
    st.lists(st.text("abAB", min_size=1, max_size=4), max_size=2), st.integers(-1, 40), st.integers(1, 50),
    st.integers(0, 3),
)  # fmt: skip
def test_any_window_is_the_protocol_s(
    page: str, key: str, value: str, begun: bool, alternatives: list[str], tok_pos: int, room: int, which: int
) -> None:
    asked = {"key": key, "value": value, "answers": [value], "alt_answers": alternatives, "tok_pos": tok_pos}
    keys = [[], ["value"], ["key", "value"], ["answers"]][which]
    got = cut(Begun() if begun else Letters(), page, asked, keys, room)
    assert got == plainly(list(page), begun, page, asked, keys, room)


def test_a_window_is_never_longer_than_asked(public: Callable) -> None:
    page = " ".join(f"Entry {i} of the long report is number {i * 37}." for i in range(900))
    for name in ("llama2", "gpt2", "gpt-neox"):
        short = cut(public(name), page, row(value="number 16650"), ["value"], 1998)
        assert "number 16650" in short and 1900 < len(public(name).encode(short)) <= 2002
        before, after = (len(public(name).encode(part)) for part in short.split("number 16650"))
        assert abs(before - 999) < 10 and abs(after - 995) < 12


PROMPTS = [
    ("swde", "", "Film page. Directed by Ann Lee. 1999. Director:"),
    ("swde", ":listing=kept", "Film page. Directed by Ann Lee. 1999.\nSummary of information above...\n"
     "year: 1999. Director:"),
    ("swde", ":asked=twice", "Information about Director. Film page. Directed by Ann Lee. 1999.\n"
     "Film page. Directed by Ann Lee. 1999. Director:"),
    ("squad", "", "Normandy is a region. It lies in the north of France. Normandy lies in"),
    ("squad", ":asked=twice", "Normandy lies in Normandy is a region. It lies in the north of France.\n"
     "Normandy is a region. It lies in the north of France. Normandy lies in"),
    ("fda", "", "510(k) SUMMARY\nThe device is a pump.\nProduct code: FRN. Product code:"),
    ("fda", ":asked=twice", "Information about Product code. 510(k) SUMMARY\nThe device is a pump.\n"
     "Product code: FRN.\n510(k) SUMMARY\nThe device is a pump.\nProduct code: FRN. Product code:"),
    ("triviaqa", "", "Rome  Rome is old. The capital of Italy is"),
    ("triviaqa", ":asked=twice", "What is the capital of Italy? Rome  Rome is old.\n"
     "Rome  Rome is old. The capital of Italy is"),
    ("nq", "", "The Nile flows north. The Nile flows"),
    ("nq", ":asked=twice", "where does the nile flow The Nile flows north.\nThe Nile flows north. The Nile flows"),
    ("drop", "", "They scored 3 goals. The number of goals was"),
    ("drop", ":asked=twice", "How many goals They scored 3 goals.\nThey scored 3 goals. The number of goals was"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "want"), PROMPTS)
def test_prompts_are_the_protocol_s(home: Path, name: str, fields: str, want: str) -> None:
    made = text(name, fields)
    assert made == want
    assert not made[-1].isspace()  # a space at the end would be a token of its own


def test_rows_without_an_answer_are_left_out_only_where_they_are_cut(home: Path) -> None:
    assert [one.id for one in samples("swde")] == ["0"] and [one.id for one in samples("squad")] == ["0"]
    assert [one.id for one in samples("squad", ":cut=none")] == ["0", "1"]
    assert [one.id for one in samples("squad", ":keys=none")] == ["0", "1"]
    assert [one.id for one in samples("drop")] == ["0"]  # "3" is short, but drop has no keys
    assert samples("drop", ":keys=answers") == []


def test_requests_have_the_protocol_s_settings(home: Path) -> None:
    for name in NAMES:
        (request,) = samples(name)[0].requests
        assert (request.max_tokens, request.stop, request.decision.need) == (48, ("\n",), "any")
        assert request.prompt.ids.tolist() == Letters().encode(request.prompt.text)
        assert samples(name, ":tokens=9")[0].requests[0].max_tokens == 9
        assert samples(name, tokenizer=Begun())[0].requests[0].prompt.ids[0] != Begun.bos_id
        assert samples(name, ":bos=yes", Begun())[0].requests[0].prompt.ids[0] == Begun.bos_id
        assert samples(name, ":bos=yes")[0].requests[0].prompt.ids.dtype == np.int32
    assert samples("triviaqa")[0].target == ("Rome", "Roma") and samples("fda")[0].target == ("FRN",)


def test_the_window_is_a_field(home: Path) -> None:
    # 20 letters, the first of them a space.
    assert text("squad", ":window=30:answer=10") == "north of France. No"
    assert text("squad", ":window=30:answer=10:keys=none") == "Normandy is a region"
    assert text("triviaqa", ":window=20:answer=4") == "Rome. The capital of Italy is"


SAID = [
    (" in FRANCE, of course", 1.0, "target"),
    ("", 0.0, "nothing"),
    (" \t", 0.0, "nothing"),
    (" Spain", 0.0, "other"),
]


@pytest.mark.parametrize(("said", "value", "outcome"), SAID)
def test_containing_the_answer_is_right(home: Path, said: str, value: float, outcome: str) -> None:
    (score,) = tasks.get("squad").score(samples("squad")[0], [Response(text=said)])
    assert (score.metric, score.value, score.outcome) == ("contains", value, outcome)
    (score,) = tasks.get("triviaqa").score(samples("triviaqa")[0], [Response(text=" ROMA")])
    assert score.value == 1 and score.target == "Rome, Roma"


def test_a_record_without_any_answer_is_an_error_of_its_own() -> None:
    (score,) = tasks.get("nq").score(Sample("0", (), ()), [Response(text="x")])
    assert score.value is None and score.error == "the record has no answer"


@given(st.text("ab?: ", max_size=12), st.text("ab?: ", max_size=4))
def test_a_question_at_the_end_is_taken_off_however_often(passage: str, question: str) -> None:
    got = without_question(passage + question.upper() * 3, question)
    assert not question or not got.lower().endswith(question.lower())
    assert (passage + question * 3).lower().startswith(got.lower())


WRONG = [
    ("squad", "jrt:window=0", "window '0' of squad is not a number of tokens"),
    ("squad", "jrt:keys=key", "keys 'key' of squad is not none, or some of value"),
    ("swde", "jrt:keys=value+key", ""),
    ("nq", "jrt:length=4096", "length '4096' of nq is not 512, 1024 or 2048"),
    ("drop", "jrt:length=512", "has no field 'length=512'"),
    ("fda", "jrt:listing=kept", "has no field 'listing=kept'"),
    ("fda", "exact", "has no profile 'exact'; it has jrt"),
]


@pytest.mark.parametrize(("name", "profile", "message"), WRONG)
def test_fields_are_checked(name: str, profile: str, message: str) -> None:
    if not message:
        assert tasks.get(name).expand(profile)
        return
    with pytest.raises(UserError) as caught:
        tasks.get(name).expand(profile)
    assert message in str(caught.value)


def test_every_open_choice_is_shown_with_the_number() -> None:
    (cell,) = planned([tasks.get("nq")], Ask((1024,)))
    assert cell[1].protocol == (
        "jrt:window=2048:answer=50:cut=answer:keys=answers:bos=no:asked=once:tokens=48:length=2048"
    )
    assert cell[1].length is None


def test_nq_reads_the_set_of_its_length(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="based_nq_512"):
        samples("nq", ":length=512")
    file = tmp_path / "512.jsonl"
    file.write_text(json.dumps({"context": "Short.", "question": "It is", "answers": ["short"]}) + "\n")
    commands.import_copy("based_nq_512", file, home)
    assert text("nq", ":length=512") == "Short. It is"  # the columns that only some rows have are filled in
    digests = {tasks.get("nq").data_digest(Setting(*tasks.get("nq").expand(f"jrt:length={n}"))) for n in (512, 2048)}
    assert len(digests) == 2


def test_the_suite_is_table_4_and_its_sets_are_known() -> None:
    assert tasks.suites()["recall"] == NAMES
    found = [tasks.get(name) for name in NAMES]
    assert all(isinstance(task, RecallTask) for task in found)
    assert [task.datasets[-1].records for task in found] == [1111, 2984, 1102, 1688, 3157, 2087]
    assert [task.examples for task in found] == [1111, 2984, 1102, 1688, None, 2087]
    assert [task.datasets[-1].hub for task in found] == [
        "hazyresearch/based-swde-v2", "hazyresearch/based-squad", "hazyresearch/based-fda",
        "hazyresearch/based_triviaqa", "hazyresearch/based_nq_2048", "hazyresearch/based_drop",
    ]  # fmt: skip


def test_odd_texts_pass(home: Path, tmp_path: Path) -> None:
    odd = ["<s> {x} </s> %s", "שלום עולם", "", "\n\n", ".", "Ж: Ж:", "a\u2028b"]
    file = tmp_path / "odd.jsonl"
    rows = [{"text": f"{one} and {one}", "key": one or "key", "value": f"{one} and"} for one in odd]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    commands.import_copy("based_fda", file, home)
    for fields in ("", ":asked=twice", ":cut=none", ":window=20"):
        for sample in samples("fda", fields):
            prompt = sample.requests[0].prompt
            assert prompt.text.endswith(":") and prompt.ids.tolist() == Letters().encode(prompt.text)


def test_a_run_from_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "scripted:nothing", "--tasks", "recall,squad@jrt:asked=once/twice"]
    assert cli.main(command) == 0
    line = r"^(\w+) +(jrt:\S+) +- +contains +1(?: of \d+)? +0 +0\.0000$"
    rows = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 7 and {name for name, _ in rows} == set(NAMES)
    (home / "based_drop.jsonl").unlink()
    assert cli.main(["run", "--model", "no-such-model", "--tasks", "recall"]) == 3
    said = capsys.readouterr().err
    assert "data fetch based_drop" in said and "data import based_drop FILE" in said


def test_a_suite_file_s_data_are_fetched_by_its_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[[tasks]]\ntask = "drop"\n[[tasks]]\ntask = "qa_1"\n')
    brought: list[str] = []
    monkeypatch.setattr(commands, "_bring", lambda dataset, home: brought.append(dataset.name))
    monkeypatch.setattr(commands, "_bring_extra", lambda name, home: brought.append(name))
    commands.fetch(str(file), home, None, lambda text: None)
    assert brought == ["based_drop", "squad_v2", "essays", "punkt"]
    file.write_text('[[tasks]]\ntask = "dorp"\n')
    with pytest.raises(UserError, match="line 2"):
        commands.fetch(str(file), home, None, lambda text: None)
