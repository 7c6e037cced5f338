"""Every command with every kind of wrong text: one line, its exit code, and nothing written."""

from pathlib import Path

import pytest

import cli
from evalsuite.names import plain

MANY = "9" * 5000  # Python refuses to make a number of more than 4300 digits
TEXTS = [MANY, f"{MANY}x1", "nan", "-1", "1e309", "²", "../..", "a\nb", "[/b]", "\x1b[2J", "é" * 300, ","]
PLACES = {
    "bench-shapes": (["bench", "training", "--device", "cpu", "--models", "gdn2-tiny", "--shapes"], TEXTS),
    "bench-models": (["bench", "training", "--device", "cpu", "--models"], TEXTS[:-1]),
    "bench-lengths": (["bench", "engine", "--device", "cpu", "--model", "gdn2-tiny", "--lengths"], TEXTS),
    "bench-batches": (["bench", "engine", "--device", "cpu", "--model", "gdn2-tiny", "--batches"], TEXTS[:-1]),
    "bench-ops": (["bench", "kernels", "--device", "cpu", "--ops"], TEXTS[:-1]),
    "lengths": (["run", "--model", "scripted:last", "--tasks", "vt", "--lengths"], TEXTS),
    "profile": (["run", "--model", "scripted:last", "--tasks", "vt", "--profile"], TEXTS),
    "tasks": (["run", "--model", "scripted:last", "--tasks"], TEXTS),
    "pairs": (["run", "--model", "scripted:last", "--tasks"], [f"mqar@lines:pairs={text}" for text in TEXTS]),
    "delay": (["run", "--tasks", "vt", "--model"], [f"scripted:last:{text}ms" for text in TEXTS]),
    "set": (["show", "checkpoint", "gdn2-tiny", "--set"], TEXTS[:-1]),
    "plan": (["plan", "--detect"], [MANY, "nan", "-1", "0", "1e309", "²", "100", "1e-300"]),
    "samples": (["plan", "--samples"], [MANY, "nan", "-1", "0", "1.5", "1e3"]),
    "every": (["watch", "run", "--every"], [MANY, "nan", "-1", "inf", "3601"]),
    "where": (["tables", "--where"], [f"length={text}" for text in TEXTS] + TEXTS),
    "rows": (["tables", "--rows"], TEXTS[:-1]),
    "format": (["tables", "--format"], TEXTS),
    "plots": (["plot", "--format"], TEXTS),
    "probe": (["probe", "--model", "gdn2-tiny", "--task", "vt", "--length"], TEXTS),
    "import": (["data", "import", "piqa"], TEXTS),
    "fetch": (["data", "fetch"], TEXTS),
    "preset": (["train", "none.toml", "--out", "x", "--preset"], TEXTS),
    "doctor": (["doctor", "--compile", "--only"], TEXTS[:-1]),
}


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, also for tracebacks of bugs."""
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GDN2_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_text_anywhere_is_one_line(place: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, texts = PLACES[place]
    for text in texts:
        code = cli.main([*begin, text])
        out, err = capsys.readouterr()
        said = err or out.splitlines()[-1] + "\n"  # `show checkpoint` tells of a refusal among what it shows
        assert code in (2, 3, 4), (begin, text[:40], code, said[:300])
        assert err.count("\n") == (err != "") and "bug of ours" not in said and plain(said) == said, (text[:40], said)
        assert not list(empty.iterdir()), (begin, text[:40])


def test_a_long_text_is_cut_in_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("lengths", "tasks", "profile", "bench-shapes", "bench-models", "plots", "rows", "preset"):
        begin, _ = PLACES[place]
        cli.main([*begin, "x" * 9000])
        assert len(capsys.readouterr().err) < 1200, place
