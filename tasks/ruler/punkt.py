"""NLTK's Punkt model of English sentences: where the byte-compatible profiles cut their essays.

It comes from NLTK's own search path, from our cache, or from `gdn2-eval data punkt`; never by itself.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from gdn2 import env
from gdn2.errors import DataError
from tasks.data import fetch

URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/tokenizers/punkt_tab.zip"
DIGESTS = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}
_PLACE = Path("tokenizers", "punkt_tab", "english")


def _home() -> Path:
    return env.data_dir() / "nltk_data" / _PLACE


def _intact(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in DIGESTS.items()
    )


def find() -> Path:
    """Folder of the English model the profiles were made with. Raises DataError where there is none."""
    import nltk.data

    roots = [*(Path(root) / _PLACE for root in nltk.data.path), _home()]
    found = next((root for root in roots if _intact(root)), None)
    if found is None:
        raise DataError("this profile needs NLTK's Punkt model of English: run `gdn2-eval data punkt` once")
    return found


def sentences() -> Callable[[str], list[str]]:
    """The function that splits an English text into sentences. Raises DataError without the model."""
    return _splitter(find())


@lru_cache(maxsize=2)
def _splitter(folder: Path) -> Callable[[str], list[str]]:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    # Read here, not by NLTK: its loader refuses folders outside its own search path.
    params = PunktParameters()
    lines = {name: (folder / name).read_text(encoding="utf-8").rstrip("\n").split("\n") for name in DIGESTS}
    params.abbrev_types = set(lines["abbrev_types.txt"])
    params.sent_starters = set(lines["sent_starters.txt"])
    params.collocations = {tuple(line.split("\t")) for line in lines["collocations.tab"]}
    for line in lines["ortho_context.tab"]:
        word, bits = line.split("\t")
        params.ortho_context[word] = int(bits)
    tokenizer = PunktSentenceTokenizer(params)

    def split(text: str) -> list[str]:
        return list(tokenizer.tokenize(text))

    return split


def download(url: str = URL) -> Path:
    """Fetch the English model into our cache and return its folder. Raises DataError for any other content."""
    data = fetch.get(url)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {name: archive.read(f"punkt_tab/english/{name}") for name in DIGESTS}
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{url}: not NLTK's punkt_tab.zip ({error})") from error
    for name, content in files.items():
        if sha256(content).hexdigest() != DIGESTS[name]:
            raise DataError(f"{url}: {name} is not the file the profiles were made with")
    for name, content in files.items():
        fetch.keep(_home() / name, content)
    return _home()
