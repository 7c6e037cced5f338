"""Plots and tables of probes of every kind of model: drawn, the same every time, saying what the lines say."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from evalsuite.backends import observing
from evalsuite.probe import needle, plots, records, run, summary
from evalsuite.probe.lines import measured, numbers
from evalsuite.types import Generate, Prompt, Sample

PATTERNS = {
    "gdn2": ("gdn2", "gdn2"),
    "deltanet": ("deltanet",),
    "mamba2": ("mamba2", "mamba3-siso"),
    "mixed": ("deltanet", "window", "mamba3-mimo", "gdn"),
}


def asked(tokenizer, number, count=300):
    """A prompt of letters with a needle in it."""
    ids = np.random.default_rng(number).integers(1, 64, count).astype(np.int32)
    start = 70 + 10 * number
    key, value = (tokenizer.decode(ids[start + a : start + b].tolist()) for a, b in ((4, 9), (12, 17)))
    facts = {"needle_token": start, "needles": ((key, value),)}
    return Sample(str(number), (Generate(Prompt(ids, ""), 4),), (value,), 0.3, facts)


def probed(small, kind, directory, scores=(1.0, 1.0, 0.0, 0.5)):
    """A probe of samples with these scores, read back from its files."""
    backend = small.make(PATTERNS[kind])
    groups = observing.heads(backend)
    identity = {"block": 64, "kind": kind}
    settings = {"identity": identity, "model": {"name": f"small-{kind}"}, "task": "niah_x", "length": 512}
    directory.mkdir(parents=True)
    records.begin(directory, settings | {"heads": [head for group in groups for head in group]})
    for number, score in enumerate(scores):
        sample = asked(backend.tokenizer, number)
        found = needle.locate(sample, backend.tokenizer)
        followed = list(zip(groups, run.follow(backend, sample, found, 64), strict=True))
        line = {"key": str(number), "sample_id": sample.id, "score": score, "outcome": "x", "target": "t"}
        line |= {"output": "o", "depth": 0.3} | measured(sample, found, 64, followed, backend.tokenizer)
        records.append(directory, line)
    return records.load(directory, pytest.fail)


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    home = tmp_path_factory.mktemp("probes")
    return {kind: probed(small, kind, home / kind) for kind in PATTERNS}


def texts(path):
    """All texts of an SVG file."""
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_fields_that_no_head_has_are_left_out(made):
    def fields(kind):
        return set(made[kind].samples[0])

    assert not fields("mamba2") & {"erase", "write"} and "half_life" in fields("mamba2")
    assert not fields("deltanet") & {"half_life", "half_life_max"} and "erase" in fields("deltanet")
    assert {"half_life", "erase", "write"} <= fields("mixed") == fields("gdn2")
    assert "kept" not in made["deltanet"].samples[0]["window"]
    mixed = made["mixed"]
    lives = records.array(mixed.samples[0]["half_life"])
    own = {mixer: np.isnan(lives[:, g]).all() for g, (_, mixer, _) in enumerate(mixed.heads)}
    assert own == {"deltanet": True, "mamba3": False, "gdn": False}


def test_tables_and_notes(made):
    header, rows = summary.table(made["mixed"])
    assert len(rows) == len(made["mixed"].heads) == 8 and all(len(row) == len(header) for row in rows)
    assert {(row[1], row[4]) for row in rows} >= {("mamba3", "-")}
    assert "mamba3: no erase, and no gate on what is written" in summary.notes(made["mixed"])
    assert not any("no erase" in note for note in summary.notes(made["gdn2"]))
    assert any("2 of 4 answered right" in note for note in summary.notes(made["gdn2"]))


def test_damage_is_summed_up_by_text_and_head(made):
    (sample, *rest) = made["gdn2"].samples
    writes = [
        {"text": text, "layer": "0", "head": head, "damage": damage, "erase": -damage, "write": 0.0, "overlap": 0.5}
        for text, head, damage in (("a", 0, 0.1), ("b", 0, 0.3), ("a", 0, 0.3), ("a", 1, 0.2))
    ]
    probe = dataclasses.replace(
        made["gdn2"], samples=[{**sample, "worst": writes[:2]}, {**sample, "worst": writes[2:]}]
    )
    header, rows = summary.worst(probe)
    assert header[:5] == ("later write", "layer", "head", "times", "damage")
    assert rows == [
        ("'a'", "0", 0, 2, "0.20", "-0.20", "0.00", "0.50"),
        ("'b'", "0", 0, 1, "0.30", "-0.30", "0.00", "0.50"),
        ("'a'", "0", 1, 1, "0.20", "-0.20", "0.00", "0.50"),
    ]


def test_many_heads_are_shown_a_layer_at_a_time(made, monkeypatch):
    monkeypatch.setattr(summary, "MOST_ROWS", 3)
    _, rows = summary.table(made["gdn2"])
    assert [row[:3] for row in rows] == [("0", "gdn2", "all"), ("1", "gdn2", "all")]
    heads = summary.heads(made["gdn2"])
    assert float(rows[0][8]) == pytest.approx((heads[0].kept_hits + heads[1].kept_hits) / 2, abs=0.006)


def test_curves_are_means_over_samples_at_an_age(made):
    probe = made["gdn2"]
    found = plots.curve(probe.samples, "survival", [1], 64)
    assert found.ages[:6] == [1, 2, 4, 8, 16, 32] and found.ages[6:] == [64, 128, 192]
    at = [s["needle"]["stop"] - 1 - s["window"]["start"] for s in probe.samples]
    lost = [
        sum(np.array(part)[: a + 5, 1].sum() for part in s["window"]["loss"].values())
        for s, a in zip(probe.samples, at, strict=True)
    ]
    assert found.mean[2] == pytest.approx(1 + np.mean(lost))
    ends = [
        summary.mean_curve(s, "survival")[i, 1]
        for s in probe.samples
        for i, end in enumerate(s["ends"])
        if 128 <= end - s["needle"]["stop"] < 192
    ]
    assert found.mean[7] == pytest.approx(np.mean(ends))
    assert all(low <= mean <= high for low, mean, high in zip(found.low, found.mean, found.high, strict=True))
    near, survival = summary.near_curve(probe.samples[0], "survival"), summary.mean_curve(probe.samples[0], "survival")
    age = probe.samples[0]["ends"][1] - probe.samples[0]["needle"]["stop"]
    assert near[1][age] == pytest.approx(survival[1], abs=2e-3)  # both ways to the same number


@pytest.mark.parametrize("kind", PATTERNS)
def test_plots_say_what_the_model_has(made, kind):
    files = plots.draw(made[kind], ["svg"])
    assert sorted({path.stem for path in files}) == ["heads", "needle", "retention"]
    home = made[kind].directory
    assert {"hits (n = 2)", "misses (n = 2)", "retention", "survival"} <= set(texts(home / "retention.svg"))
    panels = {"retention, hits", "retention, misses", "survival, hits", "survival, misses", "asked"}
    assert panels <= set(texts(home / "heads.svg"))
    assert ("half-life (tokens)" in texts(home / "heads.svg")) == (kind != "deltanet")
    shown = set(texts(home / "needle.svg"))
    assert {"hit: sample 0", "miss: sample 2", "overlap"} <= shown
    assert ("erase" in shown) == (kind != "mamba2")


def test_plots_are_the_same_every_time(made):
    first = [path.read_bytes() for path in plots.draw(made["gdn2"], ["svg", "png"])]
    assert [path.read_bytes() for path in plots.draw(made["gdn2"], ["svg", "png"])] == first


def test_hits_alone_have_no_misses_beside_them(small, tmp_path):
    probe = probed(small, "gdn2", tmp_path / "one", scores=(1.0,))
    plots.draw(probe, ["svg"])
    assert not any("miss" in (text or "") for path in (tmp_path / "one").glob("*.svg") for text in texts(path))
    assert plots.compare([probe], ["svg"]) == []


def test_probes_against_each_other(made):
    (path,) = plots.compare([made["gdn2"], made["mamba2"]], ["svg"])
    shown = texts(path)
    assert "1: small-gdn2, niah_x at 512, 2 of 4 right" in shown and "survival lost by the end" in shown
    found = records.beside(made["gdn2"], pytest.fail)
    assert [probe.model for probe in found] == sorted(f"small-{kind}" for kind in PATTERNS)


def test_names_from_outside_are_made_harmless(made):
    evil = "\x1b[2J$\\mathbf{x}$" + "m" * 90
    probe = made["deltanet"]
    (sample, *_) = probe.samples
    odd = records.Probe(probe.directory, {**probe.settings, "model": {"name": evil}, "task": evil}, [
        {**sample, "sample_id": evil}
    ])  # fmt: skip
    for path in [*plots.draw(odd, ["svg"]), *plots.compare([odd, odd], ["svg"])]:
        assert "\x1b" not in path.read_text() and "m" * 60 not in path.read_text()
    assert json.dumps(summary.worst(odd)[1])


def test_numbers_on_a_map_are_brief():
    shown = [plots._brief(x) for x in (0.004, -0.001, 0.344, 3.14159, 84.4, 999.2, 1443, 12345, 7.778e6, 2.39e7, 5e9)]
    assert shown == ["0.00", "0.00", "0.34", "3.1", "84", "999", "1.44K", "12K", "7.78M", "24M", "5G"]


def test_numbers_have_five_digits_and_no_nan():
    import torch

    assert numbers(torch.tensor([[1.23456789, torch.nan], [torch.inf, -0.000123456789]], dtype=torch.float64)) == [
        [1.2346, None], [None, -0.00012346],
    ]  # fmt: skip
    assert np.isnan(records.array([[None, 1.0]])[0, 0])
