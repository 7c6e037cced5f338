"""Reading and decoding take turns: a long run's answers come before its last prompt is read."""

import random

import pytest

from evalsuite.backends import turns
from evalsuite.backends.reading import Reader
from evalsuite.backends.turns import BURST, GRACE_S, SHARE, Turns
from evalsuite.plan import Ask, make_plan
from evalsuite.runner import run
from evalsuite.store import read_records
from evalsuite.types import Generate, Sample, Score


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only as a test lets them."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    return now


def spend(one, clock, turn, seconds):
    def call():
        clock[0] += seconds
        return True

    assert one.take(turn, call)


def test_a_short_run_reads_first(clock):
    one = Turns()
    for _ in range(20):
        assert one.next() == "reading"
        spend(one, clock, "reading", GRACE_S / 20)


def test_a_long_run_gives_decoding_its_share(clock):
    one, spent = Turns(), {"reading": 0.0, "decoding": 0.0}
    order = []
    for _ in range(6000):
        turn = one.next()
        spend(one, clock, turn, seconds := 0.1 if turn == "reading" else 0.01)
        spent[turn] += seconds
        order.append(turn)
    assert spent["reading"] / spent["decoding"] == pytest.approx(SHARE, rel=0.1)
    first = order.index("decoding")
    assert order[first : first + BURST + 1] == [*["decoding"] * BURST, "reading"]
    assert first * 0.1 == pytest.approx(GRACE_S, abs=0.2)


def test_a_call_that_fails_took_its_time(clock):
    one = Turns()

    def failing():
        clock[0] += 2 * GRACE_S
        raise ValueError

    with pytest.raises(ValueError):
        one.take("reading", failing)
    assert one.next() == "decoding"


@pytest.fixture
def eager(monkeypatch):
    """Decoding is owed turns from the first batch on."""
    monkeypatch.setattr(turns, "GRACE_S", 0.0)
    monkeypatch.setattr(turns, "SHARE", 1e-9)


class Questions:
    """Prompts of 200 tokens, and five tokens to be generated after each."""

    name, version, suite, has_lengths, protocols = "questions", 1, "test", False, ("exact",)

    def __init__(self, small):
        rng = random.Random(1)
        self.prompts = [small.prompt(rng, 200) for _ in range(12)]

    def samples(self, setting, tokenizer):
        return [Sample(str(i), (Generate(prompt, 5),), ("a",)) for i, prompt in enumerate(self.prompts)]

    def data_digest(self, setting):
        return "none"

    def score(self, sample, responses):
        return [Score("em", float(len(responses[0].text) == 5), "a", responses[0].text)]


def test_records_are_stored_before_all_prompts_are_read(small, tmp_path, eager, monkeypatch):
    stored = []
    read = Reader.run_batch

    def watched(self):
        files = list(tmp_path.glob("*.jsonl"))
        stored.append(len(files[0].read_bytes().splitlines()) if files else 0)
        read(self)

    monkeypatch.setattr(Reader, "run_batch", watched)
    backend = small.make(batch_tokens=256)
    outcome = run(make_plan(backend, [Questions(small)], Ask((1024,))), backend, tmp_path, {}, print)
    assert outcome.answered == 12 and outcome.failed == 0
    assert len(stored) >= 9 and stored[3] >= 1 and stored[-1] >= 6
    assert len(read_records(tmp_path)) == 12


def test_turns_change_no_answer_and_read_nothing_twice(small, monkeypatch):
    asked = small.requests(9)
    backend = small.make(batch_tokens=128)
    expected = small.answers(backend, asked)
    monkeypatch.setattr(turns, "GRACE_S", 0.0)
    monkeypatch.setattr(turns, "SHARE", 1e-9)
    other = small.make(batch_tokens=128)
    assert small.answers(other, asked) == expected
    assert other.tokens_read == backend.tokens_read
