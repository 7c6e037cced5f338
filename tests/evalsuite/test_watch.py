"""Watching a run: what it says is what the files hold, while they grow and after."""

import dataclasses
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from evalsuite import runfile, show, stats
from evalsuite.schema import to_line
from evalsuite.store import read_records
from evalsuite.watch import RECENT_S, Watch, follow
from gdn2.errors import DataError


@pytest.fixture
def run(synthetic, tmp_path):
    """A run directory with its run.json and no records yet; and its records."""
    directory = tmp_path / "runs" / "synthetic-kda"
    directory.mkdir(parents=True)
    content = json.loads((synthetic.HOME / "runs" / "synthetic-kda" / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps(content))
    (directory / "records.jsonl").touch()
    return directory, list(synthetic.records(synthetic.MODELS[1]))


def append(directory, records, name="records.jsonl"):
    with open(directory / name, "a", encoding="ascii") as file:
        file.writelines(map(to_line, records))


def rows(watch):
    lines = watch.lines()
    return {tuple(line.split()[:3]): line.split() for line in lines if line.startswith("niah")}


def test_a_finished_run_shows_what_show_shows(synthetic):
    directory = synthetic.HOME / "runs" / "synthetic-gdn2"
    watch = Watch(directory)
    assert not watch.look()
    shown = rows(watch)
    scores = show.cells(read_records(directory))
    assert len(shown) == len(scores) == 13
    for cell in scores:
        words = shown[cell.task, cell.protocol, str(cell.length)]
        assert words[4:8] == ["16/16", "##########", "0", f"{cell.mean:.4f}"]
        if cell.task != "niah_multivalue":
            low, high = stats.wilson(round(cell.mean * cell.n), cell.n)
            assert words[8:] == [f"{low:.4f}", "to", f"{high:.4f}"]
    assert "208/208 samples" in watch.lines()[0]
    assert "left" not in watch.lines()[0]


def test_records_are_counted_as_they_come(run):
    directory, records = run
    watch = Watch(directory)
    watch.look()
    assert rows(watch)["niah_single_2", "exact", "1024"][3:] == ["-", "0/16", "..........", "0", "-", "-"]
    append(directory, records[:8])
    whole = to_line(records[8])
    with open(directory / "records.jsonl", "a") as file:
        file.write(whole[:100])
    watch.look()
    assert rows(watch)["niah_single_2", "exact", "1024"][4:6] == ["8/16", "#####....."]
    with open(directory / "records.jsonl", "a") as file:
        file.write(whole[100:])
    append(directory, records[9:20], "records.1.jsonl")
    watch.look()
    assert rows(watch)["niah_single_2", "exact", "1024"][4] == "16/16"
    assert rows(watch)["niah_single_2", "exact", "2048"][4] == "4/16"
    append(directory, records)
    watch.look()
    assert [words[4] for words in rows(watch).values()] == ["16/16", "16/16", "16/16", "15/16"]


def test_failures_count_until_they_are_answered(run):
    directory, records = run
    watch = Watch(directory)
    failed = [dataclasses.replace(r, score=None, error="x") for r in records[:3]]
    append(directory, failed)
    watch.look()
    assert rows(watch)["niah_single_2", "exact", "1024"][4:7] == ["0/16", "..........", "3"]
    append(directory, records[:2])
    watch.look()
    assert rows(watch)["niah_single_2", "exact", "1024"][4:7] == ["2/16", "#.........", "1"]


def test_rate_and_time_left_are_those_of_the_last_answers(run):
    directory, records = run
    old = [dataclasses.replace(r, created_at="2026-01-01T00:00:00+00:00") for r in records[:10]]
    new = [
        dataclasses.replace(r, created_at=f"2026-01-02T00:00:{10 * i:02d}+00:00", prompt_tokens=500)
        for i, r in enumerate(records[10:16])
    ]
    append(directory, old + new)
    watch = Watch(directory)
    watch.look()
    assert RECENT_S > 50
    assert watch.rate() == pytest.approx(6 * 500 / 50)
    samples, tokens = watch.left()
    assert samples == 48
    # What was not asked yet counts by its length.
    assert tokens == 16 * (2048 + 4096 + 8192)
    assert "16/64 samples  60 tokens/s  about 1 h 03 min left" in watch.lines()[0]


@pytest.mark.parametrize(
    "odd", ["", "yesterday", "0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00", "2026-13-01", "12:30"]
)
def test_a_time_that_is_none_costs_the_rate_and_nothing_else(run, odd):
    directory, records = run
    append(directory, [dataclasses.replace(r, created_at=odd) for r in records[:3]])
    watch = Watch(directory)
    watch.look()
    assert "3/64 samples" in watch.lines()[0] and watch.rate() is None
    good = [
        dataclasses.replace(r, created_at=f"2026-01-02T00:00:{i:02d}+00:00", prompt_tokens=700)
        for i, r in enumerate(records[3:6])
    ]
    append(directory, good)
    watch.look()
    assert watch.rate() == 3 * 700 / 2 and "6/64 samples" in watch.lines()[0]


def test_a_zone_is_taken_off_the_time(run):
    directory, records = run
    times = ["2026-01-02T05:30:00+05:30", "2026-01-02T00:00:10+00:00", "2026-01-01T19:00:20-05:00"]
    append(
        directory,
        [dataclasses.replace(r, created_at=at, prompt_tokens=100) for at, r in zip(times, records[:3], strict=True)],
    )
    watch = Watch(directory)
    watch.look()
    assert watch.rate() == pytest.approx(3 * 100 / 20)


def test_no_time_between_answers_is_no_rate(run):
    directory, records = run
    append(directory, [dataclasses.replace(r, created_at="2026-01-02T00:00:00+00:00") for r in records[:5]])
    watch = Watch(directory)
    watch.look()
    assert watch.rate() is None and "tokens/s" not in watch.lines()[0] and "left" not in watch.lines()[0]


def test_metrics_of_a_sample_count_once_in_the_rate(run):
    directory, records = run
    for r in records[:4]:
        append(directory, [dataclasses.replace(r, metric=m, metric_count=2) for m in ("acc", "acc_norm")])
    watch = Watch(directory)
    watch.look()
    assert len(watch._recent) == 2  # a minute apart, of the last two minutes
    assert "4/64 samples" in watch.lines()[0]
    assert sum(line.startswith("niah_single_2  exact      1024") for line in watch.lines()) == 2


def test_perplexities_are_shown_as_such(run):
    directory, records = run
    append(directory, [dataclasses.replace(r, metric="word_perplexity", score=2.0) for r in records[:3]])
    watch = Watch(directory)
    watch.look()
    assert rows(watch)["niah_single_2", "exact", "1024"][7] == "7.3891"


def test_finished_cells_leave_first_where_lines_are_few(run):
    directory, records = run
    append(directory, records[:40])
    watch = Watch(directory)
    watch.look()
    lines = watch.lines(6)
    assert len(lines) <= 6
    assert [line.split()[2] for line in lines if line.startswith("niah")] == ["4096", "8192"]
    assert lines[-1] == "2 more lines do not fit"


def test_damage_is_counted_and_hostile_names_are_inert(run):
    directory, records = run
    append(directory, [dataclasses.replace(r, task="\x1b[2J[red]x[/red]\u202e", metric="a\nb") for r in records[:2]])
    with open(directory / "records.jsonl", "a") as file:
        file.write("{}\nrubbish\n")
    watch = Watch(directory)
    watch.look()
    text = "\n".join(watch.lines())
    assert "2 damaged records" in text
    assert "[red]x[/red]   exact" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_a_run_without_its_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*run\.json"):
        follow(tmp_path, lambda _: None, 0.1, live=False)


@pytest.fixture
def going(run):
    """The same run, held by this process as a runner holds it."""
    directory, records = run
    content = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps(content | {"status": "running"}))
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory, records


def watching(root, directory):
    main, other = pty.openpty()
    command = [sys.executable, str(root / "cli.py"), "watch", str(directory), "--every", "0.1"]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    return process, main


def read_until(main, wanted, seconds=60):
    seen, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            seen += os.read(main, 65536).decode(errors="replace")
        except OSError:
            break
        if wanted in seen:
            return seen
    raise AssertionError(f"{wanted!r} is not in {seen[-2000:]!r}")


def read_out(main, seconds=60):
    """What is still said until the other end is closed."""
    seen, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            seen += os.read(main, 65536).decode(errors="replace")
        except OSError:
            return seen
    raise AssertionError(f"no end after {seen[-2000:]!r}")


def test_a_live_run_is_followed_on_a_terminal_and_ctrl_c_leaves_it_clean(root, going):
    directory, records = going
    process, main = watching(root, directory)
    try:
        read_until(main, "0/16")
        append(directory, records[:8])
        read_until(main, "8/16")
        process.send_signal(signal.SIGINT)
        rest = read_out(main)
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(main)
    # The terminal's own screen comes back, then the last look is printed on it.
    before, _, after = rest.rpartition("\x1b[?1049l")
    assert "8/16" in after or "8/64" in after
    assert "\x1b[?25h" in before + after
    assert "Traceback" not in rest


def test_the_end_of_the_run_ends_the_watching(root, going):
    directory, records = going
    process, main = watching(root, directory)
    try:
        read_until(main, "0/16")
        append(directory, records)
        content = json.loads((directory / "run.json").read_text())
        (directory / "run.json.new").write_text(json.dumps(content | {"status": "complete"}))
        os.replace(directory / "run.json.new", directory / "run.json")
        read_until(main, "complete")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(main)
    assert runfile.read(directory)["status"] == "complete"
