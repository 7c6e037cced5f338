"""Punkt and the essays: fetched by command only, and only what the digests name."""

import io
import threading
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gdn2.errors import DataError, StorageError
from tasks.ruler import commands, essays, punkt
from tasks.ruler.haystack import load_haystack


class Server:
    """Serves `files` by path on this machine."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = outer.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDN2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def listed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest of two essays, which the server has."""
    texts = {"b.txt": b"Second essay.", "a.txt": b"First essay."}
    server.files = {f"/{name}": text for name, text in texts.items()}
    file = tmp_path / "list.sha256"
    file.write_text("# two\n" + "".join(f"{sha256(texts[name]).hexdigest()}  {name}\n" for name in sorted(texts)))
    read = essays.manifest
    monkeypatch.setattr(essays, "manifest", lambda path=file: read(path))
    return file


def test_the_manifest_is_the_original_repositorys_set() -> None:
    found = essays.manifest()
    assert len(found) == 49 and list(found) == sorted(found)
    assert all(name.endswith(".txt") and len(digest) == 64 for name, digest in found.items())


def test_essays_are_fetched_checked_and_found(server: Server, listed: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="gdn2-eval data essays") as caught:
        load_haystack("essays")
    assert "\n" not in str(caught.value) and server.asked == []
    assert essays.download(server.url, listed) == cache / "essays"
    assert load_haystack("essays").text() == "First essay.\nSecond essay."
    asked = len(server.asked)
    essays.download(server.url, listed)
    assert len(server.asked) == asked == 2
    (cache / "essays" / "a.txt").write_text("Changed.")
    with pytest.raises(DataError, match=r"a\.txt is missing or changed"):
        load_haystack("essays")


def test_other_essays_are_refused(server: Server, listed: Path, cache: Path) -> None:
    server.files["/b.txt"] = b"Not the essay."
    with pytest.raises(DataError, match="sha256") as caught:
        essays.download(server.url, listed)
    assert "\n" not in str(caught.value)
    assert [file.name for file in (cache / "essays").iterdir()] == ["a.txt"]
    del server.files["/b.txt"]
    with pytest.raises(DataError, match="404"):
        essays.download(server.url, listed)


def test_a_cache_that_cannot_be_written(server: Server, listed: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        essays.download(server.url, listed)


def test_a_dead_address_is_one_line(server: Server) -> None:
    with pytest.raises(DataError) as caught:
        essays.download("http://127.0.0.1:9/")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        punkt.download("http://127.0.0.1:9/punkt.zip")


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_punkt_is_fetched_checked_and_found(
    server: Server, shared: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    files = {f"punkt_tab/english/{name}": (source / name).read_bytes() for name in punkt.DIGESTS}
    server.files["/punkt_tab.zip"] = packed(files)
    monkeypatch.setattr("nltk.data.path", [])
    folder = punkt.download(server.url + "punkt_tab.zip")
    assert punkt.find() == folder and cache in folder.parents
    assert punkt.sentences()("It was 5 p.m. in Washington. Dr. Who left.") == [
        "It was 5 p.m. in Washington.",
        "Dr. Who left.",
    ]
    (folder / "abbrev_types.txt").write_text("changed")
    with pytest.raises(DataError, match="data punkt"):
        punkt.find()


def test_other_punkts_are_refused(server: Server, cache: Path) -> None:
    for body in (b"no zip", packed({"other": b""}), packed({f"punkt_tab/english/{n}": b"x" for n in punkt.DIGESTS})):
        server.files["/punkt.zip"] = body
        with pytest.raises(DataError) as caught:
            punkt.download(server.url + "punkt.zip")
        assert "\n" not in str(caught.value)
        assert not any(path.is_file() for path in cache.rglob("*"))


def test_the_commands_say_where_things_are(
    server: Server, listed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = essays.download
    monkeypatch.setattr(essays, "download", lambda: fetch(server.url, listed))
    said = commands.data_essays()
    assert said.startswith("2 essays are in") and "Paul Graham" in said
    monkeypatch.setattr(punkt, "download", lambda: cache)
    assert commands.data_punkt() == f"Punkt is in {cache}"
