"""The schema: what is written is read back, and nothing else is."""

import dataclasses
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.schema import ADDED, PLAIN, SCHEMA_VERSION, NewerSchemaError, Record, check, from_line, table, to_line
from gdn2.errors import DataError

RECORD = Record(
    schema_version=PLAIN,
    run_id="m-0123456789ab",
    key="0" * 32,
    model="m",
    mixer="gdn2",
    family="recurrent",
    params=10,
    checkpoint="c",
    task="t",
    task_version=1,
    protocol="exact",
    length=128,
    sample_id="0",
    seed=42,
    metric="match",
    score=1.0,
    prompt_tokens=100,
    truncated_tokens=0,
    depth=0.5,
    target="7",
    output="7",
    output_tokens=1,
    outcome="target",
    logprob=None,
    decided_early=True,
    error=None,
    latency_s=0.25,
    created_at="2026-01-01T00:00:00+00:00",
    data="d",
    weight=1.0,
    metric_count=1,
)
KEPT = dataclasses.replace(RECORD, schema_version=2, score=None, aggregation="lm_eval:f1", item='{"$tuple":[1,0]}')


def signed(body: str) -> str:
    return f'{body}, "crc": "{zlib.crc32(body.encode()):08x}"}}'


def altered(**changes: object) -> str:
    columns = dataclasses.asdict(RECORD) | changes
    return signed(json.dumps(columns)[:-1])


anything = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates and control characters too


@given(target=anything, output=anything, score=st.floats(allow_nan=False, allow_infinity=False), seed=st.integers(0))
def test_any_record_survives_and_its_line_is_one_line_of_ascii(target, output, score, seed):
    record = dataclasses.replace(RECORD, target=target, output=output, score=score, seed=seed)
    line = to_line(record)
    assert line.isascii() and line.isprintable() is False and line.count("\n") == 1 and line.endswith("}\n")
    if len(str(seed)) < 4000:
        assert from_line(line) == record


@given(item=anything.filter(bool))
def test_an_item_survives(item):
    record = dataclasses.replace(KEPT, item=item)
    assert from_line(to_line(record)) == record


@pytest.mark.parametrize(
    "changes",
    [{"schema_version": 1}, {"aggregation": None}, {"item": None, "score": 1.0}, {"item": None, "error": "x"}],
)
def test_an_item_goes_with_its_aggregation_and_version(changes):
    with pytest.raises(DataError, match="a record has an aggregation and an item in version 2"):
        to_line(dataclasses.replace(KEPT, **changes))


def test_columns_of_the_line_are_in_the_order_of_the_schema():
    names = [name for name, _, _ in table()]
    assert [*json.loads(to_line(KEPT))] == names
    assert [*json.loads(to_line(RECORD))] == [name for name in names if name not in ADDED]


@given(position=st.integers(0, len(to_line(RECORD)) - 2), bit=st.integers(0, 6))
def test_a_flipped_bit_never_yields_another_record(position, bit):
    line = bytearray(to_line(RECORD).encode())
    line[position] ^= 1 << bit
    try:
        read = from_line(line.decode())
    except DataError:
        return
    assert read == RECORD


@pytest.mark.parametrize("cut", range(1, len(to_line(RECORD)) - 1, 7))
def test_a_torn_line_is_refused(cut):
    with pytest.raises(DataError):
        from_line(to_line(RECORD)[:cut])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": float("nan")}, "score is nan"),
        ({"score": float("inf")}, "score is inf"),
        ({"score": None}, "exactly one of the columns score, error and item"),
        ({"error": "broken"}, "exactly one of the columns score, error and item"),
        ({"score": 1}, "score is int"),
        ({"seed": True}, "seed is bool"),
        ({"seed": -1}, "seed is -1"),
        ({"model": None}, "model is null"),
        ({"family": "rnn"}, "family is 'rnn'"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"metric_count": 0}, "metric_count"),
    ],
)
def test_a_wrong_value_is_neither_written_nor_read(changes, message):
    with pytest.raises(DataError, match=message):
        to_line(dataclasses.replace(RECORD, **changes))
    if "nan" not in message and "inf" not in message:
        with pytest.raises(DataError, match=message):
            from_line(altered(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 0.0},
        {"depth": 1.0},
        {"depth": None},
        {"metric_count": 1},
        {"weight": 0.0},
        {"latency_s": 0.0},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"params": 0},
        {"length": 0},
        {"score": 0.0},
        {"score": -5.5},
        {"score": 1e300},
        {"score": None, "error": "oom"},
        {"logprob": -1e9},
        {"target": "", "output": ""},
        {"created_at": ""},
    ],
)
def test_values_at_the_ends_are_inside(changes):
    record = dataclasses.replace(RECORD, **changes)
    assert from_line(to_line(record)) == record


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": -1e-9},
        {"depth": 1 + 1e-9},
        {"metric_count": 0},
        {"weight": -1e-9},
        {"latency_s": -1e-9},
        {"length": -1},
        {"params": -1},
        {"task_version": "1"},
        {"score": "1"},
        {"score": True},
        {"depth": 1},
        {"weight": 1},
        {"output": b"x"},
        {"decided_early": 1},
        {"decided_early": None},
        {"logprob": float("-inf")},
        {"length": 1024.0},
        {"sample_id": 0},
    ],
)
def test_values_beyond_them_are_not(changes):
    (name,) = changes
    with pytest.raises(DataError, match=f"column .*{name}"):
        check(dataclasses.replace(RECORD, **changes))


def test_messages_say_what_to_do():
    for line, message in (
        (
            altered(schema_version=SCHEMA_VERSION + 1),
            f"^schema version {SCHEMA_VERSION + 1} is newer than {SCHEMA_VERSION}: update gdn2-eval",
        ),
        (json.dumps(dataclasses.asdict(RECORD)), "^the checksum is missing$"),
        (altered(schema_version="1"), "^schema version '1' is unknown$"),
        (altered(**{"x" * 500: 1}), "^unknown column 'xxx"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            from_line(line)
        assert len(str(caught.value)) < 120


def test_unknown_and_missing_columns_are_named():
    with pytest.raises(DataError, match="unknown column 'colour'"):
        from_line(altered(colour="red"))
    columns = dataclasses.asdict(RECORD)
    del columns["depth"]
    with pytest.raises(DataError, match="column depth is missing"):
        from_line(signed(json.dumps(columns)[:-1]))


def test_a_newer_version_is_refused_even_with_columns_of_its_own():
    with pytest.raises(NewerSchemaError, match=f"version {SCHEMA_VERSION + 1} is newer"):
        from_line(altered(schema_version=SCHEMA_VERSION + 1, colour="red"))
    with pytest.raises(DataError, match="version 0 is unknown"):
        from_line(altered(schema_version=0))


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "not a line of JSON"),
        ("[1]", "a JSON list"),
        ('{"a": 1, "a": 2}', "twice"),
        (altered().replace("0.25", "NaN"), "checksum"),
        (signed('{"score": NaN'), "NaN is not JSON"),
        ("[" * 100_000, "not a line of JSON"),
        (signed('{"seed": ' + "9" * 5000), "not a line of JSON"),
        (json.dumps(dataclasses.asdict(RECORD)), "checksum is missing"),
        (to_line(RECORD).strip() + to_line(RECORD), "checksum"),
    ],
)
def test_garbage_is_refused(line, message):
    with pytest.raises(DataError, match=message):
        from_line(line)


def test_byte_order_mark_line_ends_and_nul_padding_are_harmless():
    assert from_line("\ufeff" + to_line(RECORD).strip() + "\r\n") == RECORD
    assert from_line("\x00" * 512 + to_line(RECORD)) == RECORD


def test_every_column_is_documented():
    assert all(doc and kind for _, kind, doc in table())
    assert ("length", "integer or null") in [row[:2] for row in table()]
    check(RECORD)
