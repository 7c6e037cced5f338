"""Tokenizers from every kind of file, and the refusal of every kind of broken file."""

import json
import os
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gdn2.errors import CheckpointError, UserError
from gdn2.tokenizer import load_tokenizer

TEXTS = [
    "Hello world",
    "  two  spaces ",
    "line\nbreak\r\n\ttab",
    "naïve café 北京 🙂 עברית",
    "",
    "1234567 is: 8.",
    "<s></s><|endoftext|>[INST]<unk>",
    "nul\0nul",
]


@pytest.fixture(scope="module")
def public(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    with tarfile.open(shared / "data" / "tokenizers.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "tokenizers"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer.json: byte-level, <s> and </s> special, <tool> an ordinary added token."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words to learn from, again and again"] * 20, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def copy(small: Path, target: Path, **files: object) -> Path:
    target.mkdir(exist_ok=True)
    shutil.copy(small / "tokenizer.json", target)
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


def test_special_tokens_in_a_text_are_text(small: Path) -> None:
    tokenizer = load_tokenizer(small)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *tokenizer.encode("a"), 1]) == "a"
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []
    # The control: without the setting they would be control tokens.
    raw = Tokenizer.from_file(str(small / "tokenizer.json"))
    assert raw.encode("<s>", add_special_tokens=False).ids == [0]


@pytest.mark.parametrize("file", ["llama2/tokenizer.model", "mistral/tokenizer.model.v1"])
def test_sentencepiece_models_give_sentencepieces_ids(public: Path, file: str) -> None:
    tokenizer = load_tokenizer(public / file)
    own = sentencepiece.SentencePieceProcessor(model_file=str(public / file))
    for text in TEXTS:
        assert tokenizer.encode(text) == own.encode(text)
        assert not {own.bos_id(), own.eos_id()} & set(tokenizer.encode(text))
    assert tokenizer.encode_batch(TEXTS) == own.encode(TEXTS)
    assert tokenizer.encode_batch([]) == []
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("a <s> b"), 2]) == "a <s> b"
    assert load_tokenizer(public / file, bos="no").bos_id is None


def test_user_defined_symbols_are_sentencepieces_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to learn from\nand others to know\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        vocab_size=20,
        user_defined_symbols=["<sep>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert own.piece_to_id("<sep>") in tokenizer.encode("some <sep> words")
    assert own.piece_to_id("<ctl>") not in tokenizer.encode("some <ctl> words")
    assert tokenizer.decode([own.piece_to_id("<ctl>"), *tokenizer.encode("some words")]) == "some words"


def test_gpt2s_pair_of_files(public: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(public / "gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, None, 50256)
    assert load_tokenizer(public / "gpt2", bos="yes").bos_id == 50256
    for old, new in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(public / "gpt2" / old, tmp_path / new)
    assert load_tokenizer(tmp_path).digest == tokenizer.digest


def test_gpt_neox(public: Path) -> None:
    tokenizer = load_tokenizer(public / "gpt_neox_20b" / "20B_tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50277, None, 0)
    assert 0 not in tokenizer.encode("a<|endoftext|>b")


def test_bos_follows_the_files(small: Path, tmp_path: Path) -> None:
    assert load_tokenizer(small).bos_id is None
    assert load_tokenizer(small).eos_id == 1
    assert load_tokenizer(small, bos="yes").bos_id == 0
    said = copy(small, tmp_path / "said", tokenizer_config={"add_bos_token": True, "bos_token": {"content": "</s>"}})
    assert load_tokenizer(said).bos_id == 1
    assert load_tokenizer(said, bos="no").bos_id is None
    mapped = copy(small, tmp_path / "map", special_tokens_map={"bos_token": "<s>", "eos_token": "<tool>"})
    assert load_tokenizer(mapped, bos="yes").bos_id == 0
    assert load_tokenizer(mapped).eos_id == load_tokenizer(small).vocab_size - 1
    listed = copy(small, tmp_path / "gen", generation_config={"eos_token_id": [7, 8], "bos_token_id": 5})
    assert (load_tokenizer(listed).eos_id, load_tokenizer(listed, bos="yes").bos_id) == (7, 5)
    inner = Tokenizer.from_file(str(small / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.save(str(tmp_path / "adds.json"))
    adds = load_tokenizer(tmp_path / "adds.json")
    assert adds.bos_id == 0 and 0 not in adds.encode("word")


def test_truncation_and_padding_of_the_file_are_off(small: Path, tmp_path: Path) -> None:
    inner = Tokenizer.from_file(str(small / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64, pad_id=1)
    inner.save(str(tmp_path / "cut.json"))
    tokenizer = load_tokenizer(tmp_path / "cut.json")
    assert tokenizer.encode_batch(["word " * 9, "a"]) == load_tokenizer(small).encode_batch(["word " * 9, "a"])


def test_the_digest_follows_what_defines_it(small: Path, tmp_path: Path) -> None:
    digest = load_tokenizer(small).digest
    assert len(digest) == 64 and digest == load_tokenizer(str(small / "tokenizer.json")).digest
    assert load_tokenizer(small, bos="yes").digest != digest
    other = copy(small, tmp_path / "other")
    assert load_tokenizer(other).digest == digest
    (other / "tokenizer.json").write_text((small / "tokenizer.json").read_text() + "\n")
    assert load_tokenizer(other).digest != digest
    assert sha256(b"").hexdigest() != digest


def test_a_directory_prefers_tokenizer_json(small: Path, public: Path, tmp_path: Path) -> None:
    both = copy(small, tmp_path / "both")
    shutil.copy(public / "llama2" / "tokenizer.model", both)
    assert load_tokenizer(both).vocab_size == load_tokenizer(small).vocab_size
    os.remove(both / "tokenizer.json")
    assert load_tokenizer(both).vocab_size == 32000


BROKEN = {
    "empty": b"",
    "text": b"not a tokenizer",
    "json": b'{"a": ',
    "no model": b"{}",
    "list": b"[]",
    "latin": b'{"\xff": 1}',
    "bytes": b"\x00\x01\x02\x03" * 50,
    "bad merge": json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}).encode(),
    "regex": json.dumps(
        {
            "version": "1.0",
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
    ).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(BROKEN[name])
    for source in (file, tmp_path):
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(source)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize("cut", [1, 100, 2000, 400_000])
def test_truncated_files_are_refused(public: Path, tmp_path: Path, cut: int) -> None:
    for file in ("gpt_neox_20b/20B_tokenizer.json", "llama2/tokenizer.model"):
        broken = tmp_path / "broken"
        broken.write_bytes((public / file).read_bytes()[:cut])
        with pytest.raises(CheckpointError):
            load_tokenizer(broken)


def test_broken_settings_are_refused(small: Path, tmp_path: Path) -> None:
    for content, said in (("[1]", "object"), ("{", "not JSON"), ('{"eos_token": "<none>"}', "not in the vocabulary")):
        folder = copy(small, tmp_path / "bad")
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=said):
            load_tokenizer(folder)


def test_missing_things(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)
    for name in (
        "",
        "nothing-here",
        str(tmp_path / "no" / "such" / "file"),
        "hf:",
        "hf:a/b/c",
        "a\0b",
        "x" * 5000,
        "/dev/zero",
    ):
        with pytest.raises(CheckpointError):
            load_tokenizer(name)
    with pytest.raises(UserError, match="bos"):
        load_tokenizer(small, bos="maybe")  # type: ignore[arg-type]
    inner = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    inner.save(str(tmp_path / "a.json"))
    with pytest.raises(CheckpointError, match="no BOS"):
        load_tokenizer(tmp_path / "a.json", bos="yes")
    assert load_tokenizer(tmp_path / "a.json").eos_id is None


def test_hub_names(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repo, revision))
        assert not local_files_only
        assert "tokenizer.json" in allow_patterns and not any("safetensors" in name for name in allow_patterns)
        return str(small)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for name in ("hf:owner/repo@v1.0", "owner/repo", "hf:gpt2"):
        assert load_tokenizer(name).vocab_size == load_tokenizer(small).vocab_size
    assert asked == [("owner/repo", "v1.0"), ("owner/repo", None), ("gpt2", None)]

    def offline(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection,\nsee above")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="hub gave none") as caught:
        load_tokenizer("owner/repo")
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(text: str) -> None:
        raise PanicException("called `Option::unwrap()`\non a `None` value")

    monkeypatch.setattr("tokenizers.Tokenizer.from_str", panic)
    with pytest.raises(CheckpointError, match="unwrap") as caught:
        load_tokenizer(small)
    assert "\n" not in str(caught.value)


def test_interrupts_pass(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenizers.Tokenizer.from_str", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(small)
