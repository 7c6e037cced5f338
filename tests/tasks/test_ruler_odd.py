"""RULER's five other tasks at the edges: odd documents, every length, budgets, seeds, files of samples, whole runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import tasks
from evalsuite.scorers import string_match_all, string_match_part
from evalsuite.types import Response, Sample, Setting, Tokenizer
from gdn2.errors import UserError
from tasks.ruler import commands, cwe, fwe, more, qa, vt
from tasks.ruler.documents import Library, Shelf
from tasks.ruler.export import records
from tests.tasks.test_splice import Letters

SYNTHETIC = ("vt", "cwe", "fwe")
ODD = {
    "rtl": "שלום עולם. זה משפט ארוך. مرحبا بالعالم.",
    "braces": "{context} {} {0} %s $x \\n {{query}}.",
    "special": "<s> </s> <|endoftext|> [INST] <unk> <0x0A> ▁ Ġ Ċ. <|im_start|>system.",
    "marks": "e\u0301 n\u0303o \u200bzero \ufeffwidth \u00a0hard\u2028line 👩‍👩‍👧‍👦.",
    "no spaces": "我能吞下玻璃而不伤身体" * 9,
    "spaces": "  two  spaces\n\n\nand breaks\t tabs ",
    "empty": "",
    "document": "Document 1:\nDocument 2:\n\nDocument 3: Question: Answer:",
    "long word": "x" * 400,
}


def corpus(texts: list[str], copies: int = 6) -> qa.Corpus:
    """Each text a few times, and a question of each."""
    documents = tuple(sorted({f"T{i}\n{text}" for i in range(copies) for text in texts}))
    asked = [qa.Question(f"What is in {i}? {{x}}", ("<s> {y}", "שלום"), (i,), (), (i,)) for i in range(len(documents))]
    return qa.Corpus(tuple(asked), documents)


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["plain", "newlines", "greedy", "letters", "prefix", "unigram"])
@pytest.mark.parametrize("texts", [*([text] for text in ODD.values()), list(ODD.values())], ids=[*ODD, "all"])
def test_odd_documents_are_asked_as_they_are(trained: Callable, kind: str, texts: list[str]) -> None:
    tokenizer = trained(kind)
    found = corpus(texts)
    shelf = Shelf(Library(tokenizer, found), "qa_1", 42, 6000, 32)
    for index in (0, len(found.questions) - 1):
        assert shelf.fits(index)
        _, ids, text = shelf.build(index)
        made = text()
        assert ids.tolist() == whole(tokenizer, made) and len(ids) <= 6000 - 32
        assert found.documents[index] in made and made.endswith(f"{{x}}{qa.ANSWER_PREFIX}")


@pytest.mark.parametrize("source", [ODD["braces"], ODD["special"], ODD["rtl"]])
def test_odd_documents_pass_through_every_profile(
    trained: Callable, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    found = corpus([f"{source} {n}" for n in range(9)])
    monkeypatch.setattr(more, "corpus", lambda name: found)
    monkeypatch.setattr(more, "data_digest", lambda name: source)
    for profile in tasks.get("qa_2").protocols:
        samples = tasks.get("qa_2").samples(Setting(profile, 4000, 4), trained("plain"))
        assert len(samples) == 4
        for sample in samples:
            text = sample.requests[0].prompt.text
            assert found.documents[int(sample.id)] in text and sample.target == ("<s> {y}", "שלום")
            assert ("Answer:" in text[-8:]) == (profile != "nvidia-main-noprefix")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SYNTHETIC), st.integers(2500, 20_000), st.integers(0, 10**6), st.integers(1, 400))
def test_any_length_seed_and_budget(name: str, length: int, seed: int, budget: int) -> None:
    setting = Setting("exact", length, 1, seed, {"budget": str(budget)})
    try:
        (sample,) = tasks.get(name).samples(setting, Letters())
    except UserError as problem:
        need = int(re.findall(r"use at least (\d+)", str(problem))[0])
        assert need > length
        return
    (request,) = sample.requests
    assert request.max_tokens == budget
    assert length - budget - 24 <= len(request.prompt.ids) <= length - budget  # an entry has up to so many letters
    assert request.prompt.ids.tolist() == whole(Letters(), request.prompt.text)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_what_refuses_a_length_says_one_that_will_do(name: str) -> None:
    length = 300
    for _ in range(4):
        try:
            return_ = tasks.get(name).samples(Setting("exact", length, 5), Letters())
            assert len(return_[4].requests[0].prompt.ids) <= length
            return
        except UserError as problem:
            length = int(re.findall(r"use at least (\d+)", str(problem))[0])
    raise AssertionError(f"{length} does not do either")


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("option", [{"budget": "0"}, {"budget": "many"}, {"haystack_offset": "-1"}])
def test_bad_options_are_refused(name: str, option: dict[str, str]) -> None:
    profile = "nvidia-main" if "haystack_offset" in option else "exact"
    with pytest.raises(UserError, match="budget|haystack_offset"):
        tasks.get(name).samples(Setting(profile, 4096, 1, options=option), Letters())
    with pytest.raises(UserError, match="no profile"):
        tasks.get(name).samples(Setting("exactly", 4096, 1), Letters())
    assert len(tasks.get(name).samples(Setting("exact", 9000, 0), Letters())) == 0


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("profile", ["exact", "nvidia-2024", "nvidia-main", "lm-eval"])
def test_files_of_samples_hold_the_prompts(public: Callable, name: str, profile: str) -> None:
    setting = Setting(profile, 2048, 3)
    tokenizer = public("gpt-neox")
    task = commands.find_task(name)
    lines = list(records(task, setting, tokenizer, 3))
    assert [line["sample"] for line in lines] == [0, 1, 2]
    for line, sample in zip(lines, task.samples(setting, tokenizer), strict=True):
        joint = {"cwe": "\n\n"}.get(name, " ")
        rest = line.get("answer_prefix", f"{joint}{line['gen_prefix']}" if profile == "lm-eval" else "")
        assert f"{line['input']}{rest}" == sample.requests[0].prompt.text
        assert line["outputs"] == list(sample.target) and line["length"] <= 2048 + 200
    if profile == "exact":
        assert all(line["length"] + 12 >= 2048 for line in lines)


def test_a_file_of_questions(
    qa_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    tokenizer = str(Path(cli.__file__).parent / "gdn2" / "zoo" / "tokenizer.json")
    command = ["data", "ruler", "--task", "qa_1", "--length", "4k", "--samples", "2", "--tokenizer", tokenizer]
    assert cli.main([*command, "--out", str(tmp_path / "x.jsonl")]) == 3
    assert "data import squad_v2" in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()
    assert cli.main(["data", "import", "squad_v2", str(qa_files["qa_1"])]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "x.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["outputs"][0] for line in lines] == ["France", "10th and 11th centuries"]
    assert all(line["answer_prefix"] == qa.ANSWER_PREFIX and 0 <= line["depth"] <= 1 for line in lines)


def test_a_run_of_the_three_that_need_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "scripted:nothing", "--tasks", "vt,cwe,fwe", "--lengths", "8k", "--samples", "2"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert (
        len(re.findall(r"^(vt|cwe|fwe)\s+exact\s+8192\s+string_match_all\s+2\s+0\s+0\.0000$", out, re.MULTILINE)) == 3
    )
    assert cli.main([*command[:4], "qa_1", *command[5:]]) == 3
    assert "gdn2-eval data fetch squad_v2" in capsys.readouterr().err


def scored(name: str, sample: Sample, text: str) -> float | None:
    (score,) = tasks.get(name).score(sample, [Response(text=text)])
    return score.value


@given(st.text(max_size=40))
def test_any_text_is_scored(text: str) -> None:
    for name, module in (("vt", vt), ("cwe", cwe), ("fwe", fwe)):
        sample = Sample("0", (), ("ABCDE", "FGHIJ"), None, {"profile": "exact"})
        value = scored(name, sample, text)
        assert value is not None and 0 <= value <= 1 and name == module.NAME
        assert scored(name, sample, text + " fghij abcde") == 1
    assert string_match_part(text + "b", ["B", "zzz"]) == 1 and string_match_all(text + "b", ["B", "\x01"]) >= 0.5
