"""Files of probes: what was appended is read back, whatever a kill or a disk did to the rest."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.probe import records
from evalsuite.schema import NewerSchemaError
from evalsuite.store import locked
from gdn2.errors import DataError, RunLockedError, StorageError

SETTINGS = {"identity": {"block": 64}, "model": {"name": "m"}, "task": "t", "length": 256, "heads": [("0", "gdn2", 0)]}
FIXTURE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda n: n not in ("key", "version")), values, max_size=4
)


def filled(directory, samples):
    directory.mkdir(exist_ok=True)
    (directory / records.SAMPLES).unlink(missing_ok=True)
    for number, sample in enumerate(samples):
        records.append(directory, {"key": str(number), **sample})
    return directory / records.SAMPLES


def read(directory):
    warnings = []
    return list(records.lines(directory, warnings.append)), warnings


@given(samples=st.lists(fields, max_size=4))
@FIXTURE
def test_what_was_appended_is_read_back(tmp_path, samples):
    filled(tmp_path / "p", samples)
    found, warnings = read(tmp_path / "p")
    assert not warnings
    assert found == [{"version": records.VERSION, "key": str(i), **sample} for i, sample in enumerate(samples)]


@given(samples=st.lists(fields, min_size=1, max_size=3), cut=st.integers(1, 400))
@FIXTURE
def test_a_cut_off_end_costs_the_last_samples_only(tmp_path, samples, cut):
    path = filled(tmp_path / "p", samples)
    whole, _ = read(tmp_path / "p")
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - cut, 0)])
    warnings = []
    records.repair(tmp_path / "p", warnings.append)
    left = path.read_bytes()
    assert content.startswith(left) and (not left or left.endswith(b"\n")) and len(warnings) <= 1
    found, damaged = read(tmp_path / "p")
    assert found == whole[: len(found)] and not damaged and len(found) == left.count(b"\n")
    records.append(tmp_path / "p", {"key": "new"})
    assert [sample["key"] for sample in read(tmp_path / "p")[0]][-1] == "new"


@given(samples=st.lists(fields, min_size=1, max_size=3), junk=st.binary(min_size=1, max_size=60), at=st.integers(0, 3))
@FIXTURE
def test_damaged_lines_are_told_and_the_others_read(tmp_path, samples, junk, at):
    path = filled(tmp_path / "p", samples)
    whole, _ = read(tmp_path / "p")
    lines = path.read_bytes().splitlines(keepends=True)
    bad = junk.replace(b"\n", b"").replace(b"\r", b"") or b"x"
    lines.insert(min(at, len(lines)), b"~" + bad + b"\n")
    path.write_bytes(b"".join(lines))
    found, warnings = read(tmp_path / "p")
    assert found == whole and len(warnings) == 1 and "damaged sample counts as missing" in warnings[0]


def test_a_key_is_read_once(tmp_path):
    path = filled(tmp_path / "p", [{"a": 1}])
    path.write_bytes(path.read_bytes() * 2)
    assert len(read(tmp_path / "p")[0]) == 1


def test_later_versions_are_refused(tmp_path):
    path = filled(tmp_path / "p", [{}])
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(NewerSchemaError, match=r"samples.jsonl:1: version 2 is newer than 1"):
        read(tmp_path / "p")
    records.begin(tmp_path / "p", SETTINGS)
    settings = tmp_path / "p" / records.SETTINGS
    settings.write_text(settings.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(NewerSchemaError, match="version 2 is newer than 1: update"):
        records.load(tmp_path / "p", pytest.fail)


def test_a_probe_is_begun_once_and_never_mixed(tmp_path):
    records.begin(tmp_path, SETTINGS)
    before = (tmp_path / records.SETTINGS).read_bytes()
    records.begin(tmp_path, SETTINGS | {"passed": {"out": "elsewhere"}})  # the same probe, asked another way
    assert (tmp_path / records.SETTINGS).read_bytes() == before
    for other in ({"identity": {"block": 128}}, {"heads": []}):
        with pytest.raises(DataError, match=f"its {next(iter(other))} differs"):
            records.begin(tmp_path, SETTINGS | other)
    probe = records.load(tmp_path, pytest.fail)
    assert probe.heads == [("0", "gdn2", 0)] and probe.samples == [] and probe.model == "m"


@pytest.mark.parametrize("name", ["identity", "model", "heads", "task", "length"])
def test_settings_that_lack_something_are_refused(tmp_path, name):
    content = {"version": 1, **SETTINGS}
    del content[name]
    (tmp_path / records.SETTINGS).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{name} is missing"):
        records.load(tmp_path, pytest.fail)


def test_nothing_there(tmp_path):
    assert read(tmp_path) == ([], [])
    records.repair(tmp_path, pytest.fail)
    with pytest.raises(DataError, match="cannot read"):
        records.load(tmp_path, pytest.fail)


def test_probes_beside_each_other_are_sorted_and_empty_ones_left_out(tmp_path):
    for name, length, samples in (("b", 512, [{}]), ("a", 4096, [{}]), ("b", 256, [{}]), ("c", 256, [])):
        directory = tmp_path / f"{name}{length}"
        filled(directory, samples)
        records.begin(directory, SETTINGS | {"model": {"name": name}, "length": length})
    (tmp_path / "other").mkdir()
    found = records.beside(records.load(tmp_path / "b512", pytest.fail), pytest.fail)
    assert [(p.model, p.settings["length"]) for p in found] == [("a", 4096), ("b", 256), ("b", 512)]


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / records.SAMPLES).symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        records.append(tmp_path, {"key": "x"})


def test_a_directory_is_held_by_one_process(tmp_path):
    with locked(tmp_path / "p", pytest.fail):
        assert (tmp_path / "p" / "lock").read_text()
        with pytest.raises(RunLockedError, match="is in use by process"), locked(tmp_path / "p", pytest.fail):
            pass
    with locked(tmp_path / "p", pytest.fail):
        pass
    assert (tmp_path / "p" / "lock").read_text() == ""


def test_null_is_no_number(tmp_path):
    found = records.array([[1, None], [0.5, 2]])
    assert found.dtype == np.float64 and np.isnan(found[0, 1]) and np.nansum(found) == 3.5
