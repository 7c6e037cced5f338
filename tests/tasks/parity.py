"""lm-eval by itself: its own task files on our data, its own evaluation, its own model class on the same weights."""

import contextlib
import io
import json
import math
import warnings
from pathlib import Path

import torch

SPLITS = dict.fromkeys(("wikitext", "lambada_openai", "openbookqa", "arc_easy", "arc_challenge"), "test")
FOLDERS = {"lambada_openai": "lambada/lambada_openai", "winogrande": "winogrande/default", "arc_easy": "arc/arc_easy"}
FOLDERS |= {"arc_challenge": "arc/arc_challenge", "social_iqa": "siqa/siqa", "boolq": "super_glue/boolq/default"}


def lm_eval_tasks(names: list[str], home: Path, folder: Path) -> list:
    """lm-eval's tasks on the files of the data directory `home`, by configuration files that include its own."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    for name in names:
        theirs = Path(lm_eval.__file__).parent / "tasks" / f"{FOLDERS.get(name, f'{name}/{name}')}.yaml"
        files = {SPLITS.get(name, "validation"): str(home / f"{name}.jsonl")}
        (folder / f"{name}.yaml").write_text(
            f"include: {theirs}\ntask: {name}\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
            f"validation_split: {'null' if name in SPLITS else 'validation'}\n"
            f"dataset_kwargs:\n  data_files: {json.dumps(files)}\n"
        )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with silence():
        return list(manager.load(names)["tasks"].values())


@contextlib.contextmanager
def silence():
    """lm-eval and what it uses warn and draw bars."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def evaluate(lm: object, loaded: list) -> dict:
    """What lm-eval's `evaluate` returns, samples included."""
    import lm_eval

    with silence():
        return lm_eval.evaluate(
            lm=lm, task_dict={task.config.task: task for task in loaded}, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip


def tiny_llama(folder: Path, tokenizer: Path, bos: str | None, window: int = 2048) -> Path:
    """A random Llama of two small layers in transformers' format, with a copy of `tokenizer`."""
    import transformers
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(str(tokenizer))
    first = inner.token_to_id(bos) if bos else None
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=window, bos_token_id=first, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with silence():
        model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": inner.id_to_token(0)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"bos_token": bos} if bos else {})))
    return folder


def our_answers(backend: object, names: list[str]) -> dict[str, list]:
    """(sample, responses, scores by metric) of our tasks, by task, all asked at once."""
    import tasks
    from evalsuite.types import Setting

    loaded = [tasks.get(name) for name in names]
    samples = [task.samples(Setting(task.protocols[0]), backend.tokenizer) for task in loaded]
    flat = [request for part in samples for sample in part for request in sample.requests]
    found = dict(backend.answer(flat))
    answers = iter(found[i] for i in range(len(flat)))
    out = {}
    for task, part in zip(loaded, samples, strict=True):
        out[task.name] = []
        for sample in part:
            responses = [next(answers) for _ in sample.requests]
            scores = {score.metric: score for score in task.score(sample, responses)}
            out[task.name].append((sample, responses, scores))
    return out


def compare(ours: dict[str, list], theirs: dict) -> int:
    """Assert that log-likelihoods have the same bits and scores the same digits; the number of likelihoods."""
    from evalsuite.scorers import overall

    count = 0
    for name, answered in ours.items():
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(answered) == theirs["results"][name]["sample_len"]
        for sample, (_, responses, _) in zip(samples, answered, strict=True):
            for (found,), response in zip(sample["resps"], responses, strict=True):
                wanted = (response.logprob, response.greedy) if isinstance(found, tuple) else response.logprob
                assert found == wanted, (name, sample["doc_id"])
                count += 1
        for metric in answered[0][2]:
            scores = [scores[metric] for _, _, scores in answered]
            total = sum(score.value * score.weight for score in scores) / sum(score.weight for score in scores)
            found, wanted = overall(metric, total), theirs["results"][name][f"{metric},none"]
            # Perplexities: other order of the same sums. Everything else: the same number.
            assert found == wanted or (metric not in ("acc", "acc_norm") and math.isclose(found, wanted, rel_tol=1e-12))
    return count


def texts(request: object) -> str:
    """All of a request's text."""
    if hasattr(request, "document"):
        return request.document.text
    return request.context.text + request.continuation.text


def same(scores: list, found: dict) -> bool:
    """Whether our scores are lm-eval's values of one document."""
    per_unit = {"perplexity": lambda v: (-v, 1), "bits_per_byte": lambda v: (-v[0] / v[1] / math.log(2), v[1])}
    per_unit |= dict.fromkeys(("word_perplexity", "byte_perplexity"), lambda v: (-v[0] / v[1], v[1]))
    wanted = {name: per_unit.get(name, lambda v: (float(v), 1))(value) for name, value in found.items()}
    return {score.metric: (score.value, score.weight) for score in scores} == wanted
