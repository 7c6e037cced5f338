"""What sharing saves on the benchmarks' own files, against the tokens lm-eval's HFLM runs for the same requests."""

import pytest
import torch

from evalsuite.types import LogLikelihood, Rolling
from gdn2.tokenizer import load_tokenizer
from tests.evalsuite import table2
from tests.evalsuite.test_engine_cost import OURS, as_prompt

TASKS = [task.__name__ for task in table2.FILES]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(OURS))


@pytest.fixture(scope="module")
def asked(shared, tokenizer):
    """{task: requests} of every 30th question."""
    return {
        task: [
            LogLikelihood(as_prompt(tokenizer, context), as_prompt(tokenizer, ending))
            for context, endings in pairs
            for ending in endings
        ]
        for task, pairs in table2.questions(shared, 30).items()
    }


def lm_eval_runs(requests):
    """Tokens of HFLM without its padding: a row for each choice; rows equal up to their last token are one."""
    rows = {(*r.context.ids.tolist(), *r.continuation.ids[:-1].tolist()) for r in requests}
    return sum(map(len, rows))


def ours_runs(small, monkeypatch, requests):
    """Tokens of our engine, the model itself replaced by zeros."""
    backend = small.make(vocabulary=2048)
    model = backend.model

    def forward(ids, ragged, state=None):
        return torch.zeros(len(ids), model.config.d_model), model.new_state(ragged.n_sequences)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(model, "step", lambda ids, state: torch.zeros(len(ids), model.config.d_model))
    assert len(dict(backend.answer(requests))) == len(requests)
    return backend.tokens_read


def test_the_tasks_of_table_2_together(small, monkeypatch, asked):
    ours = {task: ours_runs(small, monkeypatch, requests) for task, requests in asked.items()}
    theirs = {task: lm_eval_runs(requests) for task, requests in asked.items()}
    saved = {task: theirs[task] / ours[task] for task in TASKS}
    assert sum(theirs.values()) >= 1.6 * sum(ours.values())
    assert saved["hellaswag"] >= 1.85
    assert saved["openbookqa"] >= 2.2  # sharing all that its questions have in common would give 2.4
    assert min(saved.values()) >= 1.0


def test_four_choices_as_arc_asks_them(small, monkeypatch, shared, tokenizer):
    """Real questions in ARC's words: its own files are not at hand."""
    rows = table2.rows(shared, "openbookqa", "hf/test.jsonl", 4)
    pairs = [(f"Question: {r['question_stem']}\nAnswer:", f" {c}") for r in rows for c in r["choices"]["text"]]
    requests = [LogLikelihood(*(as_prompt(tokenizer, text) for text in pair)) for pair in pairs]
    assert lm_eval_runs(requests) >= 2.5 * ours_runs(small, monkeypatch, requests)


@pytest.mark.parametrize("task", TASKS)
def test_every_likelihood_is_the_unshared_one(small, asked, task):
    few = asked[task][:8]
    plain = small.make(vocabulary=2048, share_prefixes=False)
    backend = small.make(vocabulary=2048)
    assert small.answers(backend, few) == small.answers(plain, few)
    assert backend.tokens_read <= plain.tokens_read


def test_pages_of_wikitext_are_read_once(small, shared, tokenizer):
    pages = [row["page"] for row in table2.rows(shared, "wikitext2", "hf/wikitext_document_level.test.jsonl", 20)]
    documents = [Rolling(as_prompt(tokenizer, page[:3000]), window=512) for page in pages]
    backend, plain = small.make(vocabulary=2048), small.make(vocabulary=2048, share_prefixes=False)
    assert small.answers(backend, documents) == small.answers(plain, documents)
    whole = sum(len(d.document.ids) for d in documents)
    assert whole <= backend.tokens_read <= whole + 512 * len(documents)


def test_the_tasks_are_asked_in_lm_evals_words():
    row = {"sentence": "Ann paid Eve because _ asked.", "option1": "Ann", "option2": "Eve"}
    pairs = list(table2.winogrande(row))
    assert pairs == [("Ann paid Eve because Ann", [" asked."]), ("Ann paid Eve because Eve", [" asked."])]
    ((context, (first, second)),) = table2.piqa({"goal": "Open it", "sol1": "pull", "sol2": "push"})
    assert (context, first, second) == ("Question: Open it\nAnswer:", " pull", " push")
    ((context, endings),) = table2.boolq({"passage": "P.", "question": "is it"})
    assert context == "P.\nQuestion: is it?\nAnswer:" and endings == [" no", " yes"]
    ((context, endings),) = table2.lambada_openai({"text": "so he went home"})
    assert (context, endings) == ("so he went", [" home"])


def test_rows_equal_up_to_a_last_token_are_one_row_of_lm_evals(tokenizer):
    def one(context, ending):
        return LogLikelihood(as_prompt(tokenizer, context), as_prompt(tokenizer, ending))

    same = [one("Is it?", " a"), one("Is it?", " b")]
    assert all(len(r.continuation.ids) == 1 for r in same)
    assert lm_eval_runs(same) == len(same[0].context.ids)
    assert lm_eval_runs([same[0], one("Is it so?", " a")]) > lm_eval_runs(same)
