"""The command `probe` on the bundled model: what it writes, resuming, kills, and mistakes in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.backends import load
from evalsuite.probe import needle, records, summary
from evalsuite.types import Setting
from gdn2.errors import DataError, UserError

ASKED = ["probe", "--model", "gdn2-tiny", "--task", "niah_single_2", "--length", "256", "--budget", "16"]


def call(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([*ASKED, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def lines(directory):
    (path,) = Path(directory).glob(f"*/{records.SAMPLES}")
    return path, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished probe of three samples: its directory."""
    out = tmp_path_factory.mktemp("probe")
    assert cli.main([*ASKED, "--samples", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(done, tmp_path):
    """The same, to be changed."""
    (source,) = done.iterdir()
    target = tmp_path / "out" / source.name
    target.mkdir(parents=True)
    for name in (records.SETTINGS, records.SAMPLES):
        (target / name).write_bytes((source / name).read_bytes())
    return tmp_path / "out"


def test_what_is_written(done):
    path, found = lines(done)
    names = sorted(file.name for file in path.parent.iterdir())
    plots = sorted(f"{name}.{kind}" for name in ("heads", "needle", "retention") for kind in ("png", "svg"))
    assert names == sorted([*plots, "lock", "probe.json", "samples.jsonl"])
    settings = json.loads((path.parent / records.SETTINGS).read_text())
    config = settings["model"]["details"]["config"]
    layers, each = len(config["pattern"]), config["mixers"]["gdn2"]["n_heads"]
    assert settings["heads"] == [[str(layer), "gdn2", head] for layer in range(layers) for head in range(each)]
    assert settings["version"] == records.VERSION and settings["identity"]["block"] == 64
    assert settings["passed"]["length"] == "256" and settings["provenance"]["packages"]["torch"]
    assert [sample["sample_id"] for sample in found] == ["0", "1", "2"]
    for sample in found:
        ends, heads, at = len(sample["ends"]), layers * each, sample["needle"]
        assert sample["ends"] == [64, 128, 192, sample["tokens"]]
        for name in ("half_life", "half_life_max", "erase", "write", "write_norm", "norm", "rank"):
            assert records.array(sample[name]).shape == (ends, heads)
        count = at["stop"] - at["start"]
        assert records.array(sample["retention"]).shape == (ends, count, heads)
        assert records.array(sample["asked"]).shape == (count, heads)
        assert len(at["texts"]) == len(at["roles"]) == count
        assert "".join(t for t, r in zip(at["texts"], at["roles"], strict=True) if r == "value") == sample["target"]
        window = sample["window"]
        assert window["start"] == max(0, at["start"] - 32)
        assert len(window["norm"]) == min(at["stop"] + 96, sample["tokens"]) - window["start"]
        assert sample["drift"] < 1e-4
        parts = sum(records.array(part).sum(0) for part in sample["change"].values())
        assert 1 + parts == pytest.approx(summary.mean_curve(sample, "retention")[-1], abs=1e-3)


def test_every_field_is_explained(done, root):
    text = (root / "evalsuite" / "probe" / "README.md").read_text()
    (directory,) = done.iterdir()
    settings = json.loads((directory / records.SETTINGS).read_text())

    def names(value):
        own = [k for k, v in value.items()]
        return [*own, *(n for k in ("needle", "change", "window") if k in value for n in names(value[k]))]

    told = [*names(lines(done)[1][0]), *lines(done)[1][0]["worst"][0], *(k for k in settings if k != "identity")]
    assert [name for name in told if f"`{name}`" not in text] == []


def test_the_answers_are_those_of_a_run(done, tmp_path, capsys):
    from evalsuite.store import read_records

    run = ["run", "--model", "gdn2-tiny", "--tasks", "niah_single_2", "--lengths", "256", "--budget", "16"]
    assert cli.main([*run, "--samples", "3", "--out", str(tmp_path)]) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    there = {r.key: (r.sample_id, r.score, r.output, r.outcome, r.prompt_tokens) for r in read_records(directory)}
    mine = lines(done)[1]
    assert {s["key"]: (s["sample_id"], s["score"], s["output"], s["outcome"], s["tokens"]) for s in mine} == there


def test_the_table_says_what_the_lines_say(done, copy, capsys):
    code, out, err = call(capsys, "--samples", "3", "--out", str(copy), "--format", "svg")
    assert code == 0
    (directory,) = copy.iterdir()
    probe = records.load(directory, lambda text: None)
    found = summary.heads(probe)
    assert [(h.layer, h.mixer, h.head) for h in found] == probe.heads
    right = [s for s in probe.samples if s["score"] == 1]
    for g, head in enumerate(found):
        value = [[n for n, role in enumerate(s["needle"]["roles"]) if role == "value"] for s in right]
        kept = np.mean([np.mean([s["retention"][-1][n][g] for n in v]) for s, v in zip(right, value, strict=True)])
        assert head.kept_hits == pytest.approx(kept)
        assert head.half_life == np.median([row[g] for s in probe.samples for row in s["half_life"]])
        assert head.decay == pytest.approx(np.mean([sum(r[g] for r in s["loss"]["decay"]) for s in probe.samples]))
        assert head.norm == pytest.approx(np.mean([s["norm"][-1][g] for s in probe.samples]))
        assert head.asked == pytest.approx(np.mean([max(row[g] for row in s["asked"]) for s in probe.samples]))
    last = found[-1]
    assert re.search(rf"\n +{last.layer}  gdn2 +{last.head} .* {last.kept_hits:.2f} ", out)
    assert f"{len(right)} of 3 answered right" in out
    assert "later write" in out and "3 were there before" in err


def test_a_probe_goes_on_and_repeats_nothing(copy, capsys):
    path, before = lines(copy)
    content = path.read_bytes()
    code, out, err = call(capsys, "--samples", "3", "--out", str(copy), "--format", "svg")
    assert code == 0 and path.read_bytes() == content
    assert call(capsys, "--samples", "4", "--out", str(copy), "--format", "svg")[0] == 0
    assert path.read_bytes().startswith(content) and len(lines(copy)[1]) == 4
    path.write_bytes(content[:-100])  # a kill in the middle of a line
    code, _, err = call(capsys, "--samples", "3", "--out", str(copy), "--format", "svg")
    assert code == 0 and "dropped a torn last line" in err and path.read_bytes() == content
    path.write_bytes(b"{}\n" + content)
    code, _, err = call(capsys, "--samples", "3", "--out", str(copy), "--format", "svg")
    assert code == 0 and "samples.jsonl:1: damaged sample counts as missing" in err and len(before) == 3


def test_a_profile_that_asks_more_is_followed_all_the_same(done, tmp_path, capsys):
    forced = ["--profile", "exact:forced=yes", "--samples", "2", "--out", str(tmp_path), "--format", "svg"]
    assert call(capsys, *forced)[0] == 0
    for mine, plain in zip(lines(tmp_path)[1], lines(done)[1], strict=False):
        assert mine["key"] != plain["key"] and mine | {"key": plain["key"]} == plain


def test_two_probes_are_drawn_against_each_other(copy, capsys):
    code, out, _ = call(capsys, "--samples", "2", "--out", str(copy), "--block", "128", "--format", "svg")
    assert code == 0 and (copy / "probes.svg").exists() and "probes.svg" in out
    assert len(list(copy.glob("gdn2-tiny-niah_single_2-256-*"))) == 2
    text = (copy / "probes.svg").read_text()
    assert "1: gdn2-tiny, niah_single_2 at 256" in text and "2: gdn2-tiny, niah_single_2 at 256" in text


def test_later_versions_and_other_probes_are_refused(copy, capsys):
    path, _ = lines(copy)
    content = path.read_text()
    path.write_text(content + '{"version": 99, "key": "x"}\n')
    code, _, err = call(capsys, "--samples", "3", "--out", str(copy))
    assert code == 3 and "version 99 is newer than 1" in err
    path.write_text(content)
    settings = path.parent / records.SETTINGS
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps(told | {"identity": {}}))
    code, _, err = call(capsys, "--samples", "3", "--out", str(copy))
    assert code == 3 and "is of another probe, its identity differs" in err
    settings.write_text(json.dumps(told | {"version": 99}))
    assert "version 99 is newer" in call(capsys, "--samples", "3", "--out", str(copy))[2]


def test_a_killed_probe_goes_on(done, tmp_path, root):
    command = [sys.executable, str(root / "cli.py"), *ASKED, "--samples", "3", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob(f"*/{records.SAMPLES}"))) or not found[0].stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli.main([*ASKED, "--samples", "3", "--out", str(tmp_path), "--format", "svg"]) == 0
    assert lines(tmp_path)[1] == lines(done)[1]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--model", "scripted:perfect"], 2, "model scripted-perfect cannot be probed"),
        (["--model", "gdn2-tny"], 2, "did you mean gdn2-tiny"),
        (["--task", "niah_single_9"], 2, "no task or suite 'niah_single_9'"),
        (["--task", "niah-paper"], 2, "task 'niah-paper' is 4 tasks: a probe looks at one"),
        (["--length", "256,512"], 2, "length '256,512' is more than one"),
        (["--length", "many"], 2, "length 'many' is not a number of tokens"),
        (["--length", "128"], 2, "length 128 is too short"),
        (["--block", "100"], 2, "block 100 is not a multiple of 64 tokens"),
        (["--block", "1"], 2, "--block"),
        (["--samples", "0"], 2, "--samples"),
        (["--format", "gif"], 2, "plot format 'gif' is unknown"),
        (["--profile", "exakt"], 2, "task niah_single_2 has no profile 'exakt'"),
        (["--profile", "exact:forced=yes/no"], 2, "profile 'exact:forced=yes/no' is 2 protocols: a probe looks at one"),
        (["--haystack", "nosuch"], 3, "nosuch"),
        (["--out", "/dev/null"], 6, "cannot write /dev/null"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = call(capsys, "--budget", "48", *arguments)
    assert (found, out) == (code, "") and message in err
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []


texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(
        ["-1", "0", "1e309", "nan", "9" * 400, "../x", "/", "\x1b[2J", "--", "[/b]", "\ud800", "4k,", "png,"]
    ),
)
NAMES = [p.opts[0] for p in typer.main.get_command(cli.app).commands["probe"].params if not p.is_flag]


@given(name=st.sampled_from(NAMES), value=texts)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_any_option_gives_a_traceback(capsys, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "--model", "scripted:perfect", name, value)  # what cannot be probed, at the latest
    assert code in (2, 3, 4, 6) and out == "", err
    assert err.count("\n") == 1 and "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_an_interruption_keeps_what_is_done(capsys, tmp_path, monkeypatch, done):
    append = records.append

    def second(directory, sample):
        append(directory, sample)
        if sample["sample_id"] == "1":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(records, "append", second)
    code, out, err = call(capsys, "--samples", "3", "--out", str(tmp_path))
    assert (code, out) == (130, "") and "interrupted by SIGINT" in err
    assert lines(tmp_path)[1] == lines(done)[1][:2]


@pytest.fixture(scope="module")
def tokenizer():
    return load("gdn2-tiny", device="cpu").tokenizer


NEEDLES = [("exact", name) for name in tasks.suites()["ruler"]]
NEEDLES += [("lm-eval", name) for name in ("niah_single_1", "niah_multikey_2")]  # the others need Punkt


@pytest.mark.parametrize("profile, name", NEEDLES)
def test_needles_are_found_where_they_stand(tokenizer, profile, name):
    task = tasks.get(name)
    for sample in task.samples(Setting(profile, 1024, 3), tokenizer):
        needle.check(sample, name)
        found = needle.locate(sample, tokenizer)
        ids = sample.requests[0].prompt.ids
        key, value = next(pair for pair in sample.facts["needles"] if pair[1] == sample.target[0])
        text = tokenizer.decode(ids[found.positions.start : found.positions.stop].tolist()).strip()
        assert text.startswith("One of the special magic ") and text.endswith(f"for {key} is: {value}")

        def said(role, found=found, ids=ids):
            chosen = [int(ids[found.positions[n]]) for n, r in enumerate(found.roles) if r == role]
            return tokenizer.decode(chosen).strip()

        assert said("value") == value and said("key") == key
        assert found.value == list(range(found.value[0], len(found.roles)))


def test_a_task_or_a_place_without_a_needle_is_refused(tokenizer, toy):
    from dataclasses import replace

    (sample,) = toy.Find().samples(Setting("exact", 256, 1), tokenizer)
    with pytest.raises(UserError, match="task toy_find hides no needle in its prompts"):
        needle.check(sample, "toy_find")
    (good,) = tasks.get("niah_single_1").samples(Setting("exact", 1024, 1), tokenizer)
    moved = replace(good, facts={**good.facts, "needle_token": 0, "needles": good.facts["needles"]})
    moved.requests[0].prompt.ids[:] = 5
    with pytest.raises(DataError, match="is not at token 0"):
        needle.locate(moved, tokenizer)
