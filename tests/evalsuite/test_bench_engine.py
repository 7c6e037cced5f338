"""`bench engine`: every contender gets the same tokens and weights, and says the same."""

import json
import warnings

import pytest
import torch

import cli
from evalsuite.bench import engine, peers
from evalsuite.bench.engine import Asked, Work, compare
from evalsuite.bench.peers import Answer, Contender, Numbers
from evalsuite.types import Generate, LogLikelihood
from gdn2.errors import UserError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SMALL = Asked("random:mamba2-tiny", (128,), ("hf", "lm-eval"), 3, 4, (1, 2), 1)


@pytest.fixture(scope="module")
def quiet():
    """transformers and lm-eval warn of many things."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_numbers_are_their_own_text():
    numbers = Numbers(50)
    assert numbers.encode(numbers.decode([3, 49, 0])) == [3, 49, 0]
    theirs = peers._numbers(50)
    assert theirs.encode("10 3 49 0", add_special_tokens=False) == [10, 3, 49, 0]
    assert theirs.decode([10, 0, 7]).split() == ["10", "0", "7"]


def test_work_is_the_same_each_time():
    one, two = (list(engine.works(SMALL, 97)) for _ in range(2))
    assert [w.name for w in one] == ["choices", "prefill 128", "generate 128", "needles 128"]
    assert [w.samples for w in one] == [16, 3, 3, 3]
    assert {len(r.prompt.ids) for r in one[3].requests} == {128} and one[2].tokens == 3 * (128 + 4)
    for a, b in zip(one, two, strict=True):
        assert [_ids(r) for r in a.requests] == [_ids(r) for r in b.requests]


def _ids(request):
    parts = [request.prompt] if isinstance(request, Generate) else [request.context, request.continuation]
    return [part.ids.tolist() for part in parts]


def test_agreement_counts_tokens_before_the_first_difference():
    assert compare([Answer((1, 2, 3, 4))], [Answer((1, 2, 9, 4))]) == (0.5, 0.0)
    assert compare([Answer((1, 2))], [Answer((1, 2))]) == (1.0, 0.0)
    assert compare([Answer((1, 2))], [Answer((1, 2, 3, 4))]) == (0.5, 0.0)
    found = compare([Answer((), -3.0, True), Answer((), -2.0, True)], [Answer((), -3.5, True), Answer((), -2.0, False)])
    assert found == (0.5, 0.5)


def test_contenders_take_turns_and_ours_is_the_measure():
    heard = []

    def speaker(name):
        def answer(requests):
            heard.append(name)
            return [Answer((1,))]

        return Contender(name, 1, answer)

    request = LogLikelihood(*(peers_prompt() for _ in "ab"))
    rows = engine.measure(Work("w", (request,), 1, 2), [speaker("ours"), speaker("b")], 3, torch.device("cpu"))
    assert heard == ["ours", "b", "ours", "b", "b", "ours", "ours", "b"]
    assert rows[0].slower_than_ours == 1.0 and [row.contender for row in rows] == ["ours", "b"]
    assert len(rows[0].cells()) == len(engine.HEADER) and rows[0].milliseconds.rounds == 3


def test_who_runs_out_of_memory_leaves_that_work():
    def full(requests):
        raise torch.OutOfMemoryError("CUDA out of memory")

    ours = Contender("ours", 0, lambda requests: [Answer((1,))])
    work = Work("w", (LogLikelihood(peers_prompt(), peers_prompt()),), 1, 2)
    left = []
    rows = engine.measure(work, [ours, Contender("lm-eval", 8, full)], 1, torch.device("cpu"), left.append)
    assert [row.contender for row in rows] == ["ours"] and left == ["w: lm-eval 8"]


@pytest.mark.parametrize("preset", ["gdn-tiny", "kda-tiny"])
def test_a_preset_is_written_as_fla_reads_it(tmp_path, preset):
    from gdn2.checkpoints import open_model

    path = peers.write_fla(preset, tmp_path / "model", "cpu", "float32")
    loaded = open_model(str(path))
    assert loaded.format == "fla" and loaded.config.mixers[loaded.config.pattern[0]]["mixer"] == preset[:3]
    assert float(loaded.model.embed.weight.std()) == pytest.approx(0.02, rel=0.1)


def test_fast_is_a_contender_of_its_own(quiet):
    rows = []
    engine.run(Asked("random:mamba2-tiny", (128,), ("fast",), 2, 3, (1,), 1), rows.append)
    assert [row.contender for row in rows] == ["ours", "fast"] * 4
    assert all(row.agreement == 1.0 and row.difference < 1e-3 for row in rows)


def test_a_model_of_flas_needs_fla(tmp_path, monkeypatch):
    import sys

    path = peers.write_fla("gdn-tiny", tmp_path / "model", "cpu", "float32")
    monkeypatch.setitem(sys.modules, "fla.models", None)
    with pytest.raises(UserError, match="--against needs fla.models: pip install"):
        peers.open_peer(path, "cpu", "float32")
    with pytest.raises(UserError, match="is not fla: and a preset"):
        engine.run(Asked("fla:gdn-huge", (128,), ()), print)


def peers_prompt():
    return next(engine.works(SMALL, 97)).requests[0].context


def test_mamba2_says_the_same_everywhere(tmp_path, quiet):
    rows = []
    result = engine.run(SMALL, rows.append)
    assert [(r.contender, r.batch) for r in rows[:5]] == [
        ("ours", 0),
        ("hf", 1),
        ("lm-eval", 1),
        ("hf", 2),
        ("lm-eval", 2),
    ]
    assert len(rows) == 20 and result["out_of_memory"] == []
    for row in rows:
        # Left padding is the peers' own affair: prompts of one length need none.
        assert row.agreement == 1.0 and row.difference < 1e-3, row
    assert all(row.milliseconds.median > 0 and row.peak_bytes is None for row in rows)
    path = engine.write(result, tmp_path)
    assert json.loads(path.read_text())["rows"][0]["work"] == "choices" and path.name.startswith("engine_cpu_")


def test_a_hybrid_of_gated_deltanet_says_the_same(quiet):
    rows = []
    engine.run(Asked("random:gdn-tiny", (70,), ("hf",), 2, 3, (2,), 1), rows.append)
    assert len(rows) == 8 and all(row.agreement == 1.0 and row.difference < 1e-3 for row in rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "nowhere"}, "neither a directory nor random:"),
        ({"against": ("vllm",)}, "contender 'vllm' is unknown; choose from fast, hf, lm-eval"),
        ({"device": "cuda:7"}, "torch sees no GPU"),
    ],
)
def test_what_cannot_be_measured_is_said(changes, said):
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from dataclasses import replace

    with pytest.raises(UserError, match=said):
        engine.check(replace(SMALL, **changes))


def test_a_mixer_without_a_peer_is_said(tmp_path):
    with pytest.raises(UserError, match="transformers has no model like gdn2"):
        peers.write_random("gdn2", "tiny", tmp_path)
    with pytest.raises(UserError, match="needs a whole expansion"):
        peers.write_random("mamba2", "1.3b", tmp_path)
    with pytest.raises(UserError, match="not random: and a preset"):
        engine.run(Asked("random:mamba2-huge", (128,), ()), print)


def test_some_work_alone(quiet):
    rows = []
    result = engine.run(Asked("random:mamba2-tiny", (128,), (), 2, 3, (1,), 1, only=("needles", "gen")), rows.append)
    assert [row.work for row in rows] == ["generate 128", "needles 128"]
    assert result["decode_steps_per_s"] == {"ours 0": {}}


def test_the_command(capsys, tmp_path, quiet):
    options = ["--model", "random:mamba2-tiny", "--lengths", "128", "--against", "", "--device", "cpu"]
    options += ["--prompts", "2", "--new-tokens", "3", "--rounds", "1", "--out", str(tmp_path)]
    assert cli.main(["bench", "engine", *options]) == 0
    out = capsys.readouterr().out
    assert "generate 128" in out and "written to" in out
    assert cli.main(["bench", "engine", *options, "--batches", "0"]) == 2
    assert "batch size '0' is not a number" in capsys.readouterr().err
