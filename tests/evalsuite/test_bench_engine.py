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
    assert [w.name for w in one] == ["choices", "prefill 128", "generate 128"]
    assert [w.samples for w in one] == [16, 3, 3] and one[2].tokens == 3 * (128 + 4)
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
    assert len(rows) == 15
    for row in rows:
        # Left padding is the peers' own affair: prompts of one length need none.
        assert row.agreement == 1.0 and row.difference < 1e-3, row
    assert all(row.milliseconds.median > 0 and row.peak_bytes is None for row in rows)
    path = engine.write(result, tmp_path)
    assert json.loads(path.read_text())["rows"][0]["work"] == "choices" and path.name.startswith("engine_cpu_")


def test_a_hybrid_of_gated_deltanet_says_the_same(quiet):
    rows = []
    engine.run(Asked("random:gdn-tiny", (70,), ("hf",), 2, 3, (2,), 1), rows.append)
    assert len(rows) == 6 and all(row.agreement == 1.0 and row.difference < 1e-3 for row in rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "nowhere"}, "neither a directory nor random:"),
        ({"against": ("vllm",)}, "contender 'vllm' is unknown; choose from hf, lm-eval"),
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


def test_the_command(capsys, tmp_path, quiet):
    options = ["--model", "random:mamba2-tiny", "--lengths", "128", "--against", "", "--device", "cpu"]
    options += ["--prompts", "2", "--new-tokens", "3", "--rounds", "1", "--out", str(tmp_path)]
    assert cli.main(["bench", "engine", *options]) == 0
    out = capsys.readouterr().out
    assert "generate 128" in out and "written to" in out
    assert cli.main(["bench", "engine", *options, "--batches", "0"]) == 2
    assert "batch size '0' is not a number" in capsys.readouterr().err
