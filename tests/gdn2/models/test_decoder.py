"""The decoder over every tiny model: one answer in any batch, in pieces, by decoding; norms and residual as told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn2.models import Decoder, ModelConfig, State, preset
from gdn2.models.presets import SCALES
from gdn2.numerics import rms_norm
from gdn2.ragged import Ragged

TINY = [f"{model}-tiny" for model in SCALES["tiny"].d_ff]


def tiny(name: str, **changes: object) -> Decoder:
    model = Decoder(replace(preset(name), **changes))  # type: ignore[arg-type]
    model.reset_parameters(seed=1)
    return model.eval()


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2048, (count,), generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_sequence_is_read_alike_alone_packed_in_pieces_and_by_decoding(name: str) -> None:
    model, lengths = tiny(name), (3, 330, 0, 64)
    ids, ragged = words(sum(lengths)), Ragged(lengths)
    packed, state = model(ids, ragged)
    mine = packed[3:333]
    alone, last = model(ids[3:333], Ragged([330]))
    assert torch.equal(mine, alone)
    first, middle = model(ids[3 : 3 + 256], Ragged([256]))
    second, end = model(ids[3 + 256 : 333], Ragged([74]), middle)
    assert torch.equal(torch.cat([first, second]), alone)
    for a, b, c in zip(state.select([1]).layers, last.layers, end.layers, strict=True):
        assert all(torch.equal(a[key], b[key]) and torch.equal(b[key], c[key]) for key in a)
    _, begun = model(ids[3:303], Ragged([300]))
    pool = State.concat([model.new_state(1), begun])
    for t in range(30):
        hidden = model.step(torch.stack([ids[t], ids[303 + t]]), pool)
        assert relative(hidden[1], alone[300 + t]) < 2e-5
    assert pool.seen.tolist() == [30, 330]


def taught(model: Decoder) -> tuple[list[Tensor], int]:
    """Every gradient, and how many bytes the forward pass kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids, ragged = words(90), Ragged([70, 20])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = model(ids, ragged)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    (hidden.square() * words(90 * 128, seed=2).view(90, 128)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return gradients, sum(size for where, size in kept.items() if where not in weights)


@pytest.mark.parametrize("name", TINY)
def test_layers_run_again_to_the_same_gradients(name: str) -> None:
    plain, again = tiny(name), tiny(name)
    again.recompute = True
    (expected, whole), (found, inputs) = taught(plain), taught(again)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert inputs < whole / 5


@pytest.mark.parametrize("name", ["gdn2-hybrid-tiny", "mamba3-mimo-tiny", "transformer-tiny"])
def test_every_parameter_learns(name: str) -> None:
    model = tiny(name)
    hidden, _ = model(words(60), Ragged([40, 20]))
    loss = torch.nn.functional.cross_entropy(model.logits(hidden), words(60, seed=1))
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_same_seed_same_model() -> None:
    one, two, other = tiny("kda-tiny"), tiny("kda-tiny"), Decoder(preset("kda-tiny"))
    other.reset_parameters(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)


@torch.no_grad()
def test_norms_after_the_layer_where_told() -> None:
    config = ModelConfig(
        d_model=128, vocab_size=64, d_ff=64, pattern=("a", "b"), post_norm=("b",),
        mixers={name: {"mixer": "attention", "n_heads": n, "d_head": 32} for name, n in (("a", 2), ("b", 4))},
    )  # fmt: skip
    model = Decoder(config)
    model.reset_parameters(seed=0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 2)
    ids, ragged = words(20) % 64, Ragged([20])
    x = model.embed(ids)
    for layer, after in zip(model.blocks(), (False, True), strict=True):
        norms = [lambda y, w=norm.weight: rms_norm(y, w, 1e-5) for norm in (layer.mixer_norm, layer.mlp_norm)]
        for norm, sublayer in zip(norms, (lambda y, m=layer.mixer: m(y, ragged)[0], layer.mlp), strict=True):
            x = x + (norm(sublayer(x)) if after else sublayer(norm(x)))
    want = rms_norm(x, model.norm.weight, 1e-5)
    assert torch.equal(model(ids, ragged)[0], want)
    other = Decoder(replace(config, post_norm=()))
    other.load_state_dict(model.state_dict())
    assert relative(other(ids, ragged)[0], want) > 0.01


@torch.no_grad()
def test_an_fp32_residual_loses_less() -> None:
    ids, ragged = words(100), Ragged([100])
    exact = tiny("mamba2-tiny")(ids, ragged)[0]
    errors = []
    for fp32 in (True, False):
        model = tiny("mamba2-tiny", residual_fp32=fp32).cast(torch.bfloat16)
        hidden, state = model(ids, ragged)
        assert hidden.dtype == torch.bfloat16
        assert model.step(ids[:1], state).dtype == torch.bfloat16
        assert model.blocks()[0].mixer_input(model._embedded(ids)).dtype == torch.bfloat16
        errors.append(relative(hidden, exact))
    assert errors[0] < errors[1]


@torch.no_grad()
def test_without_an_mlp_a_layer_is_its_mixer() -> None:
    model = tiny("mamba2-tiny", d_ff=None)
    layer = model.blocks()[0]
    x = model.embed(words(10))
    y = layer.mixer(layer.mixer_input(x), Ragged([10]))[0]
    assert torch.equal(layer.add(x, y), x + y)


def test_packed_ids_must_fit_their_boundaries() -> None:
    with pytest.raises(ValueError, match="ids must be the 7 packed tokens of the batch, got \\[6\\]"):
        tiny("gdn-tiny")(words(6), Ragged([3, 4]))
