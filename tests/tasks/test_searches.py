"""The length searches of the compatible profiles, probe by probe, and the wording they were written with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tasks
from evalsuite.types import Setting
from tasks.ruler import compat
from tasks.ruler.niah import NiahTask
from tasks.ruler.templates import NIAH_TASKS, query_of

PLURAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))
FITS = Path(__file__).resolve().parents[3] / "shared" / "golden" / "ruler" / "fits.json"
ROWS = [
    pytest.param(profile, row, id=f"{profile}/{row['task']}@{row['max_seq_length']}")
    for profile, rows in (json.loads(FITS.read_text()) if FITS.exists() else {}).items()
    for row in rows
    if row["task"].startswith("niah") and row["max_seq_length"] <= 2048
]


@pytest.mark.parametrize("spec", NIAH_TASKS, ids=lambda spec: spec.name)
def test_the_singular_is_upstreams_replacement(spec: compat.Niah) -> None:
    template, kind = PLURAL, spec.value
    if spec.one:
        for old, new in SINGULAR:
            template = template.replace(old, new)
        kind = kind[:-1]
    keys = [f"key-{j}" for j in range(spec.queries)]
    query = query_of(keys)
    ours = f"{spec.introduction}\nCONTEXT\n{spec.question(query)} {spec.answer_prefix(query)}"
    assert ours == template.format(kind=kind, context="CONTEXT", query=query)


def test_queries_are_listed_with_a_comma_before_and() -> None:
    assert query_of(["a"]) == "a"
    assert query_of(["a", "b"]) == "a, and b"
    assert query_of(["a", "b", "c", "d"]) == "a, b, c, and d"


@pytest.mark.parametrize(("profile", "row"), ROWS)
def test_every_probe_of_the_search(
    public: Callable, punkt_home: Path, emerson: str, monkeypatch: pytest.MonkeyPatch, profile: str, row: dict
) -> None:
    """Sizes tried and tokens counted are those that the reference's search logged."""
    probes: list[list[int]] = []
    sizes: list[int] = []
    draw = compat.Source.draft
    tokenizer = public("gpt-neox")

    class Counting:
        """The tokenizer, noting what it counts."""

        bos_id = None

        def encode(self, text: str) -> list[int]:
            ids = tokenizer.encode(text)
            if sizes:
                probes.append([sizes.pop(), len(ids) + 128])
            return ids

    def noted(source: compat.Source, size: int) -> compat.Draft:
        sizes[:] = [size]
        return draw(source, size)

    monkeypatch.setattr(compat.Source, "draft", noted)
    task = tasks.get(row["task"])
    assert isinstance(task, NiahTask)
    made = task.compatible(Setting(profile, row["max_seq_length"], options={"haystack": emerson}), Counting())
    lengths = [next(made).record["length"] for _ in range(row["samples"])]
    refusals = 8  # draws of the check that something fits at all, from a stream of their own
    estimate = int(profile == "nvidia-main")
    start = refusals + estimate
    assert probes[start : start + len(row["search"])] == row["search"]
    assert [min(lengths), max(lengths)] == [row["length"]["min"], row["length"]["max"]]
    after = probes[start + len(row["search"]) :]
    rejected = sum(row["rejected_draws"].values())
    assert sum(tokens > row["max_seq_length"] for _, tokens in after) == rejected
    fitted = [size for size, tokens in after if tokens <= row["max_seq_length"]]
    assert len(fitted) == row["samples"]
    assert max(size for size, _ in after) == row["haystack_size"]
    assert {row["haystack_size"] - size for size in fitted} <= {0, row["increment"]}
