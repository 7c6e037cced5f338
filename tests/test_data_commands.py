"""The commands of the group `data`, and `run --data`: one line and the right code for what is amiss."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

import cli
import tasks
from evalsuite import backends
from evalsuite.types import LogLikelihood, Prompt, Sample, Score
from tasks import data
from tasks.data.spec import Dataset

PAIRS = Dataset("pairs", {"first": "text", "second": "text"}, "owner/pairs", "test", records=3, licence="CC0")


class Continue:
    """Scores the second text of a pair after the first."""

    name, version, suite, has_lengths = "continue", 1, "pairs-suite", False
    protocols = ("plain",)
    datasets = (PAIRS,)

    def samples(self, setting, tokenizer):
        def prompt(text):
            return Prompt(np.array(tokenizer.encode(text), np.int32), text)

        rows = data.rows(PAIRS)[: setting.samples]
        return [
            Sample(str(i), (LogLikelihood(prompt(row["first"]), prompt(row["second"])),), (row["second"],))
            for i, row in enumerate(rows)
        ]

    def data_digest(self, setting):
        return data.digest(PAIRS)

    def score(self, sample, responses):
        return [Score("nats", -responses[0].logprob, sample.target[0], "")]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """One task, an empty directory, and no network at all."""
    monkeypatch.setattr(tasks, "names", lambda: ["continue"])
    monkeypatch.setattr(tasks, "get", {"continue": Continue()}.__getitem__)
    monkeypatch.setattr(tasks, "resolve", lambda text: [Continue()])
    monkeypatch.setattr(tasks, "suites", lambda: {"pairs-suite": ("continue",)})
    monkeypatch.setenv("GDN2_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def refuse(*args):
        raise AssertionError("a network was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


def call(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def copy(path=Path("copy.jsonl"), count=3):
    rows = [{"first": f"{{a}} <s> Ж {i}", "second": f" b{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


RUN = ("run", "--model", "scripted:nothing", "--tasks", "continue")


def test_what_is_missing_is_said_before_the_model_loads(capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(backends, "load", load)
    code, out, err = call(capsys, *RUN, "--data", "there")
    assert (code, out) == (3, "") and err.count("\n") == 1
    assert "the data of pairs are not in there: `gdn2-eval data fetch pairs --to there` brings them" in err
    assert not Path("there").exists() and not Path("results", "runs").exists()


def test_an_imported_file_is_run_and_named_in_every_record(capsys):
    code, out, err = call(capsys, "data", "import", "continue", copy(), "--to", "there")
    assert (code, out, err) == (0, "pairs: 3 of 3 records in there/pairs.jsonl\n", "")
    code, out, _ = call(capsys, *RUN, "--data", "there")
    assert code == 0 and "continue" in out
    (records,) = Path("results").rglob("records.jsonl")
    digests = {json.loads(line)["data"] for line in records.read_text().splitlines()}
    assert digests == {json.loads(Path("there/manifest.json").read_text())["files"]["pairs.jsonl"]["sha256"]}
    run_id = records.parent.name
    code, out, _ = call(capsys, "show", run_id, "--sample", "2")
    assert code == 0 and "{a} <s> Ж 2 |  b2" in out


def test_another_place_with_the_same_data_is_the_same_run(capsys, monkeypatch):
    call(capsys, "data", "import", "pairs", copy(), "--to", "one")
    call(capsys, *RUN, "--data", "one")
    monkeypatch.setenv("GDN2_DATA", "")
    Path("one").rename("two")
    code, _, err = call(capsys, *RUN, "--data", "two")
    assert code == 0 and "0 samples answered" in err and "3 were there before" in err
    assert len(list(Path("results", "runs").iterdir())) == 1


def test_the_variable_serves_as_the_option(capsys, monkeypatch):
    call(capsys, "data", "import", "pairs", copy(), "--to", "one")
    monkeypatch.setenv("GDN2_DATA", "one")
    assert call(capsys, *RUN)[0] == 0
    code, _, err = call(capsys, "run", "--model", "hf:owner/model", "--tasks", "continue")
    assert code == 4 and "cannot be fetched from the cache" in err


def test_check_has_exit_code_3_for_what_is_not_whole(capsys):
    call(capsys, "data", "import", "pairs", copy(count=2), "--to", "one")
    code, out, _ = call(capsys, "data", "check", "one")
    assert code == 0 and out.splitlines()[1].split() == ["pairs.jsonl", "2", "3", "CC0", "short"]
    Path("one/pairs.jsonl").write_text("")
    code, out, _ = call(capsys, "data", "check", "one")
    assert code == 3 and "1 of 1 files are missing or changed" in out
    assert call(capsys, "data", "check", "nowhere")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("data", "import", "pears", "copy.jsonl"), 2, "no suite, task or data set 'pears'; did you mean pairs"),
        (("data", "import", "pairs", "nothing.jsonl"), 3, "nothing.jsonl is not a file"),
        (("data", "fetch", "pears"), 2, "did you mean pairs"),
        (("data", "fetch", "pairs", "--tokenizer", " "), 2, "--tokenizer ' ' is not a value"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, code, message):
    found, out, err = call(capsys, *arguments)
    assert (found, out, err.count("\n")) == (code, "", 1) and message in err
    assert not Path("cache").exists()
