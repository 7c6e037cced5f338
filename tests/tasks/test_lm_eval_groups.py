"""Numbers of all samples together, and groups: what our tables make of records is what lm-eval says, to the last digit.

The rows are made up, in the columns that the hub documents for each set.
"""

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import datasets
import pytest

import tasks
from evalsuite import runner, show
from evalsuite.backends import hf
from evalsuite.backends.scripted import ScriptedBackend
from evalsuite.lm_eval_bridge import index, loading
from evalsuite.lm_eval_bridge.standins import stand_ins
from evalsuite.plan import Ask, make_plan
from evalsuite.reports import actions, cells, frame
from evalsuite.stats import corpus
from evalsuite.store import read_records
from evalsuite.types import Backend
from evalsuite.watch import Watch
from gdn2.errors import DataError
from tasks.data import commands

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "house", "quickly", "slowly", "and"]


def text(rng: random.Random, n: int = 8) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def rows(path: str, name: str) -> list[dict]:
    """A split of what the hub has at a path, in one configuration."""
    rng = random.Random(f"{path} {name}")
    if path == "cais/mmlu":
        row = {"choices": [text(rng, 2) for _ in range(4)], "subject": name}
        return [row | {"question": text(rng), "answer": rng.randrange(4)} for _ in range(1 + len(name) % 3)]
    if path == "wmt/wmt16":
        return [{"translation": {"ro": said, "en": said}} for said in (text(rng, 12) for _ in range(9))]
    size = {"boolq": 12, "copa": 9, "hellaswag": 7, "sentineg": 5, "wic": 6, "cola": 15, "mrpc": 14}[name]
    names = ["paragraph", "sentence", "sentence1", "sentence2", "context", "context_1", "context_2", "word", "premise"]
    names += ["alternative_1", "alternative_2", *(f"ending_{i}" for i in (1, 2, 3, 4))]
    kinds = [{"question": rng.choice(["원인", "결과"]), "label": rng.randrange(2)} for _ in range(size)]
    return [{key: text(rng) for key in names} | kind for kind in kinds]


def load(path: str, name: str | None = None, **options: object) -> datasets.DatasetDict:
    split = datasets.Dataset.from_list(rows(path, name or ""))
    return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), split))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory, and a hub that holds `rows`."""
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(corpus, "MOST", 20)
    return tmp_path / "data"


def poor_copy(prompt: str) -> str:
    """A translation that has most words."""
    words = prompt.split("Romanian phrase: ")[-1].split("\n")[0].split()
    return " ".join(word for i, word in enumerate(words) if (i + len(prompt)) % 5)


def ask(names: str, home: Path, backend: Backend, out: Path) -> Path:
    """The directory of a run of `names`."""
    commands.fetch(names, home, None, lambda line: None)
    plan = make_plan(backend, tasks.resolve(names), Ask(()))
    outcome = runner.run(plan, backend, out / "runs" / plan.run_id, {"model": "m", "device": "cpu"}, print)
    assert outcome.exit_code == 0
    return out / "runs" / plan.run_id


def theirs(names: Sequence[str], lm: object) -> dict:
    """What lm-eval by itself makes of the same model and data."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders = {str(Path(index.names().tasks.get(n) or index.names().groups[n]).parent) for n in names}
    with warnings.catch_warnings(), stand_ins(), loading.quiet():
        warnings.simplefilter("ignore")
        manager = TaskManager(include_path=sorted(folders), include_defaults=False)
        found = lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    return found["results"]


def numbers(directory: Path) -> dict[tuple[str, str], dict]:
    """Our cells by task and metric, each with its interval around it."""
    table = cells.summary(frame.load([directory]))
    found = {(entry["task"], entry["metric"]): entry for entry in table.to_dict("records")}
    for entry in found.values():
        assert entry["problem"] == "" and entry["n"] == entry["asked"] > 0
        assert entry["low"] <= entry["mean"] + 1e-12 and entry["mean"] - 1e-12 <= entry["high"], entry
    return found


def same(ours: dict[tuple[str, str], dict], wanted: dict) -> int:
    """Assert that every number of lm-eval's is ours; how many there were."""
    count = 0
    for task, metrics in wanted.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                name = metric if kind == "none" else key
                assert ours[f"lm_eval:{task}", name]["mean"] == value, (task, key)
                count += 1
    assert count == len(ours)
    return count


def test_glue_is_hflms(home: Path, parity: ModuleType, root: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = str(parity.tiny_llama(tmp_path / "model", root / "gdn2" / "zoo" / "tokenizer.json", None))
    directory = ask("lm_eval:cola,lm_eval:mrpc", home, hf.load(model), tmp_path)
    with parity.silence():
        lm = HFLM(pretrained=model, dtype="float32", batch_size=1, device="cpu")
    ours = numbers(directory)
    assert same(ours, theirs(["cola", "mrpc"], lm)) == 3
    assert {metric: entry["shares"] for (_, metric), entry in ours.items()} == dict.fromkeys(("mcc", "acc", "f1"), True)


def test_translations_are_lm_evals(home: Path, tmp_path: Path) -> None:
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    backend = ScriptedBackend(poor_copy)
    directory = ask("lm_eval:wmt16-ro-en", home, backend, tmp_path)
    ours = numbers(directory)
    assert same(ours, theirs(["wmt16-ro-en"], Gdn2LM(backend))) == 3
    bleu, ter = ours["lm_eval:wmt16-ro-en", "bleu"], ours["lm_eval:wmt16-ro-en", "ter"]
    assert 20 < bleu["mean"] < 90 and bleu["low"] < bleu["mean"] < bleu["high"] and not bleu["shares"]
    assert (bleu["lower"], ter["lower"]) == (False, True)


def test_a_group_of_tasks_with_functions_of_their_own(home: Path, tmp_path: Path) -> None:
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    backend = ScriptedBackend(str)
    directory = ask("lm_eval:kobest", home, backend, tmp_path)
    ours = numbers(directory)
    assert same(ours, theirs(["kobest"], Gdn2LM(backend))) == 5 + 5 + 1 + 3
    group = ours["lm_eval:kobest", "f1"]
    assert group["n"] == 12 + 9 + 7 + 5 + 6 and group["low"] < group["mean"] < group["high"]
    # What `run` prints, and `watch`, are the same numbers.
    scores = show.cells(read_records(directory))
    scores += show.averaged(directory, scores)
    assert {(s.task, s.metric): s.mean for s in scores} == {key: entry["mean"] for key, entry in ours.items()}
    watch = Watch(directory)
    assert watch.look() is False
    lines = [line.split() for line in watch.lines()]
    assert next(line[-4] for line in lines if line[:4] == ["lm_eval:kobest_wic", "lm-eval", "-", "f1"]) == (
        f"{ours['lm_eval:kobest_wic', 'f1']['mean']:.4f}"
    )


def test_nested_groups(home: Path, tmp_path: Path) -> None:
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    backend = ScriptedBackend(str)
    ours = numbers(ask("lm_eval:mmlu", home, backend, tmp_path))
    assert same(ours, theirs(["mmlu"], Gdn2LM(backend))) == 57 + 4 + 1
    # A group of which a task was not asked has no number.
    part = numbers(ask("lm_eval:mmlu_anatomy,lm_eval:mmlu_humanities", home, backend, tmp_path / "part"))
    assert ("lm_eval:mmlu_humanities", "acc") in part and len(part) == 1 + 13 + 1
    with pytest.raises(DataError, match="no records fit"):
        actions.tables([tmp_path], actions.Shape("model", "task"), ["task=nothing"], actions.Output(), print)
