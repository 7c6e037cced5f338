"""Fixtures of the harness's tests."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def sibling(name: str) -> ModuleType:
    """A file of this directory, as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """Small tasks; also a command, so that a process can be killed while it runs them."""
    return sibling("toy")


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """Made-up records and the tables that follow from them; `synthetic.HOME` holds both."""
    return sibling("synthetic")


@pytest.fixture(scope="session")
def paperlike() -> ModuleType:
    """Made-up scores of every task of the paper's tables; `paperlike.HOME` holds the tables that follow from them."""
    path = Path(__file__).with_name("paperlike.py")
    spec = importlib.util.spec_from_file_location("paperlike", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["paperlike"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """A small random model of ours, requests for it, and a device with little memory."""
    return sibling("small")


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """A real headless browser without a network; see `browser.Browser`."""
    started = sibling("browser").start()
    yield started
    started.driver.quit()


@pytest.fixture(scope="session")
def payloads() -> list[str]:
    """What a model might write to be obeyed by whoever reads a report."""
    return [
        "</script><script>window.pwned = 1</script>",
        "<img src=x onerror='window.pwned = 1'>",
        "<!-- --><!--<script>",
        "javascript:window.pwned = 1",
        "\x1b]0;pwn\x07\x1b[2J\x1b[31mred",
        "abc\u202edef\u2066ghi",
        "half \ud800 a pair",
        "[/INST] =cmd() \\input{x} `x` $x$ &lt;b&gt;",
        "\x00\x08\x7f\u2028\u2029",
        "x" * 1_000_000,
    ]
