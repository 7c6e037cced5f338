"""The tasks of Table 2 give lm-eval's own numbers: the same bits of every log-likelihood, the same scores."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tasks
from evalsuite import backends
from evalsuite.backends import hf
from tasks import data
from tasks.data import shelf

NAMES = ["piqa", "openbookqa", "winogrande", "boolq", "lambada_openai", "wikitext", "hellaswag"]
REQUESTS = {"piqa": 3676, "openbookqa": 2000, "winogrande": 2534, "boolq": 6540, "lambada_openai": 5153}
REQUESTS |= {"wikitext": 62, "hellaswag": 40168}

# What lm-eval and the libraries behind it say is not ours to judge.
pytestmark = pytest.mark.filterwarnings("ignore")


FEW = 4


@pytest.fixture
def home(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole sets."""
    monkeypatch.setenv("GDN2_DATA", str(benchmarks))
    return benchmarks


@pytest.fixture
def few(benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Their first samples; of Wikitext one page, which takes two windows."""
    for name in NAMES:
        (dataset,) = tasks.get(name).datasets
        monkeypatch.setenv("GDN2_DATA", str(benchmarks))
        shelf.store(tmp_path / "few", dataset, data.rows(dataset)[: 1 if name == "wikitext" else FEW], "a test")
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "few"))
    return tmp_path / "few"


@pytest.fixture
def llama(parity: ModuleType, root: Path, trained: Callable, tmp_path: Path) -> Callable[[str], Path]:
    """A random Llama without BOS, or with one that its tokenizer puts before every text."""

    def make(kind: str) -> Path:
        if kind == "no bos":
            return parity.tiny_llama(tmp_path / "model", root / "gdn2" / "zoo" / "tokenizer.json", None)
        return parity.tiny_llama(tmp_path / "model", Path(trained("prefix").name), "<s>")

    return make


def compared(parity: ModuleType, home: Path, model: Path, folder: Path) -> int:
    """Ask one model through our engine and through lm-eval alone; the number of likelihoods that are equal."""
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    with parity.silence():
        theirs = HFLM(pretrained=str(model), dtype="float32", batch_size=1, device="cpu")
    ours = hf.load(str(model))
    found = parity.our_answers(ours, NAMES)
    return parity.compare(found, parity.evaluate(theirs, parity.lm_eval_tasks(NAMES, home, folder)))


@pytest.mark.parametrize("kind", ["no bos", "bos"])
def test_the_first_samples_have_lm_evals_bits(
    parity: ModuleType, few: Path, llama: Callable, tmp_path: Path, kind: str
) -> None:
    assert compared(parity, few, llama(kind), tmp_path) == FEW * (2 + 4 + 2 + 2 + 1 + 4) + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no bos", "bos"])
def test_all_samples_have_lm_evals_bits(
    parity: ModuleType, home: Path, llama: Callable, tmp_path: Path, kind: str
) -> None:
    assert compared(parity, home, llama(kind), tmp_path) == sum(REQUESTS.values())


def driven(parity: ModuleType, home: Path, names: list[str], folder: Path) -> int:
    """Ask gdn2-tiny through our engine and through lm-eval's evaluation; the number of likelihoods that are equal."""
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    ours = backends.load("gdn2-tiny", device="cpu")
    found = parity.our_answers(ours, names)
    return parity.compare(found, parity.evaluate(Gdn2LM(ours), parity.lm_eval_tasks(names, home, folder)))


def test_lm_eval_driving_our_model_gives_our_engines_bits(parity: ModuleType, few: Path, tmp_path: Path) -> None:
    assert driven(parity, few, NAMES, tmp_path) == FEW * (2 + 4 + 2 + 2 + 1 + 4) + 1


@pytest.mark.slow
def test_lm_eval_driving_our_model_gives_our_engines_bits_on_whole_sets(
    parity: ModuleType, home: Path, tmp_path: Path
) -> None:
    assert driven(parity, home, NAMES, tmp_path) == sum(REQUESTS.values())


def test_a_model_in_half_precision_is_summed_in_single(
    parity: ModuleType, few: Path, llama: Callable, tmp_path: Path
) -> None:
    """lm-eval sums bf16 log-probabilities in bf16 unless told otherwise: ours are those it has when told."""
    from lm_eval.models.huggingface import HFLM

    model, names = llama("no bos"), ["openbookqa"]
    loaded = parity.lm_eval_tasks(names, few, tmp_path)
    found = parity.our_answers(hf.load(str(model), dtype="bfloat16"), names)
    with parity.silence():
        told = HFLM(pretrained=str(model), dtype="bfloat16", softmax_dtype="float32", batch_size=1, device="cpu")
        plain = HFLM(pretrained=str(model), dtype="bfloat16", batch_size=1, device="cpu")
    assert parity.compare(found, parity.evaluate(told, loaded)) == 4 * FEW
    rounded = parity.evaluate(plain, loaded)["samples"]["openbookqa"]
    values = [value for sample in rounded for ((value, _),) in sample["resps"]]
    assert all(value == torch.tensor(value, dtype=torch.bfloat16).item() for value in values)
    exact = [response.logprob for _, responses, _ in found["openbookqa"] for response in responses]
    assert max(abs(a - b) for a, b in zip(exact, values, strict=True)) > 0.1
