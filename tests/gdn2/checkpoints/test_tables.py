"""The pieces a format's table is made of: each is its own inverse, and a table that does not fit says so."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from gdn2.checkpoints.sources import SafetensorsSource
from gdn2.checkpoints.tables import Entry, LayerNames, Table, around_one, on_meta, rows, rows_of, scaled
from gdn2.errors import CheckpointError
from gdn2.models import Decoder, ModelConfig

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
CONFIG = ModelConfig(
    d_model=16, vocab_size=32, pattern=("a",), d_ff=32, tied=True,
    mixers={"a": {"mixer": "gdn2", "n_heads": 1, "d_key": 16, "d_value": 16}},
)  # fmt: skip


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(deadline=None)
@given(SIZES)
def test_rows_below_each_other_are_split_and_joined(sizes: list[int]) -> None:
    entry = rows("theirs", [f"ours{i}" for i in range(len(sizes))], sizes)
    whole = drawn(sum(sizes), 3)
    parts = entry.load(whole)
    assert [len(part) for part in parts] == sizes and torch.equal(parts[0], whole[: sizes[0]])
    assert torch.equal(entry.save(*parts)[0], whole)
    assert entry.save(*(part.to("meta") for part in parts))[0].shape == whole.shape


@settings(deadline=None)
@given(SIZES, st.lists(st.sampled_from([0.25, 0.5, 2.0, 8.0]), min_size=4, max_size=4))
def test_rows_are_multiplied_and_divided_by_their_own_factor(sizes: list[int], factors: list[float]) -> None:
    factors = factors[: len(sizes)]
    entry = rows_of("theirs", "ours", sizes, factors)
    whole = drawn(sum(sizes), 2)
    (got,) = entry.load(whole)
    by = torch.repeat_interleave(torch.tensor(factors), torch.tensor(sizes))[:, None]
    assert torch.equal(got, whole * by) and torch.equal(entry.save(got)[0], whole)  # powers of two: exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiplier_is_part_of_the_weight(dtype: torch.dtype) -> None:
    tensor = drawn(4, 3).to(dtype)
    (got,) = scaled("t", "o", 0.375).load(tensor)
    assert got.dtype == dtype and torch.equal(got, (tensor.float() * 0.375).to(dtype))
    (back,) = scaled("t", "o", 0.375).save(got)
    assert (back.float() - tensor.float()).abs().max() <= torch.finfo(dtype).eps * tensor.float().abs().max()
    assert scaled("t", "o", 1).load(tensor)[0] is tensor and scaled("t", "o", 1.0).save(tensor)[0] is tensor


def test_a_norm_weight_may_be_stored_around_one() -> None:
    stored = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.bfloat16)
    (weight,) = around_one("t", "o").load(stored)
    assert weight.tolist() == [0.0, 1.0, 1.5] and weight.dtype == torch.float32
    assert around_one("t", "o").save(weight)[0].tolist() == stored.tolist()


def test_prefixes_go_before_every_name() -> None:
    moved = rows("qkv", ["q", "k"], [1, 1]).under("model.layers.3.attn.", "layers.3.mixer.")
    assert moved.theirs == ("model.layers.3.attn.qkv",)
    assert moved.ours == ("layers.3.mixer.q", "layers.3.mixer.k")
    assert len(moved.load(drawn(2, 2))) == 2


def test_names_of_a_layer_are_exact_then_by_their_beginning() -> None:
    names = LayerNames("blk.1.", {"norm.weight": "ln", "mixer.*": "attn.", "mixer.q.weight": "attn.wq"})
    assert names.theirs("norm.weight") == "blk.1.ln"
    assert names.theirs("mixer.q.weight") == "blk.1.attn.wq"  # said by itself
    assert names.theirs("mixer.k.weight") == "blk.1.attn.k.weight"
    with pytest.raises(ValueError, match="no name for parameter ffn.up in this format"):
        names.theirs("ffn.up")


@pytest.fixture
def model() -> Decoder:
    made = Decoder(CONFIG)
    made.reset_parameters(seed=1)
    return made


def identity(model: Decoder, skip: Sequence[str] = ()) -> list[Entry]:
    return [Entry((f"x.{name}",), (name,)) for name, _ in model.named_parameters() if name not in skip]


def stored(path: Path, tensors: dict[str, Tensor], stack: ExitStack) -> SafetensorsSource:
    save_file(tensors, path)
    return SafetensorsSource(path, (path,), stack)


def test_a_table_goes_both_ways(model: Decoder, tmp_path: Path) -> None:
    table = Table(identity(model))
    tensors = table.save(model)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == table.shapes(on_meta(CONFIG, "here"))
    with ExitStack() as stack:
        fresh = on_meta(CONFIG, "here")
        table.load(stored(tmp_path / "x.safetensors", tensors, stack), fresh, "cpu")
    for (name, new), (_, old) in zip(fresh.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(new, old) and not new.requires_grad, name
    # What was written is not a view of the model.
    next(iter(tensors.values())).zero_()
    assert all(p.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


def test_what_is_missing_and_what_is_too_much_are_both_told(model: Decoder, tmp_path: Path) -> None:
    table = Table(identity(model), ignored=frozenset({"rotary", "old.*"}))
    tensors = table.save(model)
    first = next(iter(tensors))
    with ExitStack() as stack:
        more = {**tensors, "rotary": drawn(2), "old.a": drawn(2), "old.b.c": drawn(2), "older": drawn(2)}
        del more[first]
        source = stored(tmp_path / "x.safetensors", more, stack)
        told = table.check(source, on_meta(CONFIG, "here"))
        assert len(told) == 2 and any(first in line for line in told) and any("older" in line for line in told)
        with pytest.raises(CheckpointError, match="x.safetensors"):
            table.load(source, on_meta(CONFIG, "here"), "cpu")


def test_a_second_copy_of_a_tied_head_must_be_the_same(model: Decoder, tmp_path: Path) -> None:
    table = Table(identity(model), copies={"head": "x.embed.weight"})
    tensors = table.save(model)
    for head, good in ((tensors["x.embed.weight"].clone(), True), (tensors["x.embed.weight"] + 1, False)):
        with ExitStack() as stack:
            source = stored(tmp_path / f"{good}.safetensors", {**tensors, "head": head}, stack)
            if good:
                table.load(source, on_meta(CONFIG, "here"), "cpu")
                continue
            with pytest.raises(CheckpointError, match="head differs from x.embed.weight, which the configuration ties"):
                table.load(source, on_meta(CONFIG, "here"), "cpu")


def test_an_audit_sees_the_source_before_anything_is_loaded(model: Decoder, tmp_path: Path) -> None:
    def refuse(source: SafetensorsSource) -> None:
        raise CheckpointError(f"{source.where.name} holds what nobody serves")

    table = Table(identity(model), audit=refuse)
    with ExitStack() as stack:
        source = stored(tmp_path / "x.safetensors", table.save(model), stack)
        fresh = on_meta(CONFIG, "here")
        with pytest.raises(CheckpointError, match="x.safetensors holds what nobody serves"):
            table.load(source, fresh, "cpu")
    assert all(p.is_meta for p in fresh.parameters())


def test_an_entry_that_makes_another_shape_is_our_mistake(model: Decoder, tmp_path: Path) -> None:
    name = "embed.weight"
    wrong = Entry((f"x.{name}",), (name,), load=lambda t: (t[:1],))
    table = Table([*identity(model, skip=[name]), wrong])
    with ExitStack() as stack:
        source = stored(tmp_path / "x.safetensors", table.save(model), stack)
        with pytest.raises(ValueError, match=r"embed.weight came out as \[1, 16\], not \[32, 16\]"):
            table.load(source, on_meta(CONFIG, "here"), "cpu")


def test_sizes_beyond_any_memory_are_refused_by_name() -> None:
    wide = {**CONFIG.to_dict(), "mixers": {"a": {**CONFIG.mixers["a"], "d_key": 1 << 60}}}
    with pytest.raises(CheckpointError, match="^there: "):
        on_meta(ModelConfig.from_dict(wide), "there")
    with pytest.raises(ValueError, match="d_model must be an integer from 1 to 131072"):
        ModelConfig.from_dict({**CONFIG.to_dict(), "d_model": 131073})
