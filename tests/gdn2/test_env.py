"""What is taken from the environment: where things are kept, and which process this is."""

from pathlib import Path

import pytest

from gdn2 import env

NAMES = ("GDN2_CACHE", "XDG_CACHE_HOME", "GDN2_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_cache_is_our_own_then_the_desktops_then_the_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert env.cache_dir() == Path("/home/ada/.cache/gdn2-eval")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert env.cache_dir() == Path("/var/cache/gdn2-eval")
    monkeypatch.setenv("GDN2_CACHE", "here")
    assert env.cache_dir() == Path("here")
    for name in ("GDN2_CACHE", "XDG_CACHE_HOME"):  # an empty value is none
        monkeypatch.setenv(name, "")
    assert env.cache_dir() == Path("/home/ada/.cache/gdn2-eval")


def test_data_lie_in_the_cache_unless_they_are_said_to_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2_CACHE", "kept")
    assert env.data_dir() == Path("kept")
    env.use_data(Path("mine"))
    assert env.data_dir() == Path("mine") and env.get("GDN2_DATA") == "mine"
    with env.using_data("other"):
        assert env.data_dir() == Path("other")
        with env.using_data(None):
            assert env.data_dir() == Path("other")
    assert env.data_dir() == Path("mine")


def test_what_was_used_for_a_while_is_forgotten_after_an_error_too() -> None:
    with pytest.raises(KeyError), env.using_data("while"):
        raise KeyError
    assert env.get("GDN2_DATA", "unset") == "unset"
    with env.using_data(""):  # a run that names no directory took none
        assert env.get("GDN2_DATA", "unset") == "unset"


@pytest.mark.parametrize(
    ("rank", "world", "local", "want"),
    [
        (None, None, None, (0, 1, 0)), ("3", "8", "1", (3, 8, 1)), ("", "", "", (0, 1, 0)),
        ("x", "-2", "1.5", (0, 1, 0)),
        ("0", "0", "0", (0, 1, 0)), ("1", "2", None, (1, 2, 0)), ("9" * 5000, "9" * 5000, "9" * 10, (0, 1, 0)),
    ],
)  # fmt: skip
def test_torchrun_says_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None, local: str | None, want: tuple[int, int, int]
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert (*env.launched(), env.local_rank()) == want


def test_idle_threads_sleep_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    env.let_idle_threads_sleep()
    assert env.get("OMP_WAIT_POLICY") == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    env.let_idle_threads_sleep()
    assert env.get("OMP_WAIT_POLICY") == "active"
