"""Tokenizers of every kind, and the haystacks and models that tests take from ../shared."""

import importlib.util
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gdn2.tokenizer import load_tokenizer
from tasks.data import commands
from tasks.ruler.english import Corpus
from tasks.ruler.templates import NIAH_TASKS, NOISE


def corpus() -> list[str]:
    """Enough of the wording and of English to train a tokenizer on."""
    sentences = Corpus("eval").sentence
    english = [" ".join(sentences(10 * i + j) for j in range(10)) for i in range(40)]
    wording = [
        f"{task.introduction}\n{NOISE}\n{task.needle('calm-river', '1234567')}\n{task.question('calm-river')}"
        for task in NIAH_TASKS
    ]
    return english + wording * 5


def train(kind: str) -> Tokenizer:
    """A small tokenizer of one kind."""
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>"))
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "newlines":  # like Llama 3: punctuation takes the line break after it
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif kind == "greedy":  # nothing is split first: tokens reach across spaces and line breaks
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif kind == "letters":  # one token a byte
        trainer = trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
        tokenizer.pre_tokenizer = byte_level
    elif kind == "prefix":  # lower case, a space before the first word, BOS
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainer)
    if kind == "prefix":
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


TRAINED = ("plain", "newlines", "greedy", "letters", "prefix", "unigram")
PUBLIC = {
    "gpt-neox": "gpt_neox_20b/20B_tokenizer.json",
    "gpt2": "gpt2",
    "llama2": "llama2/tokenizer.model",
    "mistral-v1": "mistral/tokenizer.model.v1",
    "mistral-v3": "mistral/mistral_instruct_tokenizer_240323.model.v3",
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """kind -> loaded tokenizer, trained once."""
    folder = tmp_path_factory.mktemp("trained")
    made: dict = {}

    def get(kind: str) -> object:
        if kind not in made:
            train(kind).save(str(folder / f"{kind}.json"))
            made[kind] = load_tokenizer(folder / f"{kind}.json")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked public tokenizers, essays and Punkt."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("tokenizers", "haystack_essays", "punkt_tab"):
        with tarfile.open(shared / "data" / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def public(data: Path) -> Callable:
    """name -> loaded public tokenizer."""
    made: dict = {}

    def get(name: str) -> object:
        if name not in made:
            made[name] = load_tokenizer(data / "tokenizers" / PUBLIC[name])
        return made[name]

    return get


@pytest.fixture
def emerson(data: Path) -> str:
    """Path of a haystack of 740 kB of essays."""
    return str(data / "haystack_essays" / "emerson")


@pytest.fixture
def punkt_home(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Punkt where our own cache would have it."""
    monkeypatch.setenv("GDN2_CACHE", str(data))
    return data


@pytest.fixture(scope="session")
def qa_files(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Parts of SQuAD and HotpotQA in their original form."""
    folder = tmp_path_factory.mktemp("qa")
    for name in ("squad", "hotpotqa"):
        with tarfile.open(shared / "data" / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    lines = (folder / "hotpotqa" / "hotpotqa_validate.200.dev-distractor.jsonl").read_text("utf-8").splitlines()
    (folder / "hotpot.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    return {"qa_1": folder / "squad" / "dev-v2.0.json", "qa_2": folder / "hotpot.json"}


@pytest.fixture(scope="session")
def benchmarks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the real benchmark files: whole sets, of HellaSwag a copy whose contexts were cut again."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in ("piqa", "openbookqa", "winogrande", "boolq", "lambada_openai", "wikitext2", "hellaswag"):
        with tarfile.open(shared / "data" / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    cut = folder / "hellaswag.jsonl"
    with cut.open("w", encoding="utf-8") as file:
        for line in (folder / "hellaswag" / "hf" / "validation.query.jsonl").read_text("utf-8").splitlines():
            file.write(json.dumps(hellaswag_row(json.loads(line))) + "\n")
    files = {
        "piqa": "piqa/valid.jsonl", "openbookqa": "openbookqa/test.tsv", "hellaswag": "hellaswag.jsonl",
        "winogrande": "winogrande/hf/validation.jsonl", "boolq": "boolq/hf/validation.jsonl",
        "lambada_openai": "lambada_openai/lambada_test.jsonl", "wikitext": "wikitext2/wiki.test.raw",
    }  # fmt: skip
    for name, file in files.items():
        commands.import_copy(name, folder / file, folder / "data")
    return folder / "data"


def hellaswag_row(row: dict) -> dict:
    """The hub's columns of a row that has the finished question: ctx_b begins where a capital was put."""
    context, begin = row["ctx"], len(row["activity_label"]) + 2
    at = next((i for i, letter in enumerate(context) if row["query"][begin + i] != letter), len(context))
    kept = {name: row[name] for name in ("activity_label", "endings", "label")}
    return {**kept, "ctx_a": context[:at].rstrip(" "), "ctx_b": context[at:]}


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """lm-eval by itself, for comparison; see parity.py."""
    pytest.importorskip("accelerate")  # of lm-eval's own model class
    path = Path(__file__).with_name("parity.py")
    spec = importlib.util.spec_from_file_location("parity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
