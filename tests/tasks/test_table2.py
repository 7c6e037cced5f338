"""Table 2's tasks on rows made to be difficult: lm-eval's wording and scores, and what it has no answer for."""

import json
import math
import random
import socket
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.backends.scripted import ByteTokenizer
from evalsuite.lm_eval_bridge.encoding import documents, pairs
from evalsuite.scorers import overall
from evalsuite.types import Response, Setting
from gdn2.errors import DataError, UserError
from tasks import commonsense, language
from tasks.data import commands, shelf
from tasks.data.formats import read_copy

ODD = [
    "{{braces}} {% if %}",
    "<s></s><|endoftext|>",
    "Жёлтый 鯨 \u2028 e\u0301",
    "  spaces  ",
    "[title] [step] x",
    "'q' \"q\"",
    "3",
]
ROWS = {
    "piqa": [
        {"goal": g, "sol1": s, "sol2": g + "b", "label": i % 2}
        for i, (g, s) in enumerate(zip(ODD, [*ODD[1:], "."], strict=True))
    ],
    "hellaswag": [
        {
            "activity_label": g,
            "ctx_a": g + " A.",
            "ctx_b": "" if i % 2 else "he RUNS",
            "endings": ["a", g, g + " [x] c", "d"],
        }
        | {"label": i % 4}
        for i, g in enumerate(ODD)
    ],
    "winogrande": [
        {"sentence": f"{g} said _ was {g}. ", "option1": "Ann", "option2": g, "answer": str(1 + i % 2)}
        for i, g in enumerate(ODD)
    ],
    "openbookqa": [
        {
            "question_stem": g,
            "choices": {"text": [g, "b", "c", "d e"], "label": list("ABCD")},
            "answerKey": " ABCD"[1 + i % 4],
        }
        for i, g in enumerate(ODD)
    ],
    "social_iqa": [
        {"context": g, "question": "Why?", "answerA": "a", "answerB": g, "answerC": "cc", "label": 1 + i % 3}
        for i, g in enumerate(ODD)
    ],
    "boolq": [{"passage": g, "question": f"is it {g}", "label": i % 2} for i, g in enumerate(ODD)],
    "lambada_openai": [{"text": f"{g} last{i}"} for i, g in enumerate(ODD)],
    "wikitext": [
        {"page": f" = {g} = \n \n A @-@ b , c . D 's ( x ) N \" {g} \" e ; f : g s ' h 5 ° C \n"} for g in ODD
    ],
}
ROWS["arc_easy"] = ROWS["arc_challenge"] = [
    {"question": g, "choices": {"text": [g, "b", "c"], "label": list("123")}, "answerKey": "123"[i % 3]}
    for i, g in enumerate(ODD)
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of the odd rows."""
    for name, rows in ROWS.items():
        (dataset,) = tasks.get(name).datasets
        shelf.store(tmp_path / "data", dataset, rows, "a test")
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def keep(home: Path, name: str, rows: list[dict]) -> None:
    (dataset,) = tasks.get(name).datasets
    shelf.store(home, dataset, rows, "a test")


def asked(name: str, profile: str | None = None) -> list:
    task = tasks.get(name)
    return list(task.samples(Setting(profile or task.protocols[0]), ByteTokenizer()))


def test_the_suites_are_those_of_the_paper() -> None:
    suites = tasks.suites()
    assert suites["language"] == ("wikitext", "lambada_openai")
    wanted = "piqa hellaswag winogrande arc_easy arc_challenge openbookqa social_iqa boolq"
    assert suites["commonsense"] == tuple(wanted.split())
    sizes = [tasks.get(name).examples for name in (*suites["language"], *suites["commonsense"])]
    assert sizes == [62, 5153, 1838, 10042, 1267, 2376, 1172, 500, 1954, 3270]


@pytest.mark.filterwarnings("ignore")
def test_odd_rows_are_worded_and_scored_as_lm_eval_does(parity: ModuleType, home: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    for task in parity.lm_eval_tasks(list(ROWS), home, tmp_path):
        name = task.config.task
        with parity.silence():
            task.build_all_requests(limit=None, rank=0, world_size=1)
        by_sample: dict[int, list] = {}
        for instance in task.instances:
            by_sample.setdefault(instance.doc_id, []).append(instance)
        ours = asked(name)
        assert len(by_sample) == len(ours) == len(ODD)
        for sample, instances in zip(ours, by_sample.values(), strict=True):
            texts = [parity.texts(request) for request in sample.requests]
            assert texts == ["".join(instance.args) for instance in instances]
            values = [Response(logprob=-rng.random() * 9 - 1, greedy=rng.random() < 0.5) for _ in instances]
            single = name == "wikitext"
            found = task.process_results(
                instances[0].doc, [v.logprob if single else (v.logprob, v.greedy) for v in values]
            )
            assert parity.same(tasks.get(name).score(sample, values), found)


def test_hub_and_split_are_those_lm_eval_reads() -> None:
    from evalsuite.lm_eval_bridge.loading import configuration

    for name in ROWS:
        (dataset,) = tasks.get(name).datasets
        theirs = configuration(name)
        split = theirs.get("test_split") or theirs["validation_split"]
        assert (dataset.hub, dataset.config, dataset.split) == (
            theirs["dataset_path"],
            theirs.get("dataset_name"),
            split,
        )


@pytest.mark.parametrize(
    ("name", "change", "label"),
    [
        ("piqa", {"label": 2}, "2"),
        ("piqa", {"label": -1}, "-1"),
        ("hellaswag", {"label": 4}, "4"),
        ("winogrande", {"answer": ""}, "-1"),
        ("openbookqa", {"answerKey": "E"}, "-1"),
        ("social_iqa", {"label": 0}, "-1"),
    ],
)
def test_a_label_that_names_no_choice_is_an_error_of_that_sample(
    home: Path, name: str, change: dict, label: str
) -> None:
    keep(home, name, [ROWS[name][0] | change, ROWS[name][1]])
    task = tasks.get(name)
    bad, good = asked(name)
    scores = task.score(bad, [Response(logprob=-1.0 - i, greedy=False) for i, _ in enumerate(bad.requests)])
    assert [score.metric for score in scores] == list(task.metrics)
    assert all(score.value is None and score.error.startswith(f"label {label} is not one of 0 to") for score in scores)
    scores = task.score(good, [Response(logprob=-1.0 - i, greedy=False) for i, _ in enumerate(good.requests)])
    assert all(score.value is not None and score.error is None for score in scores)


def test_empty_fields_are_asked(home: Path) -> None:
    keep(home, "piqa", [{"goal": "", "sol1": "", "sol2": "b", "label": 0}])
    (sample,) = asked("piqa")
    assert [request.context.text for request in sample.requests] == ["Question: \nAnswer:"] * 2
    assert [request.continuation.text for request in sample.requests] == [" ", " b"]
    acc, norm = tasks.get("piqa").score(
        sample, [Response(logprob=-1.0, greedy=False), Response(logprob=-2.0, greedy=False)]
    )
    assert (acc.value, norm.value) == (1.0, 0.0)  # nothing a character of an empty choice is minus infinity
    keep(home, "lambada_openai", [{"text": "word"}])
    (sample,) = asked("lambada_openai")
    assert sample.requests[0].context.text == "" and list(sample.requests[0].context.ids) == [256]
    keep(home, "winogrande", [{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}])
    with pytest.raises(DataError, match=r"winogrande, record 1: the sentence has no gap \(_\)"):
        asked("winogrande")


def test_ties_take_the_first_choice_and_are_named(home: Path) -> None:
    keep(home, "piqa", [{"goal": "g", "sol1": "ab", "sol2": "cd", "label": 1}])
    (sample,) = asked("piqa")
    acc, _ = tasks.get("piqa").score(sample, [Response(logprob=-2.0, greedy=False)] * 2)
    assert (acc.value, acc.outcome, acc.target) == (0.0, "tie", "cd")
    assert acc.output == "ab\n[-2.0, -2.0]"


def test_lengths_are_counted_in_characters(home: Path) -> None:
    """Not in bytes: of three Cyrillic letters, which are six bytes, each costs a third."""
    keep(home, "piqa", [{"goal": "g", "sol1": "жжж", "sol2": "abcde", "label": 1}])
    (sample,) = asked("piqa")
    answers = [Response(logprob=-4.0, greedy=False), Response(logprob=-5.0, greedy=False)]
    acc, norm = tasks.get("piqa").score(sample, answers)
    assert (acc.value, norm.value) == (0.0, 1.0)


class Words(ByteTokenizer):
    """Tokens are words with the space before them; BOS is 0."""

    bos_id = 0

    def encode(self, text):
        return [1 + len(word) for word in text.split(" ")]


def test_white_space_at_the_end_of_a_context_moves() -> None:
    moved, plain = pairs(ByteTokenizer(), [("ab \n", "cd"), ("ab", " cd")])
    assert (moved.context.text, moved.continuation.text) == ("ab", " \ncd")
    assert list(moved.context.ids) == [256, 97, 98] and list(moved.continuation.ids) == [32, 10, 99, 100]
    assert list(plain.context.ids) == list(moved.context.ids)
    # The continuation is what the whole text has beyond the context, even where its first token reaches back.
    (joined,) = pairs(Words(), [("a bb", "cc ddd")])
    assert list(joined.context.ids) == [0, 2, 3] and list(joined.continuation.ids) == [4]
    (blank,) = pairs(ByteTokenizer(), [("  ", "x")])
    assert list(blank.context.ids) == [256] and list(blank.continuation.ids) == [32, 32, 120]


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=5))
def test_pairs_hold_the_whole_text(texts: list[tuple[str, str]]) -> None:
    tokenizer = ByteTokenizer()
    for (context, continuation), made in zip(texts, pairs(tokenizer, texts), strict=True):
        assert made.context.text == context.rstrip()
        assert made.context.text + made.continuation.text == context + continuation
        ids = [*made.context.ids, *made.continuation.ids]
        assert ids[0] == 256 and tokenizer.decode(ids[1:]) == context + continuation


def test_how_whole_documents_are_read_is_in_the_protocol() -> None:
    task = tasks.get("wikitext")
    assert task.expand("lm-eval") == ("lm-eval:window=2048:bos=twice",)
    both = task.expand("lm-eval:bos=twice/once:window=whole")
    assert both == ("lm-eval:window=whole:bos=twice", "lm-eval:window=whole:bos=once")
    with pytest.raises(UserError, match="window '0' of wikitext is not a number of tokens, or whole"):
        task.expand("lm-eval:window=0")
    # The backend puts BOS before a document; lm-eval's own has it in the document too, and scores it.
    twice, once = (documents(ByteTokenizer(), ["ab"], profile)[0] for profile in both)
    assert list(twice.document.ids) == [256, 97, 98] and list(once.document.ids) == [97, 98]
    assert (twice.window, documents(ByteTokenizer(), ["ab"], "lm-eval:window=77")[0].window) == (None, 77)


def test_perplexities_are_by_words_of_the_page_as_it_was(home: Path) -> None:
    keep(home, "wikitext", [{"page": " a @-@ b \n"}, {"page": "c"}])
    task = tasks.get("wikitext")
    samples = asked("wikitext")
    assert samples[0].requests[0].document.text == " a-b\n"
    scores = [task.score(s, [Response(logprob=-ll)])[0] for s, ll in zip(samples, (6.0, 2.0), strict=True)]
    assert [(s.metric, s.value, s.weight) for s in scores] == [
        ("word_perplexity", 6 / 5, 5.0),
        ("word_perplexity", 2.0, 1.0),
    ]
    mean = sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)
    assert overall("word_perplexity", mean) == pytest.approx(math.exp(8 / 6))
    assert overall("perplexity", 1e6) == math.inf and overall("acc", 0.5) == 0.5


def test_original_formats(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    row = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c"}
    path = write("dev.jsonl", json.dumps(row) + "\n")
    write("dev-labels.lst", "3\n")
    assert read_copy(commonsense.SIQA, path) == [row | {"label": 3}]
    write("dev-labels.lst", "3\n1\n")
    with pytest.raises(DataError, match="has 1 records, its labels are 2"):
        read_copy(commonsense.SIQA, path)
    stem = {"stem": "s", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}
    path = write("ARC.jsonl", json.dumps({"id": "1", "question": stem, "answerKey": "B"}) + "\n")
    wanted = {"question": "s", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    assert read_copy(commonsense.ARC_EASY, path) == [wanted]
    path = write("boolq.jsonl", json.dumps({"question": "q", "title": "t", "answer": True, "passage": "p"}) + "\n")
    assert read_copy(commonsense.BOOLQ, path) == [{"passage": "p", "question": "q", "label": 1}]
    head = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\r\n"
    path = write("test.tsv", head + "8\tStem (one)\t(A) a (x) b (B) c (C) d (D) e\tignored\tC\r\n")
    wanted = {"text": ["a (x) b", "c", "d", "e"], "label": ["A", "B", "C", "D"]}
    assert read_copy(commonsense.OPENBOOKQA, path) == [
        {"question_stem": "Stem (one)", "choices": wanted, "answerKey": "C"}
    ]
    path = write("wiki.raw", " \n = One = \n \n Text = 1 . \n = = Part = = \n x \n \n = Two = \n \n y \n")
    first, second = read_copy(language.WIKITEXT, path)
    assert (
        first["page"] == " = One = \n \n Text = 1 . \n = = Part = = \n x \n "
        and second["page"] == " = Two = \n \n y \n"
    )
    with pytest.raises(DataError, match="does not begin with a page's heading"):
        read_copy(language.WIKITEXT, write("other.raw", "text\n"))


def test_table_2_is_one_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without a network; the table says how many of how many, and one bad label costs one sample."""

    def refuse(*args: object) -> None:
        raise AssertionError("a network was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "scripted:nothing", "--tasks", "language,commonsense", "--data", str(home)]
    assert cli.main(command) == 0
    lines = {tuple(line.split()[:1] + line.split()[3:4]): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["piqa", "acc_norm"][4:8] == ["7", "of", "1838", "0"]
    assert lines["wikitext", "word_perplexity"][1] == "lm-eval:window=2048:bos=twice"
    assert float(lines["wikitext", "word_perplexity"][-1]) > 100 > float(lines["wikitext", "bits_per_byte"][-1])
    keep(home, "piqa", [ROWS["piqa"][0] | {"label": 5}, ROWS["piqa"][1]])
    capsys.readouterr()
    assert cli.main([*command[:4], "piqa", *command[5:]]) == 5
    captured = capsys.readouterr()
    assert "1 failed" in captured.err and " 1 of 1838 " in captured.out
    (path,) = tmp_path.rglob("records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    digests = {entry.sha256 for entry in shelf.manifest(home).values()}
    assert {record["data"] for record in records[-4:]} <= digests
    assert [record["error"] for record in records[-4:]].count("label 5 is not one of 0 to 1") == 2


def test_real_files_are_complete(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2_DATA", str(benchmarks))
    rows, bad = commands.check(benchmarks)
    assert bad == 0 and {row[-1] for row in rows} == {"whole"} and len(rows) == 7
    assert sum(len(asked(name)) for name in ("openbookqa", "piqa", "winogrande")) == 500 + 1838 + 1267
    requests = [request for sample in asked("openbookqa") for request in sample.requests]
    assert len(requests) == 2000 and all(request.context.ids.dtype == np.int32 for request in requests)
