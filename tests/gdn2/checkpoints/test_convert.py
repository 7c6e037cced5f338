"""From format to format and back: the same bits, and nothing written that would compute something else."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn2.checkpoints import Options, native, open_model
from gdn2.checkpoints.convert import convert
from gdn2.errors import CheckpointError, StorageError, UserError
from gdn2.models import Decoder, ModelConfig
from tests.gdn2.checkpoints import golden, peers

GDN2 = {"mixer": "gdn2", "n_heads": 2, "d_key": 8, "d_value": 16}
WINDOW = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "window": 24}
CONFIG = ModelConfig(
    d_model=32, vocab_size=64, pattern=("gdn2", "window"), mixers={"gdn2": GDN2, "window": WINDOW}, d_ff=48
)  # fmt: skip
IDS = [list(range(40))]
ALLOWED = Options(allow_pickle_weights=True)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "<s>"}
    (tmp_path / "tok.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return tmp_path / "tok.json"


def saved(path: Path, tokenizer: Path, **changes: object) -> Path:
    """A native checkpoint of CONFIG with changes to its GDN-2 layers or, for other names, to the model."""
    mixer = {k: v for k, v in changes.items() if k in ("gate", "erase_max", "scalar_erase", "norm_eps_mixer")}
    mixers = {"gdn2": {**GDN2, **mixer}, "window": WINDOW}
    model = Decoder(replace(CONFIG, mixers=mixers, **{k: v for k, v in changes.items() if k not in mixer}))
    model.reset_parameters(seed=2)
    native.save(path, model, tokenizer)
    return path


def same_model(a: Decoder, b: Decoder) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


def values_of(said: tuple[str, ...]) -> dict[str, str]:
    return dict(line.split("=") for line in said)


def test_native_to_nvlabs_and_back(tmp_path: Path, tokenizer: Path) -> None:
    source = saved(tmp_path / "a", tokenizer, erase_max=2, norm_eps=3e-4)
    said = convert(str(source), tmp_path / "b.pth", "nvlabs")
    options = replace(ALLOWED, values=values_of(said))
    assert options.values == {
        "norm_eps": "0.0003", "negative_eigenvalues": "yes", "window": "24", "rope_base": "10000.0",
        "attention_heads": "4",
    }  # fmt: skip
    again = open_model(str(tmp_path / "b.pth"), options=options)
    assert same_model(again.model, open_model(str(source)).model)
    assert golden.error(*(golden.prefill(m, IDS)[0] for m in (again.model, open_model(str(source)).model))) == 0
    convert(str(tmp_path / "b.pth"), tmp_path / "c", "native", replace(options, tokenizer=str(tokenizer)))
    assert same_model(open_model(str(tmp_path / "c")).model, again.model)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["extra"] == {"converted_from": "nvlabs"}


def test_the_first_version_is_written_with_what_its_code_expects(tmp_path: Path) -> None:
    tensors, _ = peers.nvlabs(True)
    torch.save(tensors, tmp_path / "a.pth")
    options = replace(ALLOWED, values={"window": "24", "rope_base": "5000", "attention_heads": "4"})
    convert(str(tmp_path / "a.pth"), tmp_path / "b.pth", "nvlabs", options)
    written = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert written[name].shape == tensor.shape
        assert name.endswith("attn.D") or torch.equal(written[name], tensor), name


@pytest.mark.parametrize("name", ["delta_net", "transformer"])
def test_fla_to_fla_is_the_same_file(tmp_path: Path, name: str) -> None:
    config = {"delta_net": peers.FLA, "transformer": peers.FLA_TRANSFORMER}[name]
    source = tmp_path / "a"
    source.mkdir()
    save_file(peers.fla(config)[0], source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    convert(str(source), tmp_path / "b", "fla")
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "b", source))
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert open_model(str(tmp_path / "b")).config == open_model(str(source)).config


MAMBA = {
    "mamba": {"mixer": "mamba1", "d_state": 8, "dt_rank": 3, "proj_bias": True},
    "samba": {"mixer": "mamba1", "d_state": 8},
    "mamba2": {"mixer": "mamba2", "n_heads": 4, "d_head": 16, "d_state": 8, "n_groups": 2, "dt_limit": (0.1, 0.5)},
    "mamba3": {"mixer": "mamba3", "n_heads": 4, "d_head": 16, "d_state": 8, "rank": 2, "out_norm": True},
}


@pytest.mark.parametrize("kind", MAMBA)
def test_mamba_goes_to_fla_and_back(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    mixers = {"ssm": MAMBA[kind], "window": WINDOW}
    pattern, d_ff = (("ssm", "window"), 256) if kind == "samba" else (("ssm", "ssm"), None)
    config = replace(CONFIG, mixers=mixers, pattern=pattern, d_ff=d_ff, tied=True, residual_fp32=True)
    model = Decoder(config)
    model.reset_parameters(seed=2)
    native.save(tmp_path / "a", model, tokenizer)
    convert(str(tmp_path / "a"), tmp_path / "b", "fla")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == kind
    again = open_model(str(tmp_path / "b"))
    assert same_model(again.model, model) and again.config.residual_fp32 and again.config.tied
    assert torch.equal(golden.prefill(again.model, IDS)[0], golden.prefill(model.eval(), IDS)[0])


def test_a_samba_whose_mlp_fla_cannot_state_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    model = Decoder(replace(CONFIG, mixers={"ssm": MAMBA["samba"]}, pattern=("ssm",)))
    model.reset_parameters(seed=2)
    native.save(tmp_path / "a", model, tokenizer)
    with pytest.raises(CheckpointError, match="no MLP 48 wide: widths are multiples of 256"):
        convert(str(tmp_path / "a"), tmp_path / "b", "fla")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**MAMBA["mamba3"], "a_activation": "heavy_tail"}, "computes A by softplus and this model by heavy_tail"),
        ({**MAMBA["mamba3"], "pairing": "neighbours"}, "one pairing of channels"),
        ({**MAMBA["mamba2"], "norm": False}, "normalises its output"),
        ({**MAMBA["mamba2"], "d_head": 12}, "a multiple of the model's width 32 wide, not 48"),
    ],
)
def test_mamba_that_fla_would_compute_differently_is_refused(
    tmp_path: Path, tokenizer: Path, options: dict[str, object], message: str
) -> None:
    model = Decoder(replace(CONFIG, mixers={"ssm": options}, pattern=("ssm",), d_ff=None))
    model.reset_parameters(seed=2)
    native.save(tmp_path / "a", model, tokenizer)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(str(tmp_path / "a"), tmp_path / "b", "fla")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["fla_gated_deltanet_gva", "fla_kda_gva"])
def test_golden_fla_to_native_and_back(shared: Path, tmp_path: Path, tokenizer: Path, name: str) -> None:
    source = shared / "golden" / "checkpoints" / name
    convert(str(source), tmp_path / "a", "native", Options(tokenizer=str(tokenizer)))
    convert(str(tmp_path / "a"), tmp_path / "b", "fla")
    assert open_model(str(tmp_path / "b")).digest != "" and (tmp_path / "b" / "tokenizer.json").is_file()
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "b", source))
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    stated, original = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "b", source))
    for key in stated.keys() & original.keys() - {"transformers_version"}:
        assert stated[key] == original[key], key


def test_gdn2_goes_to_fla_only_with_its_sigmoid_gate(tmp_path: Path, tokenizer: Path) -> None:
    """fla's layer hard-codes the sigmoid; the authors' and the paper's gate is SiLU. Neither becomes the other."""
    window = {**WINDOW, "norm_eps": 1e-5}
    mixers = {"gdn2": {**GDN2, "gate": "sigmoid"}, "window": window}
    model = Decoder(replace(CONFIG, mixers=mixers))
    model.reset_parameters(seed=2)
    native.save(tmp_path / "sigmoid", model, tokenizer)
    convert(str(tmp_path / "sigmoid"), tmp_path / "fla", "fla")
    again = open_model(str(tmp_path / "fla"))
    assert again.config.mixers["gdn2"]["gate"] == "sigmoid" and same_model(again.model, model)
    assert golden.error(golden.prefill(again.model, IDS)[0], golden.prefill(model.eval(), IDS)[0]) == 0
    with pytest.raises(CheckpointError, match="SiLU output gate and this model a sigmoid"):
        convert(str(tmp_path / "sigmoid"), tmp_path / "x.pth", "nvlabs")
    saved(tmp_path / "silu", tokenizer)
    with pytest.raises(CheckpointError, match="sigmoid output gate and this model SiLU"):
        convert(str(tmp_path / "silu"), tmp_path / "y", "fla")
    assert not (tmp_path / "x.pth").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"gate": "sigmoid", "norm_eps": 1e-3}, "fla", "fla has one norm_eps; this model has 0.001 in blocks"),
        ({"gate": "sigmoid", "scalar_erase": True}, "fla", "no scalar erase"),
        ({"scalar_erase": True}, "nvlabs", "no scalar erase"),
        ({"d_ff": None}, "nvlabs", "no model of gdn2, window layers"),
        ({"d_ff": None, "gate": "sigmoid"}, "fla", "without MLP"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, tokenizer: Path, changes: dict[str, object], to: str, message: str
) -> None:
    source = saved(tmp_path / "a", tokenizer, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(str(source), tmp_path / ("b.pth" if to == "nvlabs" else "b"), to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "tok.json"]


def test_targets_are_never_overwritten_and_tokenizers_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    source = saved(tmp_path / "a", tokenizer)
    for target, to, message in (
        (tmp_path / "a", "fla", "is there already"),
        (tmp_path / "b", "nvlabs", "must end in .pth"),
    ):
        with pytest.raises(UserError, match=message):
            convert(str(source), target, to)
    torch.save(peers.nvlabs(True)[0], tmp_path / "c.pth")
    options = replace(ALLOWED, values={"window": "24", "rope_base": "5000", "attention_heads": "4"})
    with pytest.raises(UserError, match="brings no tokenizer.json"):
        convert(str(tmp_path / "c.pth"), tmp_path / "d", "native", options)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        convert(str(source), tmp_path / "file" / "x.pth", "nvlabs")
