"""Suites in TOML: what they ask, and the line that is named where something is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.plan import Ask, check_profile, parse_lengths
from evalsuite.plan import settings as planned
from evalsuite.types import Chosen
from gdn2.errors import DataError, UserError
from tasks import suitefile

GOOD = """# mine
samples = 7
lengths = ["1k", 4096]

[[tasks]]
task = "niah_single_2"
lengths = ["2k"]
samples = 3
profile = "nvidia-2024"

[[tasks]]
task = "niah-paper"

[[tasks]]
task = "vt"
lengths = [8192, "8k", "1M"]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Callable[[str], str]:
    """Text -> path of a suite file."""

    def write(text: str) -> str:
        (tmp_path / "my-suite.toml").write_text(text, encoding="utf-8")
        return str(tmp_path / "my-suite.toml")

    return write


def cells(found: list, ask: Ask) -> list[tuple]:
    return [(task.name, one.protocol, one.length, one.samples) for task, one in planned(found, ask)]


def test_a_file_says_tasks_lengths_samples_and_profile(suite: Callable) -> None:
    found = tasks.resolve(suite(GOOD))
    assert all(isinstance(one, Chosen) for one in found)
    assert [one.name for one in found] == ["niah_single_2", *tasks.suites()["niah-paper"], "vt"]
    got = cells(found, Ask((256,)))
    assert got[0] == ("niah_single_2", "nvidia-2024", 2048, 3)
    assert got[1:3] == [("niah_single_1", "exact", 1024, 7), ("niah_single_1", "exact", 4096, 7)]
    assert got[-2:] == [("vt", "exact", 8192, 7), ("vt", "exact", 1 << 20, 7)]
    # The command's samples go before the file's, its lengths and profile fill what the file leaves open.
    assert {row[3] for row in cells(found, Ask((256,), samples=2))} == {2}
    bare = tasks.resolve(suite('[[tasks]]\ntask = "vt"\n'))
    assert cells(bare, Ask((512,), 9, "lm-eval")) == [("vt", "lm-eval", 512, 9)]


def test_files_and_names_go_together_and_nothing_is_asked_twice(suite: Callable) -> None:
    path = suite('[[tasks]]\ntask = "vt"\nsamples = 5\n\n[[tasks]]\ntask = "vt"\nsamples = 50\n')
    found = tasks.resolve(f"niah_single_1, {path} ,vt,cwe@nvidia-main")
    assert cells(found, Ask((1024,))) == [
        ("niah_single_1", "exact", 1024, None),
        ("vt", "exact", 1024, None),
        ("cwe", "nvidia-main", 1024, None),
    ]
    assert cells(tasks.resolve(path), Ask((1024,))) == [("vt", "exact", 1024, 50)] or len(tasks.resolve(path)) == 1


def test_one_task_under_one_profile() -> None:
    (found,) = tasks.resolve("niah_single_1@lm-eval")
    assert cells([found], Ask((1024,), profile="exact")) == [("niah_single_1", "lm-eval", 1024, None)]
    for text in ("niah_single_1@none", "vt@exact:x=1"):
        with pytest.raises(UserError, match="has no profile"):
            check_profile(tasks.resolve(text), None)
    with pytest.raises(UserError, match="no task or suite 'nothing'"):
        tasks.resolve("nothing@exact")


WRONG = [
    ('samples = 0\n[[tasks]]\ntask = "vt"\n', 1, "samples is 0, not a whole number of at least 1"),
    ('\nlengths = "1k"\n[[tasks]]\ntask = "vt"\n', 2, "lengths is '1k', not a list"),
    ('\n\nlenghts = ["1k"]\n[[tasks]]\ntask = "vt"\n', 3, "unknown key 'lenghts'; did you mean lengths?"),
    ("samples = 3\n", 1, "a suite lists its tasks"),
    ("tasks = 3\n", 1, "a suite lists its tasks"),
    ("tasks = []\n", 1, "a suite lists its tasks"),
    ('[[tasks]]\ntask = "vt"\n\n[[tasks]]\n# no name\nsamples = 3\n', 4, "task is None, not the name"),
    ('[[tasks]]\ntask = "vt"\n\n[[tasks]]\ntask = "niah_singel_2"\n', 5, "did you mean niah_single_2"),
    ('[[tasks]]\ntask = 7\n', 2, "task is 7, not the name"),
    ('[[tasks]]\ntask = "vt"\nlengths = ["1k", "64"]\n', 3, "length '64' is not 128 to 16777216 tokens"),
    ('[[tasks]]\ntask = "vt"\nlengths = [true]\n', 3, "length True is not"),
    ('[[tasks]]\ntask = "vt"\nlengths = [1e3]\n', 3, "length 1000.0 is not"),
    ('[[tasks]]\ntask = "vt"\nsamples = 1.5\n', 3, "samples is 1.5"),
    ('[[tasks]]\ntask = "vt"\nsamples = true\n', 3, "samples is True"),
    ('[[tasks]]\ntask = "vt"\nprofile = "exactly"\n', 3, "has no profile 'exactly'; it has exact,"),
    ('[[tasks]]\ntask = "vt"\nprofile = ["exact"]\n', 3, "profile is ['exact'], not a name such as exact"),
    ('[[tasks]]\ntask = "vt"\n\n"fields" = 3\n', 4, "fields is 3, not a table"),
    ('[[tasks]]\ntask = "vt"\nfields = { x = 1 }\n', 3, "has no profile 'exact:x=1'"),
    ('[[tasks]]\ntask = "vt"\n[tasks.fields]\nx = [1, 2]\n', 3, "has no profile 'exact:x=1/2'"),
    ('[[tasks]]\ntask = "vt"\nfields = 0\n', 3, "fields is 0, not a table"),
    ('[[tasks]]\ntask = "vt"\nfields = ""\n', 3, "fields is '', not a table"),
    ('[[tasks]]\ntask = "vt"\nfields = []\n', 3, "fields is [], not a table"),
    ('[[tasks]]\ntask = "vt"\nfields = false\n', 3, "fields is False, not a table"),
    ('[[tasks]]\ntask = "vt"\nfields = { x = 1.5 }\n', 3, "fields is {'x': 1.5}, not a table"),
    ('[[tasks]]\ntask = "vt"\nprofile = ""\n', 3, "has no profile ''; it has exact,"),
    ('[[tasks]]\ntask = "niah_single_1"\nfields = { forced = [] }\n', 3, "forced '' of niah_single_1 is not yes or no"),
    ('[[tasks]]\ntask = "niah_single_1"\nfields = { forced = true }\n', 3, "forced 'True' of niah_single_1 is not"),
    ('[[tasks]]\ntask = "vt"\nlengths = []\n', 3, 'lengths is [], not a list such as ["1k", 4096]'),
    ('[[tasks]]\ntask = "vt"\nlengths = [127]\n', 3, "length 127 is not 128 to 16777216 tokens, as 4096 or 4k"),
    ('[[tasks]]\ntask = "vt"\nlengths = ["17m"]\n', 3, "length '17m' is not 128 to 16777216"),
    ('[[tasks]]\ntask = "vt"\nlengths = ["1.5k"]\n', 3, "length '1.5k' is not"),
    ('[[tasks]]\ntask = "vt"\nsamples = 10000001\n', 3, "not a whole number of at least 1 and at most 10000000"),
    ('[[tasks]]\ntask = "vt"\nsamples = -1\n', 3, "samples is -1"),
    ('[[tasks]]\ntask = "vt"\nseed = 1\n', 3, "unknown key 'seed'; there are task, lengths"),
    ('tasks = [{ task = "vt", samples = 0 }]\n', 1, "samples is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "message"), WRONG)
def test_what_is_wrong_names_its_line(suite: Callable, text: str, line: int, message: str) -> None:
    path = suite(text)
    with pytest.raises(UserError) as caught:
        tasks.resolve(path)
    said = str(caught.value)
    assert said.startswith(f"{path}, line {line}: ") and message in said
    assert "\n" not in said and caught.value.exit_code == 2


def test_files_that_cannot_be_read(suite: Callable, tmp_path: Path) -> None:
    path = suite('samples = 3\n[[tasks]\ntask = "vt"\n')
    with pytest.raises(DataError, match=r"is not TOML: .*line 2"):
        tasks.resolve(path)
    Path(path).write_bytes(b"samples = 3 # \xff")
    with pytest.raises(DataError, match="not UTF-8: byte 14"):
        tasks.resolve(path)
    with pytest.raises(DataError, match="cannot read suite .*No such file"):
        tasks.resolve(str(tmp_path / "absent.toml"))
    with pytest.raises(DataError, match="cannot read suite"):
        (tmp_path / "dir.toml").mkdir()
        tasks.resolve(str(tmp_path / "dir.toml"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="[]=#\"\n.,{}task5k \\'", max_size=60))
def test_any_text_is_a_suite_or_refused_in_one_line(suite: Callable, text: str) -> None:
    path = suite(text)
    try:
        assert tasks.resolve(path)
    except UserError as problem:
        assert "\n" not in str(problem).replace("\\n", "")


ENTRIES = st.fixed_dictionaries(
    {"task": st.sampled_from(["niah_single_1", "vt", "cwe", "mqar"])},
    optional={
        "samples": st.integers(1, 10**7),
        "lengths": st.lists(st.sampled_from([128, 1000, "1k", "4K", " 2k ", "16m", "131072"]), min_size=1, max_size=4),
        "profile": st.just("exact"),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ENTRIES, min_size=1, max_size=4), st.none() | st.integers(1, 99))
def test_what_a_suite_says_is_what_is_asked(suite: Callable, entries: list[dict], samples: int | None) -> None:
    """Written as TOML and read back: each task in its order, with its own numbers before the suite's."""
    entries = [{k: v for k, v in one.items() if k != "profile" or one["task"] != "mqar"} for one in entries]
    tables = ["[[tasks]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in one.items()) for one in entries]
    text = "\n".join([f"samples = {samples}" * (samples is not None), *tables])
    found = suitefile.load(Path(suite(text)), tasks._named)
    assert [one.name for one in found] == [one["task"] for one in entries]
    for one, entry in zip(found, entries, strict=True):
        assert isinstance(one, Chosen) and one.samples == entry.get("samples", samples)
        assert one.protocol == entry.get("profile")
        said = [parse_lengths(str(n).strip())[0] for n in entry.get("lengths", [])]
        assert one.lengths == (tuple(dict.fromkeys(said)) or None)


def test_suites_that_ship_are_good() -> None:
    for name in suitefile.packaged():
        found = tasks.resolve(name)
        check_profile(found, None)
        assert {one.name for one in found} == set(tasks.suites()[name])


def test_a_run_of_a_suite_file(
    suite: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = suite(
        '[[tasks]]\ntask = "niah_single_1"\nlengths = ["1k", "2k"]\nsamples = 2\n\n'
        '[[tasks]]\ntask = "niah_multikey_2"\n'
    )
    command = ["run", "--model", "scripted:perfect", "--tasks", path, "--lengths", "1k"]
    assert cli.main([*command, "--samples", "1"]) == 0
    rows = re.findall(r"^(niah\w+)\s+exact\s+(\d+)\s+string_match_all\s+(\d)\s", capsys.readouterr().out, re.MULTILINE)
    assert rows == [("niah_multikey_2", "1024", "1"), ("niah_single_1", "1024", "1"), ("niah_single_1", "2048", "1")]
    suite(Path(path).read_text().replace("samples", "smaples"))
    assert cli.main(command) == 2
    assert capsys.readouterr().err == f"error: {path}, line 4: unknown key 'smaples'; did you mean samples?\n"
