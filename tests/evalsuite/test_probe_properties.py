"""The probe on random heads: any mixer's shape, any needle, any cut of the prompt."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite.backends import observing
from evalsuite.backends.native import NativeBackend, describe
from evalsuite.probe.measures import Follower, Tokens
from gdn2.models import Decoder, ModelConfig

COUNT, HEADS, WIDTH, VALUES = 40, 2, 4, 3


def drawn(seed, rank, erases, decay):
    """Random inputs of HEADS heads for COUNT tokens: everything a `Tokens` needs but the states."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    k = torch.nn.functional.normalize(normal(COUNT, rank, HEADS, WIDTH), dim=-1)
    e = torch.rand(k.shape, generator=rng, dtype=torch.float64) * k if erases else None
    g = None if decay == "none" else -0.2 * normal(COUNT, HEADS, WIDTH if decay == "channel" else 1).abs()
    return normal(COUNT, HEADS, WIDTH), k, e, normal(COUNT, rank, HEADS, VALUES), g


def states(k, e, z, g):
    """All COUNT + 1 states."""
    state = torch.zeros(HEADS, WIDTH, VALUES, dtype=torch.float64)
    found = [state]
    for t in range(COUNT):
        kept = state if g is None else g[t].exp()[..., None] * state
        state = kept if e is None else kept - torch.einsum("hk,hl,hlv->hkv", k[t, 0], e[t, 0], kept)
        state = state + torch.einsum("rhk,rhv->hkv", k[t], z[t])
        found.append(state)
    return found


def cut(inputs, found, bounds):
    """The prompt in pieces that end at `bounds`."""
    begin = 0
    for end in bounds:
        parts = [None if x is None else x[begin:end] for x in inputs]
        yield begin, Tokens(*parts, found[begin], found[end], None, None)
        begin = end


@st.composite
def cases(draw):
    rank = draw(st.sampled_from([1, 1, 2, 4]))
    inputs = drawn(
        draw(st.integers(0, 10**6)),
        rank,
        rank == 1 and draw(st.booleans()),
        draw(st.sampled_from(["none", "head", "channel"])),
    )
    start = draw(st.integers(0, COUNT - 1))
    needle = range(start, draw(st.integers(start + 1, min(start + 6, COUNT))))
    value = sorted(draw(st.sets(st.integers(0, len(needle) - 1), min_size=1)))
    window = range(max(0, start - draw(st.integers(0, 9))), min(COUNT, needle.stop + draw(st.integers(0, 9))))
    bounds = sorted({*draw(st.sets(st.integers(1, COUNT - 1), max_size=5)), COUNT})
    return inputs, needle, value, window, bounds


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_needle_in_any_pieces(case):
    inputs, needle, value, window, bounds = case
    q, k, e, z, g = inputs
    found = states(k, e, z, g)
    follower = Follower(needle, value, window)
    for start, piece in cut(inputs, found, bounds):
        follower.read(start, piece)
        follower.close()
    for end, block in zip(bounds, follower.blocks, strict=True):
        for n, p in enumerate(needle):
            key = k[p, -1]
            read = torch.einsum("hkv,hk->hv", found[p + 1], key)
            now = torch.einsum("hkv,hk,hv->h", found[end], key, read) / (read * read).sum(-1)
            if end <= p:
                assert block.retention[n].isnan().all() and block.survival[n].isnan().all()
            else:
                assert torch.allclose(block.retention[n], now, rtol=1e-6, atol=1e-8)
        assert torch.allclose(block.norm, found[end].flatten(1).norm(dim=1))
    total = sum(block.change for block in follower.blocks)  # [3, G]
    last = follower.blocks[-1]
    assert torch.allclose(1 + total.sum(0), last.retention[value].mean(0), atol=1e-8)
    assert torch.allclose(1 + sum(b.loss for b in follower.blocks).sum(0), last.survival[value].mean(0), atol=1e-8)
    assert len(follower.moments) == len(window) and follower.drift < 1e-6
    inside = [block.change for end, block in zip(bounds, follower.blocks, strict=True) if end <= window.stop]
    if inside and bounds[len(inside) - 1] == window.stop:  # the window holds every change up to there
        assert torch.allclose(sum(m.change for m in follower.moments), sum(inside), atol=1e-8)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_the_cut_changes_nothing(case):
    inputs, needle, value, window, bounds = case
    found = states(*inputs[1:])
    followers = []
    for where in (bounds, [COUNT]):
        follower = Follower(needle, value, window)
        for start, piece in cut(inputs, found, where):
            follower.read(start, piece)
        follower.close()
        followers.append(follower)
    (pieces,), (whole,) = (f.blocks for f in followers)
    for a, b in zip(pieces, whole, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-7, atol=1e-9, equal_nan=True))
    assert torch.allclose(followers[0].asked(), followers[1].asked(), equal_nan=True)
    assert [(w.token, w.head) for w in followers[0].worst] == [(w.token, w.head) for w in followers[1].worst]
    for a, b in zip(followers[0].moments, followers[1].moments, strict=True):
        assert torch.allclose(a.norm, b.norm) and torch.allclose(a.change, b.change, atol=1e-9)


def backend(options, letters, dtype=torch.float32):
    config = ModelConfig(16, 64, ("x",), {"x": options}, 32)
    model = Decoder(config)
    model.reset_parameters(seed=5)
    model.eval().requires_grad_(False).cast(dtype)
    return NativeBackend(model, letters, describe(model, "small", "0" * 64, letters))


def follow(one, needle=range(20, 24)):
    ids = np.random.default_rng(0).integers(1, 64, 100).astype(np.int32)
    follower = None
    for start, (tokens,) in observing.pieces(one, ids, 64):
        follower = follower or Follower(needle, [2, 3], range(10, 40))
        follower.read(start, tokens)
        follower.close()
    return follower


@pytest.mark.parametrize("mixer", ["gdn2", "kda", "gdn"])
def test_value_heads_that_share_keys_are_heads_of_their_own(small, mixer):
    options = {"mixer": mixer, "n_heads": 2, "n_value_heads": 4, "d_key": 8, "d_value": 8}
    one = backend(options, small.Letters())
    ((named),) = observing.heads(one)
    assert [h.head for h in named] == [0, 1, 2, 3]
    follower = follow(one)
    last = follower.blocks[-1]
    assert last.retention.shape == (4, 4) and last.erase.shape == last.write.shape == (4,)
    if mixer == "gdn2":  # erase and decay are the key heads', two value heads each
        assert last.erase[0] == last.erase[1] != last.erase[2] == last.erase[3]
        assert last.half_life[0] == last.half_life[1]
        assert torch.allclose(last.survival[:, 0], last.survival[:, 1])  # what is left depends on keys alone
        assert not torch.allclose(last.retention[:, 0], last.retention[:, 1])


def test_gates_up_to_two_and_gates_averaged_are_told_as_they_are(small):
    base = {"mixer": "gdn2", "n_heads": 2, "d_key": 8, "d_value": 8}
    single, double, tied = (
        follow(backend(base | more, small.Letters())).blocks[0].erase
        for more in ({}, {"erase_max": 2}, {"scalar_erase": True, "scalar_write": True})
    )
    assert torch.allclose(double, 2 * single) and torch.allclose(tied, single)


def test_half_precision_is_followed_as_it_was_computed(small):
    one = backend({"mixer": "gdn2", "n_heads": 2, "d_key": 8, "d_value": 8}, small.Letters(), torch.bfloat16)
    follower = follow(one)
    assert 0 <= follower.drift < 1e-4  # the state is fp32, from the same bf16 inputs
    assert all(math.isfinite(x) for x in follower.blocks[-1].retention.flatten().tolist())


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_numbers(small):
    found = []
    for device in ("cpu", "cuda"):
        one = backend({"mixer": "gdn2", "n_heads": 2, "d_key": 8, "d_value": 8}, small.Letters())
        one.model.to(device)
        one.device = torch.device(device)
        found.append(follow(one))
    for a, b in zip(found[0].blocks, found[1].blocks, strict=True):
        assert torch.allclose(a.retention, b.retention, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert torch.allclose(a.rank, b.rank, rtol=1e-3)
