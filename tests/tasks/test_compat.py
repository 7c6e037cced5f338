"""The compatible profiles against the files that the reference generators wrote."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import nltk.data
import pytest

import tasks
from evalsuite.types import Setting
from gdn2.errors import DataError, UserError
from tasks.ruler import compat, punkt
from tasks.ruler.niah import NiahTask

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "ruler"
GOLDEN = sorted(path.relative_to(SHARED).as_posix() for path in SHARED.glob("*/niah_*.jsonl"))


def cell(name: str) -> tuple[NiahTask, str, int]:
    profile, _, file = name.partition("/")
    task, _, length = file.removesuffix(".jsonl").partition("@")
    found = tasks.get(task)
    assert isinstance(found, NiahTask)
    return found, profile, int(length)


@pytest.mark.parametrize("name", GOLDEN)
def test_equal_to_the_reference_byte_for_byte(
    public: Callable, punkt_home: Path, emerson: str, shared: Path, name: str
) -> None:
    task, profile, length = cell(name)
    setting = Setting(profile, length, options={"haystack": emerson})
    golden = (shared / "golden" / "ruler" / name).read_text(encoding="ascii")
    made = islice(task.compatible(setting, public("gpt-neox")), golden.count("\n"))
    assert "".join(json.dumps(one.record) + "\n" for one in made) == golden


def test_the_golden_files_are_there(shared: Path) -> None:
    assert len(GOLDEN) == 29


def test_samples_carry_the_prompt_of_the_profile(public: Callable, punkt_home: Path, emerson: str) -> None:
    tokenizer = public("gpt-neox")
    options = {"haystack": emerson}
    task = tasks.get("niah_multikey_1")
    prompts = {}
    for profile in compat.PROFILES:
        samples = task.samples(Setting(profile, 2048, 3, options=options), tokenizer)
        assert len(samples) == 3
        sample = samples[2]
        prompt = sample.requests[0].prompt
        assert prompt.ids.tolist() == tokenizer.encode(prompt.text)
        assert tokenizer.decode(prompt.ids[sample.facts["needle_token"] :][:5].tolist()).strip().startswith("One of")
        assert len(sample.facts["needles"]) == 4 and 0 <= sample.depth <= 1
        assert sample.target[0] in dict(sample.facts["needles"])[sample.facts["key"]]
        prompts[profile] = prompt.text
    assert prompts["nvidia-main"].startswith(prompts["nvidia-main-noprefix"])
    assert prompts["nvidia-main-noprefix"].endswith("provided text?")
    assert all(text.endswith("provided text is") for name, text in prompts.items() if not name.endswith("prefix"))


def test_bos_is_put_and_counted_as_each_original_does(public: Callable, punkt_home: Path, emerson: str) -> None:
    tokenizer = public("llama2")
    for profile in compat.PROFILES:
        sample = tasks.get("niah_single_3").samples(
            Setting(profile, 1024, 2, options={"haystack": emerson}), tokenizer
        )[1]
        ids = sample.requests[0].prompt.ids
        assert ids[0] == tokenizer.bos_id and ids[1:].tolist() == tokenizer.encode(sample.requests[0].prompt.text)
        assert len(ids) + 128 <= 1024 + 16


@pytest.mark.parametrize("name", tasks.suites()["ruler"])
@pytest.mark.parametrize("profile", compat.PROFILES)
def test_lengths_that_never_fit_are_refused_at_once(
    public: Callable, punkt_home: Path, emerson: str, profile: str, name: str
) -> None:
    """Upstream draws for ever."""
    for length in (1, 128, 150):
        with pytest.raises(UserError, match="too short") as caught:
            tasks.get(name).samples(Setting(profile, length, 5, options={"haystack": emerson}), public("gpt-neox"))
        need = int(str(caught.value).split("use at least ")[1])
        assert length < need < 1400


def test_a_short_text_repeats_in_nvidia_main_only(public: Callable, punkt_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("A short text ends here. " * 100, encoding="utf-8")
    sizes = {
        profile: len(
            tasks.get("niah_single_2")
            .samples(Setting(profile, 4096, 1, options={"haystack": str(file)}), public("gpt-neox"))[0]
            .requests[0]
            .prompt.ids
        )
        for profile in compat.PROFILES
    }
    assert sizes["nvidia-main"] > 3000
    assert sizes["nvidia-2024"] < 900 and sizes["lm-eval"] < 900


def test_no_global_random_state_is_touched(public: Callable) -> None:
    import random

    random.seed(7)
    want = random.random()
    random.seed(7)
    for profile in tasks.get("niah_single_1").protocols:
        tasks.get("niah_single_1").samples(Setting(profile, 1024, 2), public("gpt-neox"))[1]
    assert random.random() == want


def test_without_punkt_one_line_names_the_command(
    public: Callable, emerson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDN2_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    setting = Setting("nvidia-main", 1024, 1, options={"haystack": emerson})
    with pytest.raises(DataError, match="gdn2-eval data punkt") as caught:
        tasks.get("niah_single_2").samples(setting, public("gpt-neox"))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    tasks.get("niah_single_1").samples(setting, public("gpt-neox"))


def test_punkt_is_found_on_nltks_own_path(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [str(data / "nltk_data")])
    assert punkt.find() == data / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    assert punkt.sentences()("Mr. Smith came. He left.") == ["Mr. Smith came.", "He left."]


def test_the_digests_are_those_the_golden_files_were_made_with(shared: Path) -> None:
    readme = (shared / "golden" / "ruler" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}` {digest}" in readme for name, digest in punkt.DIGESTS.items())
