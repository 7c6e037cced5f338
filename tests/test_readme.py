"""The README: its tree is the repository's, its options exist, and its quick commands do what it shows."""

import re
import shlex
import shutil
import subprocess

import pytest
import typer

import cli


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text("utf-8")


def blocks(text):
    """Each command of the README and the output shown below it, empty where there is none."""
    found = re.findall(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    return [(line.split("#")[0].strip(), shown) for lines, shown in found for line in lines.strip().splitlines()]


def commands(text):
    return {line: shown for line, shown in blocks(text) if line.startswith("gdn2-eval ")}


def parsed(line):
    """The command a line names and its context, without running it."""
    command, words = typer.main.get_command(cli.app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context("x", words)


def tree(text):
    """Paths of the annotated tree: two levels, directories with a slash."""
    lines = re.search(r"## What is where\n\n```text\n(.*?)```", text, re.DOTALL)[1].splitlines()
    paths, above = [], ""
    for line in lines:
        name = line.split()[0]
        paths.append(above + name if line.startswith("  ") else name)
        above = above if line.startswith("  ") else name
    return paths


def test_the_tree_is_the_repository(root, readme):
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a clone")
    done = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    expected = set()
    for path in done.stdout.splitlines():
        parts = path.split("/")
        expected.add(parts[0] + "/" * (len(parts) > 1))
        if len(parts) > 2 and parts[0] != "tests":
            expected.add(f"{parts[0]}/{parts[1]}/")
    found = tree(readme)
    assert set(found) == expected and len(found) == len(set(found))


def test_every_command_is_one_and_every_option_exists(readme):
    lines = commands(readme)
    assert len(lines) >= 5
    for line in lines:
        assert parsed(line).params


def test_every_command_of_the_program_is_named(readme):
    def names(command, before=""):
        inner = getattr(command, "commands", {})
        return [n for k, c in inner.items() for n in names(c, f"{before} {k}")] if inner else [before]

    missing = [name for name in names(typer.main.get_command(cli.app)) if f"gdn2-eval{name}" not in readme]
    assert not missing


def test_every_make_target_exists(root, readme):
    targets = re.search(r"\.PHONY: (.*)", (root / "Makefile").read_text())[1].split()
    named = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert named == ["demo", "test"] and set(named) <= set(targets)


def test_every_link_leads_somewhere(root, readme):
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links and [link for link in links if not (root / link).exists()] == []


def test_quick_commands_say_what_the_readme_says(root, readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = [(line, shown) for line, shown in commands(readme).items() if "--dry-run" in line or "error:" in shown]
    assert len(quick) == 2
    for line, shown in quick:
        code = cli.main(shlex.split(line)[1:])
        out, err = capsys.readouterr()
        # The id of a run hashes the checkpoint and the device it would run on.
        said, expected = (re.sub(r"gdn2-tiny-[0-9a-f]{12}", "gdn2-tiny-ID", text) for text in (out + err, shown))
        assert said == expected and code == (2 if "error:" in shown else 0)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_written_as_the_readme_says(root, readme, tmp_path, monkeypatch, capsys):
    (line,) = [line for line in commands(readme) if "data ruler" in line]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gdn2").symlink_to(root / "gdn2")
    assert cli.main(shlex.split(line)[1:]) == 0
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 2
    assert "2 samples of niah_single_2 at 1024 tokens" in capsys.readouterr().out


def test_the_exit_codes_are_those_of_the_errors(readme):
    from gdn2 import errors

    shown = {int(code) for code in re.findall(r"^\| (\d+)(?=,? )", readme, re.MULTILINE)}
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and hasattr(e, "exit_code")}
    assert raised | {0, 1, 5, 130} == shown
