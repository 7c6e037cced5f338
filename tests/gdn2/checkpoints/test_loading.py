"""Opening by name, looking without loading, and what is refused: one line each, exit code 4 or 2."""

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn2.checkpoints import Options, describe, hub, listing, open_model, open_tokenizer
from gdn2.checkpoints.fields import Fields, Values
from gdn2.errors import CheckpointError, UserError
from gdn2.models import PRESETS
from tests.gdn2.checkpoints import peers

CONFIG: dict[str, Any] = {**peers.FLA, "attn": {**peers.FLA["attn"], "qkv_bias": True}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint in fla's form."""
    path = tmp_path / "model"
    path.mkdir()
    save_file(peers.fla(CONFIG)[0], path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def change(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def refused(path: Path, options: Options | None = None) -> str:
    """The one-line message with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        open_model(str(path), options=options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loaded_says_what_it_is(directory: Path) -> None:
    loaded = open_model(str(directory), dtype=torch.bfloat16)
    assert (loaded.format, loaded.name, loaded.tokenizer) == ("fla", "model", None)
    assert loaded.config.pattern == ("deltanet", "attention", "deltanet")
    assert re.fullmatch(r"[0-9a-f]{64}", loaded.digest)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


def test_parameters_are_the_files_tensors(directory: Path) -> None:
    model, tensors = open_model(str(directory)).model, load_file(directory / "model.safetensors")
    for ours, theirs in {
        "layers.0.mixer.q_conv1d.weight": "model.layers.0.attn.q_conv1d.weight",
        "layers.1.mixer.k_proj.bias": "model.layers.1.attn.k_proj.bias",
        "layers.2.mlp.down.weight": "model.layers.2.mlp.down_proj.weight",
    }.items():
        assert torch.equal(model.get_parameter(ours), tensors[theirs])


def test_digest_follows_weights_and_what_is_computed(directory: Path) -> None:
    before = open_model(str(directory)).digest
    change(directory, initializer_range=0.5, use_cache=False)
    assert open_model(str(directory)).digest == before == describe(str(directory)).digest
    change(directory, norm_eps=1e-3)
    assert open_model(str(directory)).digest != before
    change(directory, norm_eps=CONFIG["norm_eps"])
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, directory / "model.safetensors")
    assert open_model(str(directory)).digest != before


def test_every_mismatch_counts_and_five_are_named(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for i in range(3):
        del tensors[f"model.layers.{i}.attn_norm.weight"]
    tensors["surprise"] = torch.ones(2)
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, directory / "model.safetensors")
    message = refused(directory)
    assert "6 mismatches" in message and "(and 1 more)" in message
    looked = describe(str(directory))
    assert len(looked.refused) == 6
    for part in ("surprise is not part", "model.norm.weight is [7], expected [32]", "lm_head.weight is int8"):
        assert any(part in line for line in looked.refused), part


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN"), (float("-inf"), "NaN or infinite")])
def test_bad_values_need_the_flag(directory: Path, value: float, message: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.attn.q_proj.weight"][0, :3] = value
    save_file(tensors, directory / "model.safetensors")
    assert re.search(rf"model.layers.1.attn.q_proj.weight has 3 of 1024 values that are {message}", refused(directory))
    open_model(str(directory), options=Options(allow_bad_values=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 1 << 40}, "hidden_size must be an integer from 1 to"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer"),
        ({"num_heads": True}, "num_heads must be an integer"),
        ({"expand_k": 0.51}, "expand_k must be a factor that makes a whole width"),
        ({"norm_eps": "small"}, "norm_eps must be a number"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'swish' or 'silu'"),
        ({"use_gate": True}, "use_gate must be False"),
        ({"attn": {"layers": [9], "num_heads": 4}}, "layers must be numbers below 3"),
        ({"attn": [1]}, "attn must be an object"),
        ({"vocab_size": 2_000_000}, "expected [2000000, 32]"),
        ({"num_hidden_layers": 4000}, "4000 layers cannot be in a file of"),
    ],
)
def test_wrong_configurations_are_refused_before_memory_is_taken(
    directory: Path, values: dict[str, object], message: str
) -> None:
    change(directory, **values)
    tracemalloc.start()
    try:
        assert message in refused(directory)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["llama", "nemotron_h", "zamba2", "x\x1b[2J"])
def test_other_model_types_name_the_backend_that_runs_them(directory: Path, kind: str) -> None:
    change(directory, model_type=kind)
    message = refused(directory)
    assert f"use transformers:{directory}" in message and "\x1b" not in message


def test_a_configuration_runs_no_code(directory: Path) -> None:
    """auto_map and the like are not even looked at."""
    canary = directory / "canary"
    (directory / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    change(directory, auto_map={"AutoModelForCausalLM": "evil.Model"}, _attn_implementation_internal="evil/evil")
    open_model(str(directory))
    assert not canary.exists()


def test_looking_reads_headers_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdn2.checkpoints.safe import SafeFile

    def read(self: SafeFile, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafeFile, "read", read)
    looked = describe(str(directory))
    assert looked.format == "fla" and looked.refused == () and looked.config is not None
    assert looked.parameters == sum(t.numel() for t in peers.fla(CONFIG)[0].values())
    assert looked.dtypes == {"float32": looked.parameters} and list(looked.files) == ["model.safetensors"]


def test_looking_at_pickles_without_permission_says_so(tmp_path: Path) -> None:
    torch.save({"model": peers.nvlabs(False)[0]}, tmp_path / "x.pth")
    looked = describe(str(tmp_path / "x.pth"))
    assert looked.format is None and "--allow-pickle-weights" in looked.refused[0] and list(looked.files) == ["x.pth"]
    allowed = describe(str(tmp_path / "x.pth"), Options(allow_pickle_weights=True))
    assert "attention_heads cannot be read from the checkpoint" in allowed.refused[0]


def test_what_tensors_cannot_say_is_asked_for_by_name(tmp_path: Path) -> None:
    torch.save({"model": peers.nvlabs(False)[0]}, tmp_path / "x.pth")
    given: dict[str, str] = {}
    for name, value in {"attention_heads": "4", "window": "24", "rope_base": "5000"}.items():
        message = refused(tmp_path / "x.pth", Options(allow_pickle_weights=True, values=given))
        assert f"give {name}=NUMBER" in message
        given[name] = value
    open_model(str(tmp_path / "x.pth"), options=Options(allow_pickle_weights=True, values=given))
    for wrong, message in {
        "windows": "has no use for windows=7; it takes: attention_heads",
        "window": "window must be a positive number, got '-3'",
        "negative_eigenvalues": "negative_eigenvalues must be yes or no, got 'maybe'",
    }.items():
        values = {**given, wrong: {"windows": "7", "window": "-3"}.get(wrong, "maybe")}
        assert message in refused(tmp_path / "x.pth", Options(allow_pickle_weights=True, values=values))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    tensors, _ = peers.nvlabs(True)
    tensors["lm_head.weight"][0, 0] += 1
    torch.save(tensors, tmp_path / "x.pth")
    values = {"window": "24", "rope_base": "5000", "attention_heads": "4"}
    options = Options(allow_pickle_weights=True, values=values)
    assert "lm_head.weight differs from transformer.wte.weight" in refused(tmp_path / "x.pth", options)
    untied = Options(allow_pickle_weights=True, values={**values, "tied": "no"})
    assert not open_model(str(tmp_path / "x.pth"), options=untied).config.tied


def test_interleaved_heads_are_not_blocks(tmp_path: Path) -> None:
    """attn.weight holds q, k and v head by head: each of our rows is the row their view of it names."""
    tensors, _ = peers.nvlabs(False)
    torch.save(tensors, tmp_path / "x.pth")
    values = {"window": "24", "rope_base": "5000", "attention_heads": "4"}
    model = open_model(str(tmp_path / "x.pth"), options=Options(allow_pickle_weights=True, values=values)).model
    fused = tensors["transformer.h.1.attn.attn.weight"]
    second_head_keys = fused[(3 + 1) * 8 : (3 + 2) * 8]
    assert torch.equal(model.get_parameter("layers.1.mixer.k_proj.weight")[8:16], second_head_keys)


def test_the_constant_a_of_fla_0_5_1_is_detected_and_named(tmp_path: Path) -> None:
    config = {
        "model_type": "mamba3", "hidden_size": 64, "vocab_size": 50, "num_hidden_layers": 4, "expand": 2,
        "head_dim": 16, "state_size": 8, "tie_word_embeddings": True, "residual_in_fp32": True,
    }  # fmt: skip
    torch.manual_seed(0)
    tensors = {"backbone.embeddings.weight": torch.randn(50, 64), "backbone.norm_f.weight": torch.ones(64)}
    for i in range(4):
        m = f"backbone.layers.{i}.mixer."
        trained = torch.randn(2 * 128 + 2 * 8 + 3 * 8 + 2, 64) * 0.02 * (1 + i)
        trained[256 + 16 + 8 : 256 + 16 + 16] = torch.randn(8, 64) * 0.02  # rows of A, where no gradient came
        tensors |= {m + "in_proj.weight": trained, m + "out_proj.weight": torch.randn(64, 128)}
        tensors |= {m + n: torch.ones(8, 1, 8) for n in ("B_bias", "C_bias")}
        tensors |= {m + n: torch.ones(8) for n in ("B_norm.weight", "C_norm.weight", "D", "dt_bias")}
        tensors[f"backbone.layers.{i}.norm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "fla 0.5.1, whose Mamba-3 had A = +A_floor" in refused(tmp_path)
    open_model(str(tmp_path), options=Options(values={"a_activation": "softplus"}))
    for i in range(4):
        tensors[f"backbone.layers.{i}.mixer.in_proj.weight"][280:288] *= 1 + i
    save_file(tensors, tmp_path / "model.safetensors")
    open_model(str(tmp_path))


def test_model_type_mamba2_means_the_same_while_fla_is_imported(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fla takes the model type over from transformers, with other defaults; we ask neither."""
    transformers = pytest.importorskip("transformers")
    source = shared / "golden" / "checkpoints" / "tf_mamba2_tied_bias"
    before = open_model(str(source))

    class Taken(transformers.PretrainedConfig):
        model_type = "mamba2"

    registry = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    monkeypatch.setitem(registry._extra_content, "mamba2", Taken)
    assert isinstance(transformers.AutoConfig.for_model("mamba2"), Taken)
    after = open_model(str(source))
    assert (after.digest, after.config) == (before.digest, before.config)


def test_the_loader_imports_no_library_of_models(directory: Path) -> None:
    code = (
        f"import sys; from gdn2.checkpoints import open_model; open_model({str(directory)!r}); print(list(sys.modules))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"'transformers'", "'fla'", "'huggingface_hub'"} & set(done.stdout.strip("[]\n").split(", "))


def fetched(monkeypatch: pytest.MonkeyPatch, source: Path, root: Path) -> list[dict[str, Any]]:
    """Stand in for the hub: a snapshot of links holding what was asked for, as its cache lays it out."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []
    snapshot = root / "models--o--r" / "snapshots" / "abc123"
    blobs = root / "models--o--r" / "blobs"

    def download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for name in options["allow_patterns"]:
            if (source / name).is_file() and not (snapshot / name).exists():
                shutil.copyfile(source / name, blobs / f"blob-{name}")
                (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_hub_names_fetch_only_what_is_needed(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "evil.py").write_text("")
    torch.save({}, directory / "pytorch_model.bin")
    calls = fetched(monkeypatch, directory, tmp_path)
    loaded = open_model("hf:o/r@main", options=Options(offline=True))
    assert loaded.digest == open_model(str(directory)).digest and loaded.name == "hf:o/r@main"
    assert calls[0]["revision"] == "main" and calls[1]["revision"] == "abc123"
    assert all(call["local_files_only"] for call in calls)
    assert calls[1]["allow_patterns"] == ["model.safetensors"] and "evil.py" not in calls[0]["allow_patterns"]


def test_the_hubs_own_cache_is_read_offline(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library on a cache as it lays one out: a branch, a commit, and a branch that was never fetched."""
    import huggingface_hub

    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--o--r"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "blobs").mkdir()
    (home / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(directory / name, home / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    options, plain = Options(offline=True), open_model(str(directory))
    for name in ("hf:o/r", "hf:o/r@main", f"hf:o/r@{commit}"):
        assert open_model(name, options=options).digest == plain.digest
    assert describe("hf:o/r", options).refused == ()
    with pytest.raises(CheckpointError, match=r"hf:o/r@v2 cannot be fetched from the cache"):
        open_model("hf:o/r@v2", options=options)


def test_hub_failures_are_one_line(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    fetched(monkeypatch, directory, tmp_path)
    with pytest.raises(CheckpointError, match="hf:o/r holds no weights in safetensors"):
        open_model("hf:o/r")
    with pytest.raises(UserError, match="not a hub name"):
        open_model("hf:../etc")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be fetched from the cache") as caught:
        hub.download("hf:gdn2-eval-tests/none", allow_pickle=False, offline=True)
    assert "\n" not in str(caught.value)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no model 'gdn3': neither a known name, nor a path, nor hf:OWNER/REPO; "):
        open_model("gdn3")


def test_a_preset_is_untrained_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    small = replace(PRESETS["gdn2-1.3b"](), d_model=32, d_ff=48, vocab_size=64, pattern=("gdn2",))
    monkeypatch.setitem(PRESETS, "small", lambda: small)
    first, second = open_model("small"), open_model("small")
    assert first.format == "untrained preset" and first.digest == second.digest and first.tokenizer is None
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    with pytest.raises(UserError, match="preset"):
        describe("small")


TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
    "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<s>"},
}  # fmt: skip


def test_tokenizer_comes_with_the_model_and_must_fit(directory: Path) -> None:
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    change(directory, bos_token_id=0, add_bos_token=True)
    loaded = open_model(str(directory))
    assert loaded.tokenizer is not None and loaded.tokenizer.bos_id == 0
    assert loaded.tokenizer.encode("a b") == [1, 2], "BOS is put by the harness, once, never by the tokenizer"
    change(directory, bos_token_id=90)  # of another tokenizer: it would be asked of the embedding before every prompt
    assert "has ids up to 90, of which 90 is the first" in refused(directory)
    change(directory, bos_token_id=0)
    vocab = {"<s>": 0, **{f"w{i}": i for i in range(1, 95)}}
    (directory / "tokenizer.json").write_text(
        json.dumps({**TOKENIZER, "model": {**TOKENIZER["model"], "vocab": vocab}})
    )
    assert "has ids up to 94, of which 90 is the first" in refused(directory)


def test_every_format_is_listed_once() -> None:
    rows = listing()
    assert len({row[:2] for row in rows}) == len(rows)
    assert {"native", "nvlabs", "fla", "mamba_ssm", "transformers", "hf"} <= {row[0] for row in rows}


def test_fields_and_values_name_what_is_wrong() -> None:
    raw = Fields({"a": 1.0, "b": "x", "c": None, "d": [1, -2], "e": float("nan")}, "config.json")
    assert raw.integer("a") == 1 and raw.integer("c", 5) == 5 and not raw.has("c")
    for call, message in (
        (lambda: raw.integer("b"), "config.json: b must be an integer"),
        (lambda: raw.integers("d"), "d must be a list of integers"),
        (lambda: raw.number("e"), "e must be a number"),
        (lambda: raw.flag("a"), "a must be true or false"),
        (lambda: raw.choices("d", ("x",), 2), "d must be a list of 2 out of x"),
        (lambda: raw.numbers("d", 3, (0,)), "d must be a list of 3 numbers"),
        (lambda: raw.table("b"), "b must be an object"),
    ):
        with pytest.raises(CheckpointError, match=message):
            call()
    with pytest.raises(UserError, match="window must be a positive number, got 'inf'"):
        Values({"window": "inf"}).number("window", float)


def test_the_tokenizer_alone_is_the_one_of_the_opened_model(directory: Path, root: Path) -> None:
    alone, loaded = open_tokenizer("gdn2-tiny"), open_model("gdn2-tiny").tokenizer
    assert alone is not None and loaded is not None and alone.digest == loaded.digest
    assert open_tokenizer(str(directory)) is None and open_tokenizer("gdn-1.3b") is None
    named = Options(tokenizer=str(root / "gdn2" / "zoo" / "tokenizer.json"))
    assert open_tokenizer("gdn-1.3b", named) is not None and open_tokenizer(str(directory), named) is not None
    with pytest.raises(UserError, match="no model 'nowhere'"):
        open_tokenizer("nowhere")
