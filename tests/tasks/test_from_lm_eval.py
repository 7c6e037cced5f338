"""Any task of lm-eval through our engine: its prompts, filters and scores, on data that were brought before."""

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import datasets
import pytest

import cli
import tasks
from evalsuite import items
from evalsuite.backends.scripted import ByteTokenizer, ScriptedBackend
from evalsuite.lm_eval_bridge import loading
from evalsuite.lm_eval_bridge.task import LmEvalTask
from evalsuite.types import Generate, Response, Setting
from gdn2.errors import DataError, UserError
from tasks import commonsense
from tasks.data import commands, shelf

pytestmark = pytest.mark.filterwarnings("ignore")

PIQA = [{"goal": f"goal {i}", "sol1": f"a{i}", "sol2": f"{{b}} {i}", "label": i % 2} for i in range(5)]
GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(9)]
HUB = {
    "baber/piqa": {"train": PIQA[:1], "validation": PIQA, "test": PIQA[:1]},
    "openai/gsm8k": {"train": GSM8K, "test": GSM8K[:3]},
    "hazyresearch/based-fda": {"validation": [{"text": " A device.\nMaker:\n ", "value": " Acme ", "key": "Maker"}]},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub as `datasets` gives it; the repositories asked for."""
    asked: list[str] = []

    def load(path: str, name: str | None = None, **options: object) -> datasets.DatasetDict:
        asked.append(path)
        found = next(rows for repo, rows in HUB.items() if repo.endswith(path.split("/")[-1]))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in found.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def brought(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> LmEvalTask:
    """The task after its data were fetched and the network was cut."""
    commands.fetch(name, home, None, lambda line: None)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a network was tried")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    (task,) = tasks.resolve(name)
    return task


def samples(task: LmEvalTask, count: int | None = None) -> list:
    return list(task.samples(Setting(task.protocols[0], samples=count), ByteTokenizer()))


def same_as_lm_evals(task: LmEvalTask, made: list) -> None:
    """The prompts are those that lm-eval's own loop builds."""
    task.task.set_fewshot_seed(seed=1234)
    with loading.quiet():
        task.task.build_all_requests(limit=None, rank=0, world_size=1)
    wanted = [instance.args[0] for instance in task.task.instances]
    found = [r.prompt.text if isinstance(r, Generate) else r.context.text for sample in made for r in sample.requests]
    assert found == wanted


def test_a_fetched_task_is_the_native_one(home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    task = brought("lm_eval:piqa", home, monkeypatch)
    assert hub == ["baber/piqa"]
    shelf.store(home, commonsense.PIQA, PIQA, "a test")
    theirs, ours = samples(task), list(tasks.get("piqa").samples(Setting("lm-eval"), ByteTokenizer()))
    rng = random.Random(2)
    for a, b in zip(theirs, ours, strict=True):
        assert [(r.context.text, r.continuation.text) for r in a.requests] == [
            (r.context.text, r.continuation.text) for r in b.requests
        ]
        answers = [Response(logprob=-rng.random() - 1, greedy=False) for _ in a.requests]
        scores = [task.score(a, answers), tasks.get("piqa").score(b, answers)]
        assert [(s.metric, s.value) for s in scores[0]] == [(s.metric, s.value) for s in scores[1]]
    # Only the split that is asked was brought, and its digest is in that of the data.
    assert [row[:2] for row in commands.check(home)[0]] == [
        ("lm_eval/baber--piqa--default/validation.parquet", 5),
        ("piqa.jsonl", 5),
    ]
    assert len(task.data_digest(Setting("lm-eval"))) == 64
    same_as_lm_evals(task, theirs)


def test_examples_in_the_prompt_filters_and_stops(home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    task = brought("lm_eval:gsm8k", home, monkeypatch)
    made = samples(task)
    same_as_lm_evals(task, made)
    assert [sample.requests[0].prompt.ids.tolist() for sample in samples(task, 2)] == [
        sample.requests[0].prompt.ids.tolist() for sample in made[:2]
    ]
    request = made[1].requests[0]
    assert request.prompt.text.count("Question:") == 6 and "Question:" in request.stop and request.max_tokens == 256
    said = Response(text=" 1 + 1 is 2.\n#### 2", tokens=5, ended="stop")
    assert {s.metric: s.value for s in task.score(made[1], [said])} == {
        "exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0,
    }  # fmt: skip
    loose = Response(text=" The answer is 2", tokens=5, ended="stop")
    assert [s.value for s in task.score(made[1], [loose])] == [0.0, 1.0]


def test_tasks_that_are_python_classes(home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    task = brought("lm_eval:fda", home, monkeypatch)
    (sample,) = samples(task)
    (request,) = sample.requests
    assert (request.prompt.text, request.stop, request.max_tokens) == ("A device.\nMaker:", ("\n",), 48)
    (score,) = task.score(sample, [Response(text=" acme inc", tokens=3)])
    assert (score.metric, score.value, score.target) == ("contains", 1.0, "Acme")


def test_missing_data_have_exit_code_3_before_a_model_loads(home: Path, capsys: pytest.CaptureFixture) -> None:
    code = cli.main(["run", "--model", "hf:no/model", "--tasks", "lm_eval:piqa", "--data", "there"])
    err = capsys.readouterr().err
    assert code == 3 and err.count("\n") == 1
    assert "the data of lm_eval:piqa are not in there: `gdn2-eval data fetch lm_eval:piqa --to there` brings" in err


def test_a_changed_file_is_refused(home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    brought("lm_eval:piqa", home, monkeypatch)
    (file,) = home.rglob("validation.parquet")
    file.write_bytes(b"other")
    from tasks import from_lm_eval

    from_lm_eval._OPENED.clear()
    with pytest.raises(DataError, match=r"validation\.parquet is missing or changed"):
        samples(tasks.get("lm_eval:piqa"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_such", "lm-eval has no task, group or tag 'nothing_such'"),
        ("!../../etc", "is not the name of a task"),
        ("niah_single_1", "makes its data when it is loaded; RULER's tasks are here under their own names"),
        ("humaneval", "runs the code that a model writes, which is not done here"),
        ("mmmu_val_math", "asks about images or sounds"),
        ("mmlu/piqa", r"lm_eval:mmlu/piqa is no task of a group; there are lm_eval:mmlu_abstract_algebra, "),
        ("flan_held_in", "defines tasks of its own"),
        ("piqa/x", "lm_eval:piqa/x is no task of a group; there are none"),
        ("5-shot/nothing_such", "lm-eval has no task, group or tag 'nothing_such'"),
        ("5-shot/", "is not the name of a task"),
        ("3-shot/truthfulqa_gen", "lm_eval:truthfulqa_gen has no examples in its prompts"),
    ],
)
def test_names_that_are_no_task(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks.resolve(f"lm_eval:{name}")


def glue(rows: dict) -> Callable:
    return lambda path, name, options: {"validation": datasets.Dataset.from_list([rows] * 2)}


def test_a_metric_of_all_samples_together_keeps_what_it_needs_of_one() -> None:
    task = LmEvalTask("mrpc", glue({"sentence1": "a", "sentence2": "b", "label": 1}), str)
    (first, _) = samples(task)
    right, f1 = task.score(first, [Response(logprob=-1.0, greedy=True)] * 2)
    assert (right.metric, right.value, right.item) == ("acc", 0.0, None)
    assert (f1.metric, f1.value, f1.error, f1.aggregation) == ("f1", None, None, "lm_eval:f1")
    assert items.loads(f1.item) == (1, 0)
    with pytest.raises(DataError, match="lm-eval cannot load its task mrpc"):
        samples(LmEvalTask("mrpc", lambda *args: {"validation": datasets.Dataset.from_list([])}, str))


def test_whole_documents_have_the_fields_of_the_native_task() -> None:
    task = LmEvalTask("wikitext", lambda *args: {"test": datasets.Dataset.from_list([{"page": "a b"}])}, str)
    assert task.expand("lm-eval:window=99") == ("lm-eval:window=99:bos=twice",)
    (sample,) = task.samples(Setting("lm-eval:window=99:bos=once"), ByteTokenizer())
    assert (sample.requests[0].window, list(sample.requests[0].document.ids)) == (99, [97, 32, 98])
    scores = task.score(sample, [Response(logprob=-6.0)])
    assert {s.metric: (s.value, s.weight) for s in scores}["word_perplexity"] == (3.0, 2.0)
    assert LmEvalTask("piqa", lambda *args: {}, str).expand("lm-eval") == ("lm-eval",)


def test_only_fetching_uses_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [])
    found = []

    def source(path: str, name: str | None, options: object) -> dict:
        with suppress(OSError):
            found.append(socket.getaddrinfo("huggingface.co", 443))
        return {"validation": datasets.Dataset.from_list([{"sentence": "a", "label": 1}])}

    for online in (False, True):
        loading.load("cola", source, online=online)
    assert found == [[]] and socket.getaddrinfo("x") == []


def test_nothing_of_the_libraries_stays_changed() -> None:
    from lm_eval import utils

    load, compiled = datasets.load_dataset, []
    with loading.quiet(), loading.data_from(lambda path, name, options: {path: (name, dict(options))}):
        assert utils.env.from_string("{{a}}") is utils.env.from_string("{{a}}")
        assert datasets.load_dataset("p", "n", split="p", revision="r") == ("n", {"revision": "r"})
        compiled.append(utils.apply_template("{{a}}!", {"a": 1}))
    assert compiled == ["1!"] and datasets.load_dataset is load
    assert utils.env.from_string("{{a}}") is not utils.env.from_string("{{a}}")
    assert loading.question("a/b", None, {"x": None, "trust_remote_code": True}) == "a/b/default"
    assert loading.question("json", None, {"data_files": "x"}) != loading.question("json", None, {"data_files": "y"})


def test_lm_eval_may_ask_any_model_of_ours(parity: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from evalsuite.lm_eval_bridge.model import Gdn2LM

    assert get_model("gdn2") is Gdn2LM
    shelf.store(tmp_path, commonsense.PIQA, PIQA, "a test")
    loaded = parity.lm_eval_tasks(["piqa"], tmp_path, tmp_path)
    with parity.silence():
        found = lm_eval.simple_evaluate(
            model="gdn2", model_args="model=scripted:nothing", tasks=loaded, bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
    assert found["results"]["piqa"]["sample_len"] == 5 and found["config"]["model"] == "gdn2"
    assert len(found["config"]["model_sha"]) == 64
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is one process"):
        Gdn2LM("scripted:nothing")


def test_an_lm_tells_lm_evals_cache_and_stops_at_errors() -> None:
    from lm_eval.api.instance import Instance

    from evalsuite.lm_eval_bridge.model import Gdn2LM

    told = []
    lm = Gdn2LM(ScriptedBackend(lambda prompt: prompt.upper() + "\nmore"))
    lm.set_cache_hook(type("Hook", (), {"add_partial": lambda self, *args: told.append(args)})())
    asked = [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 9}), 0) for text in "ab"]
    assert lm.generate_until(asked) == ["A", "B"]
    assert told == [("generate_until", instance.args, text) for instance, text in zip(asked, "AB", strict=True)]
    (nats,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0)])
    assert nats < 0 and (lm.rank, lm.world_size, lm.device) == (0, 1, "cpu")
    failing = Gdn2LM(ScriptedBackend(str, fail=lambda request: "out of luck"))
    with pytest.raises(RuntimeError, match="request 0: out of luck"):
        failing.loglikelihood([Instance("loglikelihood", {}, ("a", " b"), 0)])
