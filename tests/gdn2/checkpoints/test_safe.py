"""The safetensors reader refuses, in one line and before reading data, what is not exactly a safetensors file."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gdn2.checkpoints import safe
from gdn2.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(2.5, dtype=torch.float64),
    "c": torch.ones(5, dtype=torch.bfloat16),
    "d": torch.arange(3),
}


def write(path: Path, header: object, data: bytes = b"", raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with safe.SafeFile(tmp_path / "x.safetensors") as file:
        assert set(file.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype


@pytest.mark.parametrize("part", range(64))
def test_truncation_is_refused(tmp_path: Path, part: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.randn(64, 64), "v": torch.randn(64)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * part // 64])
    with pytest.raises(CheckpointError) as caught:
        safe.read_header(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


MALFORMED = {
    "trailing": ({"a": entry([2], 0, 8)}, b"\0" * 9, "after its last tensor"),
    "short": ({"a": entry([2], 0, 8)}, b"\0" * 7, "cut short"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, "overlaps"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, b"\0" * 20, "leaves 4 bytes"),
    "size": ({"a": entry([3], 0, 8)}, b"\0" * 8, "need 12"),
    "empty": ({"a": entry([0, 1 << 40], 0, 0)}, b"", "is empty"),
    "dtype": ({"a": entry([2], 0, 8, "F31")}, b"\0" * 8, "known: F64"),
    "negative": ({"a": entry([-2], 0, 8)}, b"\0" * 8, "malformed shape"),
    "bool": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4, "malformed shape"),
    "float": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}, b"\0" * 4, "malformed data_offsets"),
    "overflow": ({"a": entry([1 << 61, 1 << 61], 0, 8)}, b"\0" * 8, "its shape and dtype need"),
    "axes": ({"a": entry([1] * 9, 0, 4)}, b"\0" * 4, "malformed shape"),
    "keys": ({"a": {**entry([2], 0, 8), "code": "x"}}, b"\0" * 8, "exactly dtype, shape"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "list": ([], b"", "JSON object"),
    "name": ({"n" * 600: entry([2], 0, 8)}, b"\0" * 8, "1 to 512"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data, message = MALFORMED[case]
    with pytest.raises(CheckpointError, match=message):
        safe.read_header(write(tmp_path / "x", header, data))


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    one = json.dumps(entry([1], 0, 4))
    path = write(tmp_path / "x", None, b"\0" * 4, raw=f'{{"a": {one}, "a": {one}}}'.encode())
    with pytest.raises(CheckpointError, match="a occurs twice"):
        safe.read_header(path)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, (8 << 20) + 1, 1000])
def test_header_length_is_checked_before_it_is_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}" * 8)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="header"):
            safe.read_header(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "raw", [b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff{}", b"{", b'{"a": NaN}', b""]
)
def test_hostile_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(CheckpointError):
        safe.parse_json(raw, "header")


def test_count_is_capped(tmp_path: Path) -> None:
    header = {f"t{i}": entry([1], 4 * i, 4 * i + 4) for i in range(safe.MAX_TENSORS + 1)}
    with pytest.raises(CheckpointError, match="at most 50000"):
        safe.parse_header(json.dumps(header).encode(), 0, "x")


@given(st.binary(max_size=300), st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_header_or_one_line(raw: bytes, size: int) -> None:
    try:
        assert safe.parse_header(raw, size, "x") is not None
    except CheckpointError as error:
        assert "\n" not in str(error)


SHAPES = st.lists(st.integers(1, 4), max_size=3)
HEADERS = st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"), SHAPES, max_size=5)


@given(HEADERS, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_valid_headers_pass_and_every_shifted_offset_fails(shapes: dict[str, list[int]], random) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        n = 4 * torch.Size(shape).numel()
        header[name] = entry(shape, at, at + n)
        at += n
    found = safe.parse_header(json.dumps(header).encode(), at, "x")
    assert {name: list(info.shape) for name, info in found.items()} == shapes
    if header:
        name, side = random.choice(list(header)), random.choice([0, 1])
        header[name]["data_offsets"][side] += random.choice([-4, -1, 1, 4])
        with pytest.raises(CheckpointError):
            safe.parse_header(json.dumps(header).encode(), at, "x")


def test_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"w": torch.randn(64, 64)}, path)
    with safe.SafeFile(path) as file:
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(CheckpointError, match="changed while it was read"):
            file.read("w")


def test_mismatches_are_listed_first_five_and_count() -> None:
    info = safe.TensorInfo(torch.float32, (2, 3))
    found = {"a": info, "b": info, "i": safe.TensorInfo(torch.int8, (2,)), "x\n": info, "skip": info}
    wanted = {"a": (2, 3), "b": (3, 2), "i": (2,), "m1": (1,), "m2": (1,), "m3": (1,)}
    wrong = safe.mismatches(found, wanted, optional=["skip"])
    assert len(wrong) == 6 and "b is [2, 3], expected [3, 2]" in wrong and "i is int8" in wrong[-1]
    with pytest.raises(CheckpointError, match=r"6 mismatches: m1 is missing; .* \(and 1 more\)$") as caught:
        safe.refuse_mismatches("file", wrong)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4
    safe.refuse_mismatches("file", [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_are_named_and_counted(value: float) -> None:
    weight = torch.ones(4, 3)
    weight[1, :2] = value
    with pytest.raises(CheckpointError, match="w has 2 of 12 values"):
        safe.check_values("file", "w", weight)
    with pytest.raises(CheckpointError, match="all 12 values of w are zero"):
        safe.check_values("file", "w", torch.zeros(3, 4))
    safe.check_values("file", "bias", torch.zeros(3))


def test_configurations_may_hold_infinity_but_not_nan(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [0.0, Infinity], "b": {"__float__": "Infinity"}}')
    assert safe.read_json(path) == {"a": [0.0, float("inf")], "b": float("inf")}
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match="occurs twice"):
        safe.read_json(path)


def test_links_must_stay_inside(tmp_path: Path) -> None:
    inner, outer = tmp_path / "ckpt", tmp_path / "secret"
    inner.mkdir()
    outer.write_text("x")
    (inner / "real").write_text("y")
    (inner / "link").symlink_to("real")
    (inner / "out").symlink_to("../secret")
    (inner / "loop").symlink_to("loop")
    assert safe.inside(inner, inner / "link") == (inner / "real").resolve()
    for name, message in {"out": "link out of", "loop": "broken link", "none": "missing"}.items():
        with pytest.raises(CheckpointError, match=message):
            safe.inside(inner, inner / name)


def test_links_of_a_hub_snapshot_reach_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--r" / "snapshots" / "abc", tmp_path / "models--o--r" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    assert safe.inside(snapshot, snapshot / "config.json").name == "f00"
    (tmp_path / "other").write_text("x")
    (snapshot / "bad").symlink_to("../../../other")
    with pytest.raises(CheckpointError, match="link out of"):
        safe.inside(snapshot, snapshot / "bad")
