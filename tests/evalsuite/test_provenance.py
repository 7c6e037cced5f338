"""Provenance: the code's state is told, secrets are not."""

import json
import subprocess

import pytest

from evalsuite.provenance import VARIABLES, code, collect, redacted


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def test_commit_dirty_flag_and_remote(tmp_path):
    assert code(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert code(tmp_path) == {}
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "x")
    git(tmp_path, "remote", "add", "origin", "https://me:secret@example.com/x.git?token=secret")
    clean = code(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and clean["remote"] == "https://example.com/x.git"
    (tmp_path / "a").write_text("2")
    assert code(tmp_path)["dirty"] is True


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://a:b@h/x", "https://h/x"),
        ("https://a:p@ss@h/x", "https://h/x"),
        ("https://token@h/x#f", "https://h/x"),
        ("ssh://git@h:22/x", "ssh://h:22/x"),
        ("git@h:x.git", "git@h:x.git"),
        ("/a/b", "/a/b"),
    ],
)
def test_credentials_are_cut_out_of_urls(url, shown):
    assert redacted(url) == shown


def test_only_listed_variables_are_kept(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = json.dumps(found := collect())
    assert "secret-token" not in text and found["environment"]["OMP_NUM_THREADS"] == "1"
    assert not [name for name in VARIABLES if "TOKEN" in name and name != "TOKENIZERS_PARALLELISM"]
    assert found["packages"]["numpy"] and found["python"].startswith("3.")
