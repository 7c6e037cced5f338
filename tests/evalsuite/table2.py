"""The tasks of the paper's Table 2 whose files are at hand, as (context, continuations) in lm-eval's words."""

import json
import tarfile


def rows(shared, name, member, every):
    """Every `every`th line of one file of an archive."""
    with tarfile.open(shared / "data" / f"{name}.tar.xz") as archive:
        lines = archive.extractfile(f"{name}/{member}").read().decode("utf-8").splitlines()
    return [json.loads(line) for line in lines[::every]]


def hellaswag(row):
    yield row["query"], [f" {choice}" for choice in row["choices"]]


def openbookqa(row):
    yield row["question_stem"], [f" {choice}" for choice in row["choices"]["text"]]


def piqa(row):
    yield f"Question: {row['goal']}\nAnswer:", [f" {row[name]}" for name in ("sol1", "sol2")]


def boolq(row):
    yield f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", [" no", " yes"]


def winogrande(row):
    before, _, after = row["sentence"].partition("_")
    for name in ("option1", "option2"):
        yield before + row[name], [f" {after.strip()}"]


def lambada_openai(row):
    context, _, word = row["text"].rpartition(" ")
    yield context, [f" {word}"]


FILES = {
    hellaswag: "hf/validation.query.jsonl",
    openbookqa: "hf/test.jsonl",
    piqa: "hf/validation.jsonl",
    boolq: "hf/validation.jsonl",
    winogrande: "hf/validation.jsonl",
    lambada_openai: "lambada_test.jsonl",
}


def questions(shared, every):
    """{task: [(context, continuations), ...]} of every task."""
    return {
        task.__name__: [pair for row in rows(shared, task.__name__, member, every) for pair in task(row)]
        for task, member in FILES.items()
    }
