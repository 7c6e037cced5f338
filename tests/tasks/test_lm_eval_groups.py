"""Numbers of all samples together, and groups: what our tables make of records is what lm-eval says, to the last digit.

The rows are made up, in the columns that the hub documents for each set.
"""

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import datasets
import pytest

import cli
import tasks
from evalsuite import runfile, runner, show
from evalsuite.backends import hf
from evalsuite.backends.scripted import ByteTokenizer, ScriptedBackend
from evalsuite.lm_eval_bridge import corpus as bridge
from evalsuite.lm_eval_bridge import index, loading
from evalsuite.lm_eval_bridge.standins import stand_ins
from evalsuite.plan import Ask, make_plan
from evalsuite.reports import actions, cells, compare, frame, measured
from evalsuite.stats import corpus
from evalsuite.store import read_records
from evalsuite.types import Backend, Setting
from evalsuite.watch import Watch
from gdn2.errors import DataError, UserError
from tasks import from_lm_eval
from tasks.data import commands, shelf

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "house", "quickly", "slowly", "and"]


def text(rng: random.Random, n: int = 8) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def rows(path: str, name: str) -> list[dict]:
    """A split of what the hub has at a path, in one configuration."""
    rng = random.Random(f"{path} {name}")
    if path == "cais/mmlu":
        row = {"choices": [text(rng, 2) for _ in range(4)], "subject": name}
        return [row | {"question": text(rng), "answer": rng.randrange(4)} for _ in range(5 + len(name) % 3)]
    if path == "wmt/wmt16":
        return [{"translation": {"ro": said, "en": said}} for said in (text(rng, 12) for _ in range(9))]
    if path == "EleutherAI/coqa":
        turns = [{"input_text": [text(rng, 4), text(rng, 3)]} for _ in range(12)]
        return [{"story": text(rng), "questions": turns[i], "answers": turns[i - 1]} for i in range(12)]
    if path == "google/xquad":
        return [{"context": text(rng), "question": text(rng), "answers": {"text": [text(rng, 3)]}} for _ in range(9)]
    if path == "RMT-team/babilong-1k-samples":
        return [{"input": text(rng), "question": text(rng), "target": rng.choice(WORDS)} for _ in range(8)]
    if path == "MBZUAI-Paris/DarijaBench":
        said = [{"role": role, "content": text(rng)} for role in ("user", "assistant")]
        return [{"messages": said, "direction": ("ar_dr", "dr_ar")[i % 2], "dataset": "x"} for i in range(6)]
    if path == "csebuetnlp/xlsum":
        return [{"title": text(rng), "text": text(rng, 20), "summary": text(rng)} for _ in range(10)]
    size = {"boolq": 12, "copa": 9, "hellaswag": 7, "sentineg": 5, "wic": 6, "cola": 15, "mrpc": 14}[name]
    names = ["paragraph", "sentence", "sentence1", "sentence2", "context", "context_1", "context_2", "word", "premise"]
    names += ["alternative_1", "alternative_2", *(f"ending_{i}" for i in (1, 2, 3, 4))]
    kinds = [{"question": rng.choice(["원인", "결과"]), "label": rng.randrange(2)} for _ in range(size)]
    return [{key: text(rng) for key in names} | kind for kind in kinds]


def load(path: str, name: str | None = None, **options: object) -> datasets.DatasetDict:
    split = datasets.Dataset.from_list(rows(path, name or ""))
    return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test", "qa1", "transliteration"), split))


def hub(path: str, name: str | None = None, split: str | None = None, **options: object) -> object:
    """What `datasets.load_dataset` gives."""
    found = load(path, name)
    return found["test"] if split else found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory, and a hub that holds `rows`."""
    monkeypatch.setenv("GDN2_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", hub)
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


def theirs(names: Sequence[str], lm: object, **options: object) -> dict:
    """What lm-eval by itself makes of the same model and data."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders = {str(Path(index.names().tasks.get(n) or index.names().groups[n]).parent) for n in names}
    with warnings.catch_warnings(), stand_ins(), loading.quiet():
        warnings.simplefilter("ignore")
        manager = TaskManager(include_path=sorted(folders), include_defaults=False)
        options = {"task_manager": manager, "bootstrap_iters": 0, **options}
        found = lm_eval.simple_evaluate(model=lm, tasks=list(names), **options)
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
    scores += show.averaged(runfile.read(directory), scores)
    assert {(s.task, s.metric): s.mean for s in scores} == {key: entry["mean"] for key, entry in ours.items()}
    watch = Watch(directory)
    assert watch.look() is False
    lines = [line.split() for line in watch.lines()]
    assert next(line[-4] for line in lines if line[:4] == ["lm_eval:kobest_wic", "lm-eval", "-", "f1"]) == (
        f"{ours['lm_eval:kobest_wic', 'f1']['mean']:.4f}"
    )
    assert ["lm_eval:kobest", "lm-eval", "-", "f1", "39", "0", f"{group['mean']:.4f}", "-"] in lines


@pytest.mark.parametrize("name", ["coqa", "xquad_es", "babilong_qa1"])
def test_tasks_that_import_what_is_gone_or_make_their_data(name: str, home: Path, tmp_path: Path) -> None:
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    backend = ScriptedBackend(lambda prompt: " ".join(prompt.split()[-7:-2]))
    ours = numbers(ask(f"lm_eval:{name}", home, backend, tmp_path))
    assert same(ours, theirs([name], Gdn2LM(backend))) == len(ours) > 0


def test_rouge_is_lm_evals_up_to_its_own_chance(home: Path, tmp_path: Path) -> None:
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    backend = ScriptedBackend(lambda prompt: " ".join(WORDS))
    directory = ask("lm_eval:xlsum_hausa_prompt_1", home, backend, tmp_path)
    (entry,) = numbers(directory).values()
    wanted = theirs(["xlsum_hausa_prompt_1"], Gdn2LM(backend))["xlsum_hausa_prompt_1"]["rougeL,none"]
    assert entry["mean"] == pytest.approx(wanted, abs=0.01) and 0.1 < wanted < 0.9  # its bootstrap has no seed
    assert [e["mean"] for e in numbers(directory).values()] == [entry["mean"]]


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


def test_examples_in_the_prompts_are_lm_evals(home: Path, tmp_path: Path) -> None:
    from evalsuite.lm_eval_bridge.model import Gdn2LM

    backend = ScriptedBackend(str)
    found = numbers(ask("lm_eval:3-shot/kobest,lm_eval:3-shot/cola", home, backend, tmp_path))
    assert ("lm_eval:3-shot/kobest", "f1") in found and ("lm_eval:3-shot/kobest_wic", "acc") in found
    plain = {(task.replace("3-shot/", ""), metric): entry for (task, metric), entry in found.items()}
    assert same(plain, theirs(["kobest", "cola"], Gdn2LM(backend), num_fewshot=3)) == 15
    (task,) = tasks.resolve("lm_eval:3-shot/cola")
    assert task.samples(Setting("lm-eval"), ByteTokenizer())[0].requests[0].context.text.count("Answer:") == 4
    # As in lm-eval a task whose configuration says 0 stays as it is, and a number of examples goes before a group's.
    names = {task.name for task in tasks.resolve("lm_eval:2-shot/openllm")}
    assert {"lm_eval:2-shot/openllm/hellaswag", "lm_eval:openllm/truthfulqa_mc1"} <= names
    commands.fetch("lm_eval:99-shot/cola", home, None, lambda line: None)
    with pytest.raises(DataError, match=r"record 1 of lm_eval:99-shot/cola gives no prompt: .*(larger|exceed)"):
        tasks.get("lm_eval:99-shot/cola").samples(Setting("lm-eval"), ByteTokenizer())
    (one,) = tasks.resolve("lm_eval:2-shot/openllm/hellaswag")
    assert dict(one.member.changes) == {"fewshot_split": "train", "num_fewshot": 2}


def test_a_group_may_give_its_tasks_other_metrics(home: Path, tmp_path: Path) -> None:
    directory = ask("lm_eval:darija_transliteration", home, ScriptedBackend(lambda prompt: prompt), tmp_path)
    table = cells.summary(frame.load([directory])).set_index(["task", "metric"])
    name = "lm_eval:darija_transliteration/transliteration_ar_dr"
    counts = {metric.removesuffix(",STRIP_ANSWER"): n for metric, n in table.loc[name, "n"].items()}
    assert counts == {"bert": 0, "bleu": 3, "chrf": 3, "ter": 3}
    assert table.loc[(name, "ter,STRIP_ANSWER"), "lower"] and not table.loc[(name, "bleu,STRIP_ANSWER"), "lower"]
    assert "'bertscore' is code of the hub's evaluate" in table.loc[(name, "bert,STRIP_ANSWER"), "problem"]
    # The task has one function of its own, the group another one.
    found = [bridge.aggregate(f"lm_eval:{place}/bert").function.__name__ for place in (name[8:], name.split("/")[1])]
    assert found == ["mbert", "darijabert"]
    told = tasks.get(name).member.told()
    assert "/darija_bench/darija_transliteration/utils.mbert" in told[0] and str(index.root()) not in told[0]


def test_missing_data_of_one_task_of_a_group_are_named_before_a_model_loads(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    commands.fetch("lm_eval:kobest_boolq", home, None, lambda line: None)
    code = cli.main(["run", "--model", "hf:no/model", "--tasks", "lm_eval:kobest", "--data", str(home)])
    err = capsys.readouterr().err
    assert code == 3 and err.count("\n") == 1
    assert f"the data of lm_eval:kobest_copa are not in {home}: `gdn2-eval data fetch lm_eval:kobest --to" in err


def test_a_group_is_brought_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    commands.fetch("lm_eval:kobest", home, None, said.append)
    assert len(said) == 6 and said[0] == "[1/5] lm_eval:kobest_boolq: 12 examples, 1 files"
    (home / "lm_eval" / "skt--kobest_v1--wic" / "test.parquet").write_bytes(b"other")
    from_lm_eval._OPENED.clear()
    commands.fetch("lm_eval:kobest,lm_eval:kobest_wic", home, None, said.append)
    assert said[6] == "[1/5] lm_eval:kobest_boolq: 12 examples, there already"
    assert said[10] == "[5/5] lm_eval:kobest_wic: 6 examples, 1 files"


def test_a_copy_of_ones_own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine{}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows("skt/kobest_v1", "wic")), "utf-8")
    assert cli.main(["data", "import", "lm_eval:kobest_wic", str(file), "--to", str(home)]) == 0
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    (task,) = tasks.resolve("lm_eval:kobest_wic")
    assert len(task.samples(Setting("lm-eval"), ByteTokenizer())) == 6
    assert [row[4] for row in commands.check(home)[0]] == ["whole"]
    (entry,) = shelf.manifest(home).values()
    assert entry.source.startswith("import:mine{}.jsonl sha256 ") and entry.records == 6
    for name, text, message in (
        ("kobest", "{}", "lm_eval:kobest is 5 tasks, each with a file of its own: import lm_eval:kobest_boolq, and so"),
        ("cola", '{"sentence": "a"}', "column label of lm_eval:cola is missing; there are sentence"),
        ("cola", '{"label": 1}', "cannot load its task cola: UndefinedError: 'sentence' is undefined"),
        ("cola", '{"sentence": "a", "label": 1}\n{"sentence": 1}', "cannot load its task cola: Arrow"),
        ("cola", "", "holds no record"),
        ("gsm8k", '{"question": "a", "answer": "b"}', "lm_eval:gsm8k also reads split train, which one file does not"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            commands.import_copy(f"lm_eval:{name}", file, home)
    assert len(shelf.manifest(home)) == 1


def test_a_suite_file_may_name_a_group(home: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text('samples = 4\n[[tasks]]\ntask = "lm_eval:kobest"\n\n[[tasks]]\ntask = "lm_eval:cola"\n')
    directory = ask(str(suite), home, ScriptedBackend(str), tmp_path)
    table = cells.summary(frame.load([directory]))
    group = next(e for e in table.to_dict("records") if (e["task"], e["metric"]) == ("lm_eval:kobest", "acc"))
    assert (group["n"], len(table)) == (5 * 4, 15)


def test_a_task_that_a_group_asks_in_its_own_way_is_another(home: Path) -> None:
    several = index.expand("openllm")
    names = {member.name: dict(member.changes) for member in several.members}
    assert names["lm_eval:openllm/hellaswag"] == {"fewshot_split": "train", "num_fewshot": 10}
    assert names["lm_eval:openllm/mmlu_anatomy"] == {"num_fewshot": 5}
    (group, *_) = [group for group in several.groups if group.name == "lm_eval:openllm/mmlu"]
    assert "lm_eval:openllm/mmlu_anatomy" in group.tasks and len(group.tasks) == 57
    commands.fetch("lm_eval:openllm/mmlu_anatomy,lm_eval:mmlu_anatomy", home, None, lambda line: None)
    asked, plain = tasks.resolve("lm_eval:openllm/mmlu_anatomy,lm_eval:mmlu_anatomy")
    prompts = [t.samples(Setting("lm-eval"), ByteTokenizer())[0].requests[0].context.text for t in (asked, plain)]
    assert prompts[0].endswith(prompts[1].partition("\n\n")[2])
    assert [prompt.count("Answer:") for prompt in prompts] == [6, 1]
    assert asked.data_digest(Setting("lm-eval")) != plain.data_digest(Setting("lm-eval"))
    assert [task.protocol for task in tasks.resolve("lm_eval:kobest@lm-eval")] == ["lm-eval"] * 5
    with pytest.raises(UserError, match="lm_eval:glue is 9 tasks: name one of them, such as lm_eval:cola"):
        tasks.get("lm_eval:glue")


def test_models_are_compared_and_shown(home: Path, tmp_path: Path) -> None:
    names = "lm_eval:kobest,lm_eval:cola,lm_eval:wmt16-ro-en,lm_eval:mrpc"
    good = ask(names, home, ScriptedBackend(poor_copy, "good"), tmp_path)
    bad = ask(names, home, ScriptedBackend(lambda prompt: "no word of it", "bad"), tmp_path)
    grid = compare.build([frame.load([path], texts=["target"]) for path in (bad, good)])
    lines = {line.labels[0]: line.cells for line in grid.lines}
    _, first, second, moved, p, *_ = lines["lm_eval:wmt16-ro-en bleu"]
    assert second.value - first.value == moved.value > 20 and moved.low > 0 and p.value < 0.05
    _, first, second, moved, p, *_ = lines["lm_eval:kobest"]  # one model's answers are the other's
    assert (moved.value, moved.low, moved.high, p.value) == (0, 0, 0, 1)
    text = table(tmp_path)
    assert "kobest" in text and "ter" in text
    shares = {(e["task"], e["metric"]): e["shares"] for e in cells.summary(frame.load([good])).to_dict("records")}
    # F1 of MRPC is read as that of KoBEST beside it, whose range is not known.
    assert not shares["lm_eval:mrpc", "f1"] and shares["lm_eval:mrpc", "acc"] and shares["lm_eval:cola", "mcc"]
    assert "Numbers of all samples together are made by lm-eval 0.4.13." in text
    run = json.loads((good / runfile.NAME).read_text())
    run["invocations"][0]["provenance"]["packages"]["lm-eval"] = "0.4.99"
    (good / runfile.NAME).write_text(json.dumps(run))
    text = table(tmp_path)
    assert "are made by lm-eval 0.4.13; their records by lm-eval: `0.4.99`" in text
    with pytest.raises(DataError, match="only bleu, chrf, ter: --rows task,metric"):
        actions.tables([good], actions.Shape(), ["task=lm_eval:wmt16-ro-en"], actions.Output(), print)
    report(["--runs", str(tmp_path), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "lm_eval:kobest" in page and "matthews_corrcoef" not in page


def table(runs: Path) -> str:
    """Tasks and metrics down, models across, in lines that no terminal folds."""
    shape, output = actions.Shape("task,metric", "model"), actions.Output(form="markdown")
    return actions.tables([runs], shape, [], output, print)


def report(arguments: list[str]) -> None:
    assert cli.main(["report", *arguments]) == 0


def test_a_number_that_cannot_be_made_here_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from lm_eval.api import registry

    directory = ask("lm_eval:cola,lm_eval:mrpc", home, ScriptedBackend(str), tmp_path)
    bridge.aggregate.cache_clear()
    measured.corpus.cache_clear()
    monkeypatch.setattr(registry, "AGGREGATION_REGISTRY", {"f1": registry.AGGREGATION_REGISTRY["f1"]})
    entry = next(e for e in cells.summary(frame.load([directory])).to_dict("records") if e["metric"] == "mcc")
    assert (entry["n"], entry["asked"]) == (0, 15)
    problem = "lm-eval 0.4.13 has no aggregation 'matthews_corrcoef'"
    assert entry["problem"].startswith(problem)
    assert problem in table(directory)
    cli.echo_scores(directory)
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and problem in err and "lm_eval:cola " in out
    watch = Watch(directory)
    watch.look()
    assert any(problem in line for line in watch.lines())
    bridge.aggregate.cache_clear()
    measured.corpus.cache_clear()


@pytest.mark.parametrize("name", ["os:system", "lm_eval:os/system", "lm_eval:piqa/../x", "lm_eval:", "lm_eval:rte/f1"])
def test_only_what_lm_eval_itself_names_is_called(name: str) -> None:
    with pytest.raises(DataError, match=r"^lm-eval 0\.4\.13 has no aggregation"):
        bridge.aggregate(name)
