"""Golden checkpoints of other codes: our logits and greedy tokens are theirs, by prefill and by decoding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdn2.checkpoints import Options, fla, open_model
from gdn2.checkpoints.fields import Fields
from gdn2.errors import UserError
from gdn2.mixers import build
from gdn2.ragged import Ragged
from tests.gdn2.checkpoints import golden

NAMES = [
    "fla_gated_deltanet_gva",
    "fla_kda_gva",
    "mamba_ssm_mamba3_siso",
    "nvlabs_gdn1_recurrent",
    "nvlabs_gdn2_recurrent",
    "tf_mamba2_tied_bias",
    "tf_qwen3_next_dense",
]


@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_by_prefill_and_by_decoding(shared: Path, name: str) -> None:
    directory = shared / "golden" / "checkpoints" / name
    model, ids = golden.opened(directory).model, golden.inputs(directory)
    theirs = golden.recorded(directory)
    for ours in (golden.prefill(model, ids), golden.decode(model, ids)):
        for mine, wanted in zip(ours, theirs, strict=True):
            assert golden.error(mine, wanted) < golden.TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_equal(shared: Path, name: str) -> None:
    directory = shared / "golden" / "checkpoints" / name
    model = golden.opened(directory).model
    assert golden.continue_greedily(model, golden.inputs(directory), 20) == golden.greedy(directory)


def test_mamba3_needs_the_activation_of_a_by_name(shared: Path) -> None:
    """One file, two published meanings: heavy_tail and softplus give different logits, and both are recorded."""
    directory = shared / "golden" / "checkpoints" / "mamba_ssm_mamba3_siso"
    with pytest.raises(UserError, match=r"a_activation.*softplus\|heavy_tail"):
        open_model(str(directory), options=Options(allow_pickle_weights=True))
    options = Options(allow_pickle_weights=True, values={"a_activation": "softplus"})
    model, ids = open_model(str(directory), options=options).model, golden.inputs(directory)[:1]
    (ours,), softplus = golden.prefill(model, ids), golden.recorded(directory, "logits_softplus_A")[0]
    assert golden.error(ours, softplus) < golden.TOLERANCE
    assert golden.error(ours, golden.recorded(directory)[0]) > 1e-2


def layer_outputs(directory: Path, **changed: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the golden GDN-2 layer of fla, ours and theirs [2, 150, D], with options changed."""
    raw = Fields(json.loads((directory / "layer_config.json").read_text()), directory)
    options = fla.gdn2(raw) | changed
    mixer = build(options.pop("mixer"), raw.integer("hidden_size"), options)
    mixer.load_state_dict(load_file(directory / "layer.safetensors"), strict=True)
    io = load_file(directory / "io.safetensors")
    x, y = (io[name] for name in sorted(io, key=lambda n: "out" in n))
    with torch.inference_mode():
        ours, _ = mixer(x.flatten(0, 1), Ragged([x.shape[1]] * x.shape[0]))
    return ours.view_as(y), y


def test_fla_layer_has_a_sigmoid_gate_and_doubles_only_the_erase_gate(shared: Path) -> None:
    directory = shared / "golden" / "checkpoints" / "fla_gdn2_layer_gva_negeig"
    ours, theirs = layer_outputs(directory)
    assert golden.error(ours, theirs) < golden.TOLERANCE
    for trap in ({"gate": "silu"}, {"erase_max": 1}):
        ours, theirs = layer_outputs(directory, **trap)
        assert golden.error(ours, theirs) > 1e-2, trap
