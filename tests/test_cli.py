"""The command line: its surface is frozen, a mistake is one line with the right code, and nothing else is written."""

import ast
import dataclasses
import errno
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.names import one_line, plain, slug, suggest
from evalsuite.store import read_records
from gdn2.errors import UserError

# Adding a command or an option means adding it here.
SURFACE = {
    "run": "--model --tasks --lengths --samples --profile --haystack --seed --out --device --dtype --batch-tokens "
    "--haystack-offset --budget --allow-pickle-weights --allow-bad-values --set --tokenizer --bos --offline "
    "--data --no-prefix-sharing --fast --lm-eval-rounding --dry-run",
    "convert": "source target --to --allow-pickle-weights --allow-bad-values --set --tokenizer --offline",
    "list": "what --out --long",
    "show": "run path --sample --where --out --allow-pickle-weights --set",
    "tables": "--runs --out --format --published --check --rows --columns --where --effective",
    "compare": "runs --results --where --out --format --check",
    "paper": "--runs --out --published --where --check",
    "watch": "run --out --every",
    "plan": "--detect --samples --power --tests",
    "plot": "--runs --log --where --only --out --format",
    "capacity": "--runs",
    "report": "--runs --out --prompts --where",
    "probe": "--model --task --length --samples --out --block --profile --haystack --haystack-offset --budget --seed "
    "--device --dtype --format --allow-pickle-weights --allow-bad-values --set --tokenizer --bos --offline",
    "train": "config --out --preset --device",
    "doctor": "--compile --target --only",
    "bench kernels": "--ops --mixers --only --peer-shapes --rounds --device --out",
    "bench engine": "--model --lengths --against --prompts --new-tokens --batches --rounds --device --dtype --only "
    "--out",
    "data fetch": "names --to --tokenizer",
    "data check": "directory",
    "data import": "task file --to",
    "bench training": "--models --shapes --rounds --device --kernels --recompute --out",
    "data ruler": "--task --length --tokenizer --out --samples --profile --seed --haystack --haystack-offset --budget",
    "data punkt": "",
    "data essays": "",
}
COMMANDS = typer.main.get_command(cli.app).commands
GOOD = {"--model": "scripted:perfect", "--tasks": "toy_find", "--lengths": "256", "--samples": "2"}


@pytest.fixture(autouse=True)
def toys(monkeypatch, root, tmp_path):
    """Replace the tasks by the harness's small ones, and work in an empty directory."""
    spec = importlib.util.spec_from_file_location("toy", root / "tests" / "evalsuite" / "toy.py")
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    known = {"toy_find": toy.Find(), "toy_choose": toy.Choose()}

    def resolve(text):
        names = text.split(",")
        for name in names:
            if name not in known:
                raise UserError(f"task {name[:60]!r} is unknown; {suggest(name, known)}")
        return [known[name] for name in names]

    monkeypatch.setattr(tasks, "resolve", resolve)
    monkeypatch.setattr(tasks, "get", known.__getitem__)
    monkeypatch.setattr(tasks, "names", lambda: sorted(known))
    monkeypatch.setattr(tasks, "suites", lambda: {"toy": tuple(known)})
    monkeypatch.chdir(tmp_path)


def call(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def options(**changes):
    chosen = GOOD | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return ["run", *(part for name, value in chosen.items() for part in (name, value))]


def files(directory=Path(".")):
    return sorted(str(p) for p in directory.rglob("*"))


def run_directory():
    (found,) = Path("results/runs").iterdir()
    return found


def surface(commands, before=""):
    found = {}
    for name, command in commands.items():
        assert command.help, f"{before}{name} has no help"
        if hasattr(command, "commands"):
            found |= surface(command.commands, f"{before}{name} ")
            continue
        assert all(param.help for param in command.params), f"{before}{name} has an option without help"
        found[before + name] = " ".join(p.opts[0] for p in command.params)
    return found


def test_the_surface_is_frozen():
    assert surface(COMMANDS) == SURFACE


def test_help_is_quick_and_imports_nothing_heavy(root):
    command = [sys.executable, "-X", "importtime", str(root / "cli.py"), "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of work, which a busy machine does not change; it waits for nothing.
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took < 0.5 and "Commands:" in done.stdout
    loaded = set(re.findall(r"\|\s+([a-z_]+)$", done.stderr, re.MULTILINE))
    assert "typer" in loaded and not loaded & {"torch", "transformers", "pandas", "matplotlib", "numpy", "scipy"}


def test_a_run_its_records_and_its_repetition(capsys):
    code, out, err = call(capsys, *options(tasks="toy_find,toy_choose"))
    assert code == 0 and "4 samples answered" in err
    assert re.search(r"toy_find\s+exact\s+256\s+match\s+2\s+0\s+1\.0000", out)
    before = {p: Path(p).read_bytes() for p in files() if Path(p).is_file()}
    code, again, err = call(capsys, *options(tasks="toy_find,toy_choose"))
    assert code == 0 and again == out and "0 samples answered" in err and "4 were there before" in err
    assert {p: Path(p).read_bytes() for p in files() if Path(p).is_file()} == before
    assert len(read_records(run_directory())) == 2 + 2 * 2


def test_another_seed_model_or_profile_is_another_run(capsys):
    for changes in ({}, {"seed": "1"}, {"model": "scripted:last"}, {"profile": "other"}, {"budget": "9"}):
        assert call(capsys, *options(**changes))[0] == 0
    assert len(list(Path("results/runs").iterdir())) == 5
    assert call(capsys, *options(profile="exact", samples="3", lengths="512"))[0] == 0
    assert len(list(Path("results/runs").iterdir())) == 5


def test_a_dry_run_prices_and_writes_nothing(capsys):
    code, out, _ = call(capsys, *options(lengths="256,512"), "--dry-run")
    assert code == 0 and files() == []
    assert re.search(r"toy_find\s+exact\s+512\s+2\s+0\s+2\s+\d+", out) and "unknown until the first answers" in out
    call(capsys, *options())
    before = files()
    code, out, _ = call(capsys, *options(samples="3"), "--dry-run")
    assert re.search(r"toy_find\s+exact\s+256\s+3\s+2\s+1\s+\d+", out) and "tokens/s" in out and files() == before


def test_a_length_beyond_the_window_is_said(capsys, monkeypatch):
    from evalsuite.backends import scripted

    load = scripted.load

    def short(spec):
        backend = load(spec)
        backend.info = dataclasses.replace(backend.info, window=300)
        return backend

    monkeypatch.setattr(scripted, "load", short)
    assert "warning: length 512 is beyond the 300 tokens" in call(capsys, *options(lengths="256,512"), "--dry-run")[2]
    assert call(capsys, *options(), "--dry-run")[2] == ""


def test_failures_are_told_and_have_their_code(capsys, monkeypatch):
    score = type(tasks.resolve("toy_find")[0]).score

    def odd(self, sample, responses):
        if sample.id == "1" and responses[0].text:
            raise KeyError("x")
        return score(self, sample, responses)

    monkeypatch.setattr(type(tasks.resolve("toy_find")[0]), "score", odd)
    code, out, err = call(capsys, *options())
    assert code == 5 and "1 failed: the results are partial" in err
    assert re.search(r"match\s+1\s+1\s+1\.0000", out)


BAD = [
    ("--model", "", 2),
    ("--model", "scripted:perfct", 2),
    ("--model", "nosuch", 2),
    ("--model", "a\0b", 2),
    ("--model", "../" * 2000, 2),
    ("--tasks", "", 2),
    ("--tasks", "toy_fnd", 2),
    ("--tasks", "toy_find,", 2),
    ("--tasks", "../../x", 2),
    ("--lengths", "", 2),
    ("--lengths", "1x", 2),
    ("--lengths", "100", 2),
    ("--lengths", "256,256", 2),
    ("--samples", "0", 2),
    ("--samples", "-1", 2),
    ("--samples", "1e309", 2),
    ("--samples", "nan", 2),
    ("--samples", "9" * 5000, 2),
    ("--profile", "exakt", 2),
    ("--profile", "", 2),
    ("--haystack", "", 2),
    ("--seed", "-1", 2),
    ("--seed", "1.5", 2),
    ("--seed", str(2**63), 2),
    ("--out", "", 2),
    ("--out", "a\0b", 2),
    ("--out", "x" * 300, 6),
    ("--out", "/dev/null", 6),
    ("--device", "tpu", 2),
    ("--device", "cuda:", 2),
    ("--dtype", "int8", 2),
    ("--batch-tokens", "1", 2),
    ("--batch-tokens", "many", 2),
    ("--budget", "0", 2),
    ("--haystack-offset", "", 2),
    ("--colour", "red", 2),
]


@pytest.mark.parametrize("name, value, expected", BAD, ids=[f"{n}={v[:12]!r}" for n, v, _ in BAD])
def test_a_bad_value_is_one_line_and_nothing_is_written(capsys, name, value, expected):
    code, out, err = call(capsys, *options(), name, value)
    assert (code, out) == (expected, "") and files() == []
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 500


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Missing command"),
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing option"),
        (["run", "--model"], "requires an argument"),
        (["run", "extra", *options()[1:]], "unexpected extra argument"),
        (["list", "cats"], "'cats' is not one of 'models'"),
        (["show"], "Missing argument"),
        (["show", "nosuch"], "run 'nosuch' is not in results/runs; there are none"),
        (["--version-of-mine"], "No such option"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, arguments, message):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and files() == []


def test_a_misspelt_name_gets_the_right_one(capsys):
    assert "did you mean toy_find?" in call(capsys, *options(tasks="toy_fnd"))[2]
    assert "did you mean scripted:perfect or" in call(capsys, *options(model="scriptedperfect"))[2]
    assert "task toy_find has no profile 'exakt'; it has exact, other" in call(capsys, *options(profile="exakt"))[2]


texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(["-1", "0", "1e309", "nan", "9" * 400, "../x", "/", "\x1b[2J", "é", "--", "[/b]", "\ud800", "CON"]),
)


@given(name=st.sampled_from([p.opts[0] for p in COMMANDS["run"].params if p.opts[0] != "--dry-run"]), value=texts)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_any_option_gives_a_traceback(capsys, name, value):
    code, _, err = call(capsys, *options(), name, value, "--dry-run")
    assert code in (0, 2, 3, 4, 6), err
    assert err.count("\n") == (code != 0) and "Traceback" not in err and files() == []
    assert plain(err) == err


@given(
    command=st.sampled_from(["list", "show"]),
    value=texts,
    more=st.sampled_from([[], ["--out", "x"], ["--sample", "1"]]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_argument_of_the_readers_gives_a_traceback(capsys, command, value, more):
    code, _, err = call(capsys, command, value, *more)
    assert code in (0, 2, 3) and "Traceback" not in err and err.count("\n") == (code != 0) and files() == []


def test_a_task_or_model_name_writes_nothing_outside_the_results(capsys, tmp_path):
    (tmp_path / "inside").mkdir()
    os.chdir(tmp_path / "inside")
    for name in ("../../x", "/nowhere/x", "x" * 300, "CON", "🦊"):
        assert call(capsys, *options(tasks=name))[0] == 2
        assert call(capsys, *options(model=name))[0] == 2
    assert files(tmp_path) == [str(tmp_path / "inside")]


def test_a_read_only_place_is_refused_before_the_model_is_opened(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = call(capsys, *options(model="nosuch"))
    assert code == 6 and "no permission to write" in err


def test_lists(capsys):
    call(capsys, *options())
    assert "scripted:perfect" in call(capsys, "list", "models")[1]
    assert re.search(r"toy_choose\s+toy\s+1\s+no\s+exact\n", call(capsys, "list", "tasks")[1])
    assert re.search(r"toy\s+toy_find, toy_choose\n", call(capsys, "list", "tasks")[1])
    assert re.search(r"toy\s+exact\s+yes\ntoy\s+other\n", call(capsys, "list", "profiles")[1])
    assert re.search(r"scripted-perfect-\w{12}\s+scripted-perfect\s+complete\s+2\s+20", call(capsys, "list", "runs")[1])
    assert re.search(r"score\s+number or null\s+value of the metric", call(capsys, "list", "columns")[1])


def test_a_run_and_a_sample_are_shown(capsys):
    call(capsys, *options())
    code, out, err = call(capsys, "show", "scripted-perf")
    assert (code, err) == (0, "") and "complete" in out and "checkpoint" in out and "last.passed.model" in out
    code, out, _ = call(capsys, "show", run_directory().name, "--sample", "1")
    assert code == 0 and re.search(r"score\s+1\.0\n", out) and re.search(r"sample_id\s+1\n", out)
    assert "special magic number for key-1 mentioned" in out
    code, _, err = call(capsys, "show", "scripted", "--sample", "7")
    assert code == 2 and "sample '7' is not in" in err
    call(capsys, *options(seed="3"))
    assert "may be any of" in call(capsys, "show", "scripted")[2]


def test_a_prompt_that_cannot_be_made_again_says_so(capsys, monkeypatch):
    call(capsys, *options())
    monkeypatch.setattr(type(tasks.resolve("toy_find")[0]), "version", 2)
    code, out, _ = call(capsys, "show", "scripted", "--sample", "1")
    assert code == 0 and "cannot be made again" in out


def test_damaged_and_newer_runs_have_exit_code_3(capsys):
    call(capsys, *options())
    path = run_directory() / "records.jsonl"
    good = path.read_text()
    path.write_text("garbage\n" + good)
    code, _, err = call(capsys, "show", "scripted")
    assert code == 0 and "records.jsonl:1: damaged" in err and err.count("\n") == 1
    path.write_text('{"schema_version": 99}\n' + good)
    code, _, err = call(capsys, *options(samples="3"))
    assert code == 3 and "schema version 99 is newer" in err and path.read_text().endswith(good)
    (run_directory() / "run.json").write_text("{")
    code, _, err = call(capsys, "show", "scripted")
    assert code == 3 and "run.json" in err and err.count("\n") == 1
    code, out, _ = call(capsys, "list", "runs")
    assert code == 0 and re.search(r"scripted-perfect-\w{12}\s+\?\s+unreadable", out)


def test_a_killed_run_is_listed_as_killed(capsys):
    call(capsys, *options())
    path = run_directory() / "run.json"
    path.write_text(path.read_text().replace('"status": "complete"', '"status": "running"'))
    assert re.search(r"\skilled\s", call(capsys, "list", "runs")[1])


def test_hostile_output_never_reaches_the_terminal(capsys, monkeypatch):
    from evalsuite.backends import scripted

    hostile = "\x1b[2J\x1b]0;x\x07\r[/b]"
    monkeypatch.setitem(scripted.MODES, "perfect", lambda prompt: hostile)
    call(capsys, *options())
    _, out, _ = call(capsys, "show", "scripted", "--sample", "1")
    assert plain(out) == out and re.search(r"^output +\[/b\]$", out, re.MULTILINE)


def test_a_bug_of_ours_saves_its_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))

    def broken(text):
        raise KeyError("\x1b[2Jlost")

    monkeypatch.setattr(tasks, "resolve", broken)
    code, out, err = call(capsys, *options())
    assert (code, out) == (1, "") and err.count("\n") == 1 and "a bug of ours: KeyError" in err
    path = re.search(r"traceback is in (\S+)", err)[1]
    assert "def broken" not in err and 'raise KeyError("\\x1b[2Jlost")' in Path(path).read_text()


def test_a_reader_who_leaves_early_is_no_failure(root):
    command = f"{sys.executable} {root / 'cli.py'} list columns"
    script = f"set -o pipefail; {command} | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.returncode == 0 and done.stdout.count("\n") == 1


def test_a_full_disk_behind_standard_output_is_one_line(root):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(root / "cli.py"), "list", "columns"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    message = f"error: cannot write standard output: {os.strerror(errno.ENOSPC)}\n"
    assert (done.returncode, done.stderr) == (6, message)


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_plain_text_has_nothing_to_obey(text):
    shown = plain(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert plain(shown) == shown and "\n" not in one_line(text)
    if text.isascii() and text.isprintable():
        assert shown == text


@given(st.text(st.characters(exclude_categories=()), max_size=400))
def test_a_slug_is_a_safe_file_name_and_tells_names_apart(name):
    made = slug(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", made) and len(made) <= 61 and made.lower() not in ("con", "nul")
    assert made == name or slug(name + "!") != made


def test_only_echo_prints(root):
    tree = ast.parse((root / "cli.py").read_text())
    printing = {"print", "secho", "write", "writelines"}
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                    owner = getattr(getattr(node.func, "value", None), "id", "")
                    if name in printing or (name, owner) == ("echo", "typer"):
                        found.add((function.name, name))
    assert found == {("echo", "print"), ("_report", "write")}


def process(root, *arguments, **more):
    """The command in a process of its own, with the real tasks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "cli.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


RULER = ["run", "--model", "scripted:perfect", "--tasks", "ruler", "--lengths", "1k", "--samples", "3"]


def test_ruler_is_answered_perfectly_by_who_looks_and_never_by_who_says_nothing(root):
    done = process(root, *RULER)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert re.findall(r"string_match_all\s+3\s+0\s+([\d.]+)\n", out) == ["1.0000"] * 8
    records = read_records(run_directory())
    assert len(records) == 24 and all(r.decided_early and r.depth is not None and r.data for r in records)
    assert all(1024 - 8 <= r.prompt_tokens + 128 <= 1024 for r in records)
    done = process(root, *RULER, "--model", "scripted:nothing")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 0 and re.findall(r"string_match_all\s+3\s+0\s+([\d.]+)\n", out) == ["0.0000"] * 8
    assert len(list(Path("results/runs").iterdir())) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_has_its_code_and_the_same_command_goes_on(root, number, code):
    slow = process(root, *RULER, "--model", "scripted:perfect:200ms")
    end = time.monotonic() + 20
    while not [f for f in Path().glob("results/runs/*/records.jsonl") if f.stat().st_size] and time.monotonic() < end:
        time.sleep(0.01)
    slow.send_signal(number)
    asked = time.monotonic()
    out, err = slow.communicate(timeout=20)
    assert slow.returncode == code and time.monotonic() - asked < 5
    assert "to go: the same command goes on" in err and "Traceback" not in err
    kept = len(read_records(run_directory()))
    assert 0 < kept < 24
    done = process(root, *RULER)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 0 and f"{24 - kept} samples answered" in err and f"{kept} were there before" in err


@pytest.mark.parametrize(
    "content", [b"", b" \n\n", b"good text \xff\xfe", None], ids=["empty", "blank", "bytes", "none"]
)
def test_a_haystack_that_is_none_is_exit_code_3_and_nothing_is_written(root, tmp_path, content):
    (tmp_path / "hay").mkdir()
    file = tmp_path / "hay" / "hay.txt"
    if content is not None:
        file.write_bytes(content)
    done = process(root, *RULER, "--haystack", str(file), cwd=tmp_path)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 3 and out == "" and err.count("\n") == 1 and "hay.txt" in err
    assert not (tmp_path / "results").exists()


def test_two_signals_end_it_at_once(root):
    stuck = (
        "import os, signal, time\n"
        "from evalsuite.interrupt import Interrupted, Signals\n"
        "with Signals() as signals:\n"
        "    with signals.held():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('held', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(20)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", stuck], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "held\n") and time.monotonic() - start < 5


DATA = {"--task": "niah_single_2", "--length": "512", "--tokenizer": "TOKENIZER", "--out": "f.jsonl", "--samples": "2"}


def data(root, **changes):
    chosen = DATA | {"--tokenizer": str(root / "gdn2" / "zoo" / "tokenizer.json")}
    chosen |= {"--" + name: value for name, value in changes.items()}
    return ["data", "ruler", *(part for name, value in chosen.items() for part in (name, value))]


def test_samples_are_written_for_use_elsewhere(capsys, root):
    code, out, err = call(capsys, *data(root))
    assert (code, err) == (0, "") and "f.jsonl: 2 samples of niah_single_2 at 512 tokens" in out
    lines = [json.loads(line) for line in Path("f.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1] and all(line["outputs"][0] in line["input"] for line in lines)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"task": "niah"}, 2),
        ({"length": "1k,2k"}, 2),
        ({"length": "128"}, 2),
        ({"tokenizer": ""}, 2),
        ({"out": ""}, 2),
        ({"samples": "0"}, 2),
        ({"profile": "exakt"}, 2),
        ({"haystack": "nosuch"}, 3),
        ({"out": "/dev/null/x"}, 6),
    ],
    ids=str,
)
def test_bad_data_options_are_one_line(capsys, root, changes, expected):
    code, out, err = call(capsys, *data(root, **changes))
    assert (code, out) == (expected, ""), err
    assert err.count("\n") == 1 and err.startswith("error: ") and files() == []
