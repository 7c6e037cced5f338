"""The transformers backend gives transformers' own numbers, runs nothing of a checkpoint, and fills no gaps."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evalsuite.backends.sampling import choose
from evalsuite.types import Decision, Generate, LogLikelihood, Prompt, Request, Response, Rolling, Sampling
from gdn2.checkpoints import Options
from gdn2.errors import CheckpointError, UserError

transformers = pytest.importorskip("transformers")

VOCAB = ["<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), *(chr(ord("A") + i) for i in range(26))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    tokenizer = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": {"String": ""},
        "behavior": "Isolated", "invert": False}, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(VOCAB)}, "unk_token": "<s>"},
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def prompt(ids: list[int]) -> Prompt:
    return Prompt(np.array(ids, dtype=np.int32), "")


def answers(directory: Path, requests: list[Request]) -> list[Response]:
    from evalsuite.backends import hf

    found = dict(hf.load(str(directory)).answer(requests))
    return [found[i] for i in range(len(requests))]


def peer(directory: Path) -> torch.nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_ranks_are_those_of_the_model_s_own_logits(directory: Path) -> None:
    context, rest = [0, 5, 9, 13], [7, 2, 30]
    plain, ranked = answers(
        directory, [LogLikelihood(prompt(context), prompt(rest), ranked) for ranked in (False, True)]
    )
    with torch.inference_mode():
        logits = peer(directory)(torch.tensor([context + rest])).logits[0]
    ranks = [
        1 + int((logits[len(context) - 1 + i] > logits[len(context) - 1 + i, t]).sum()) for i, t in enumerate(rest)
    ]
    assert plain.rank is None and ranked.rank == max(ranks)
    assert (plain.logprob, plain.greedy) == (ranked.logprob, ranked.greedy)


def test_likelihoods_are_the_models_own(directory: Path) -> None:
    context, rest = [0, 5, 9, 13], [7, 2, 30]
    first, empty = answers(
        directory, [LogLikelihood(prompt(context), prompt(rest)), LogLikelihood(prompt(context), prompt([]))]
    )
    with torch.inference_mode():
        logprobs = peer(directory)(torch.tensor([context + rest])).logits[0].log_softmax(-1)
    wanted = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(rest))
    assert first.logprob == pytest.approx(wanted, abs=1e-5) and first.tokens == 3
    assert (empty.logprob, empty.greedy) == (0.0, True)


def test_greedy_continuations_are_greedy(directory: Path) -> None:
    context = [0, 5, 9, 13, 20]
    with torch.inference_mode():
        ids = torch.tensor([context])
        for _ in range(6):
            ids = torch.cat([ids, peer(directory)(ids).logits[:, -1:].argmax(-1)], 1)
    wanted = ids[0, len(context) :].tolist()
    assert 1 not in wanted, "the test wants an answer without EOS"
    generated, cut, decided, scored = answers(
        directory,
        [
            Generate(prompt(context), 6),
            Generate(prompt(context), 6, stop=(VOCAB[wanted[2]],)),
            Generate(prompt(context), 6, decision=Decision((VOCAB[wanted[0]],))),
            LogLikelihood(prompt(context), prompt(wanted)),
        ],
    )
    assert (generated.text, generated.tokens, generated.ended) == ("".join(VOCAB[i] for i in wanted), 6, "length")
    assert cut.ended == "stop" and VOCAB[wanted[2]] not in cut.text
    assert (decided.ended, decided.tokens) == ("decided", 1)
    assert scored.greedy is True


def test_sampled_continuations_are_drawn_from_the_models_logits(directory: Path) -> None:
    context, asked = [0, 5, 9, 13, 20], [Sampling(1.0, seed, 0.9, 20) for seed in range(6)]
    model, texts = peer(directory), []
    with torch.inference_mode():
        for how in asked:
            ids: list[int] = []
            while len(ids) < 5 and 1 not in ids:
                logits = model(torch.tensor([context + ids])).logits[0, -1:]
                ids.append(int(choose(logits, [how], [len(ids)])))
            texts.append("".join(VOCAB[i] for i in ids if i != 1))
    found = answers(directory, [Generate(prompt(context), 5, sampling=how) for how in asked])
    assert [response.text for response in found] == texts and len(set(texts)) > 3


def test_rolling_windows_cover_the_document_once(directory: Path) -> None:
    document = [int(i) for i in torch.randint(2, len(VOCAB), (23,), generator=torch.Generator().manual_seed(2))]
    whole, windowed = answers(directory, [Rolling(prompt(document)), Rolling(prompt(document), 8)])
    with torch.inference_mode():
        logprobs = peer(directory)(torch.tensor([[1, *document[:-1]]])).logits[0].log_softmax(-1)
    assert whole.logprob == pytest.approx(sum(logprobs[i, t].item() for i, t in enumerate(document)), abs=1e-4)
    assert (whole.tokens, windowed.tokens) == (23, 23) and windowed.logprob != whole.logprob


def test_an_answer_depends_on_no_other(directory: Path) -> None:
    one: Request = LogLikelihood(prompt([0, 5, 9]), prompt([7, 8]))
    others: list[Request] = [Generate(prompt([0, 3]), 5), Rolling(prompt([4, 5, 6]))]
    assert answers(directory, [*others, one])[-1].logprob == answers(directory, [one])[0].logprob


def test_prompts_beyond_the_window_are_cut_and_counted(directory: Path) -> None:
    ids = [2 + i % 40 for i in range(80)]
    response, hopeless = answers(directory, [Generate(prompt(ids), 4), Generate(prompt(ids), 64)])
    assert (hopeless.ended, hopeless.error) == ("error", "64 tokens of answer leave no room for a prompt in 64 tokens")
    assert response.truncated == 80 + 4 - 64
    assert response.text == answers(directory, [Generate(prompt(ids[20:]), 4)])[0].text


def test_likelihoods_beyond_the_window_are_cut_and_counted(directory: Path) -> None:
    ids = [2 + i % 40 for i in range(80)]
    cut, fits = answers(
        directory, [LogLikelihood(prompt(ids), prompt([7, 8])), LogLikelihood(prompt(ids[17:]), prompt([7, 8]))]
    )
    assert (cut.truncated, fits.truncated) == (80 + 1 - 64, 0)
    assert cut.logprob == fits.logprob and cut.error is None


def test_what_no_window_holds_is_an_error_of_that_request(directory: Path) -> None:
    ids = [2 + i % 40 for i in range(80)]
    long, rolling, good = answers(
        directory, [LogLikelihood(prompt([0]), prompt(ids)), Rolling(prompt(ids), 65), Rolling(prompt(ids), 64)]
    )
    assert long.error == "a continuation of 80 tokens does not fit the window of 64"
    assert rolling.error.startswith("windows of 65 tokens are more than the 64 that")
    assert (good.error, good.tokens) == (None, 80)


def test_long_sequences_get_logits_only_where_they_are_scored(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evalsuite.backends import hf

    asked: list[Request] = [LogLikelihood(prompt([0, *range(2, 40)]), prompt([7, 8, 9]))]
    (whole,) = answers(directory, asked)
    monkeypatch.setattr(hf, "ALL_LOGITS", 8)
    (part,) = answers(directory, asked)
    assert part.logprob == pytest.approx(whole.logprob, abs=1e-5) and part.greedy == whole.greedy


def test_state_space_models_decode_with_their_own_cache(shared: Path, tmp_path: Path) -> None:
    """The golden Mamba-2: its cached tokens, which its README records next to those of whole-sequence runs."""
    source = shared / "golden" / "checkpoints" / "tf_mamba2_tied_bias"
    vocab = {f"t{i}": i for i in range(256)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    from evalsuite.backends import hf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = hf.load(str(source), options=Options(tokenizer=str(tmp_path / "tokenizer.json")))
        ids = json.loads((source / "inputs.json").read_text())["input_ids"][0]
        ((_, response),) = backend.answer([Generate(prompt(ids), 5)])
    assert response.text == "t62 t62 t65 t65 t65"
    assert (backend.info.family, backend.info.window) == ("recurrent", None)


def changed(directory: Path, path: Path, **config: object) -> Path:
    """A copy of the checkpoint with its configuration changed."""
    for name in ("model.safetensors", "tokenizer.json"):
        (path / name).write_bytes((directory / name).read_bytes())
    (path / "config.json").write_text(json.dumps({**json.loads((directory / "config.json").read_text()), **config}))
    return path


def test_gaps_are_refused_not_filled_with_noise(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, changed(directory, tmp_path) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1: model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        answers(tmp_path, [])


def test_bad_values_and_damage_are_refused(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    path = changed(directory, tmp_path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has 1 of 32 values"):
        answers(path, [])
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is cut short"):
        answers(path, [])


def test_code_in_a_checkpoint_is_never_run(directory: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path = changed(directory, tmp_path, model_type="evil", auto_map=auto)
    (path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="brings its own code, which is never run"):
        answers(path, [])
    assert not canary.exists()


def test_a_missing_or_old_library_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.2.9")
    with pytest.raises(UserError, match=r"transformers 5\.2\.9 is too old: 5\.5 or newer"):
        answers(directory, [])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"this model needs transformers: pip install 'gdn2-eval\[hf\]'"):
        answers(directory, [])
