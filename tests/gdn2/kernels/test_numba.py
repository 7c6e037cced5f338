"""The compiled CPU loops: as exact as torch in the same precision, and no number depends on its neighbours."""

import math

import pytest
import torch
from torch.nn import functional as F

from gdn2 import numerics
from gdn2.kernels import choose, delta_rule, delta_step, numba
from gdn2.kernels.layer import Gates, Raw, fold_gates, gated_norm
from gdn2.mixers.conv import ShortConv, short_conv
from gdn2.ragged import Ragged
from tests.gdn2.kernels.oracle import EXTREME, Case, allowed, assert_close, draw, run
from tests.gdn2.kernels.test_operator import VARIANTS

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", [*VARIANTS.values(), Case(90, gates=EXTREME)], ids=[*VARIANTS, "extreme decays"])
def test_it_errs_no_more_than_torch(case):
    exact = run(draw(case), "reference")
    inputs = draw(case).to(torch.float32)
    assert_close(run(inputs, "numba"), exact, allowed(inputs, exact))


def test_half_precision_is_rounded_once():
    case = Case(70, heads=2, value_heads=4)
    inputs = draw(case).to(torch.bfloat16)
    assert_close(run(inputs, "numba"), run(draw(case), "reference"), allowed(inputs, run(draw(case), "reference")))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_cut_anywhere_and_any_company_change_no_bit(threads, monkeypatch):
    monkeypatch.setattr(numba, "SHARED_WORK", 0)
    x = draw(Case(50, heads=2, value_heads=4, value=20)).to(torch.float32).tensors
    rows = {name: x[name] for name in "qkezg"}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, last = delta_rule(**rows, state=x["state"], implementation="numba")
        for cut in (1, 17, 49):
            front, middle = delta_rule(**{n: t[:, :cut] for n, t in rows.items()}, state=x["state"])
            back, end = delta_rule(**{n: t[:, cut:] for n, t in rows.items()}, state=middle)
            assert torch.equal(torch.cat([front, back], 1), whole) and torch.equal(end, last)
        twice = {name: torch.cat([t[:, :7], t], 1) for name, t in rows.items()}
        packed, _ = delta_rule(**twice, state=torch.cat([x["state"]] * 2), cu_seqlens=[0, 7, 57])
        assert torch.equal(packed[:, 7:], whole) and torch.equal(packed[:, :7], whole[:, :7])
        state = x["state"].clone()
        stepped = [delta_step(**{n: t[0, i : i + 1] for n, t in rows.items()}, state=state) for i in range(50)]
        assert torch.equal(torch.cat(stepped)[None], whole) and torch.equal(state, last)
    finally:
        torch.set_num_threads(before)


def test_slots_choose_states_and_an_idle_row_is_zero():
    x = draw(Case(3, heads=2, value_heads=2)).to(torch.float32).tensors
    rows = {name: x[name][0] for name in "qkezg"}
    pool = torch.randn(5, 2, 16, 16)
    want = pool.clone()
    alone = delta_step(**rows, state=(picked := pool[[4, 0, 2]]))
    o = delta_step(**rows, state=pool, slots=torch.tensor([4, -1, 2]))
    assert torch.equal(o[[0, 2]], alone[[0, 2]]) and not o[1].any()
    want[[4, 2]] = picked[[0, 2]]
    assert torch.equal(pool, want)


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_and_their_windows(taps, bias):
    ragged = Ragged([5, 0, 1, 30, 2])
    conv = ShortConv(37, taps, bias)
    torch.nn.init.normal_(conv.weight)
    x, window = torch.randn(38, 37), torch.randn(5, 37, taps - 1)
    y, after = conv(x, window, ragged)
    exact = None if conv.bias is None else conv.bias.double()
    want, want_after = short_conv(x.double(), conv.weight[:, 0].double(), exact, window.double(), ragged)
    assert (y - want).abs().max() < 3e-6 and torch.equal(after.double(), want_after)
    moved = window[3:4].clone()
    steps = torch.cat([conv.step(x[6 + t : 7 + t], moved) for t in range(30)])
    assert torch.equal(steps, y[6:36]) and torch.equal(moved, after[3:4])


def raw(tokens, tied):
    def draw(*shape):
        return 6 * torch.rand(tokens, *shape) - 3

    b, w = (draw(4), None) if tied else (draw(2, 12), draw(4, 20))
    return Raw(draw(2, 12), draw(2, 12), draw(4, 20), b, w, draw(2, 12), torch.rand(2), torch.randn(24))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bound", [None, -5.0])
def test_gates_and_norms(tied, bound):
    x, gates = raw(33, tied), Gates(0.3, 2.0, bound)
    exact = Raw(*(None if t is None else t.double() for t in x))
    for got, want in zip(fold_gates(x, gates, "numba"), fold_gates(exact, gates, "torch"), strict=True):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()
    gate, weight = torch.randn_like(x.v), torch.randn(20)
    for kind in ("silu", "sigmoid"):
        want = gated_norm(x.v.double(), gate.double(), weight.double(), 1e-5, kind, "torch")
        assert (gated_norm(x.v, gate, weight, 1e-5, kind, "numba") - want).abs().max() < 1e-5


def test_elementwise_functions_are_exact_to_rounding_and_keep_what_is_not_finite():
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -1e-8, 88.5, -88.5, -17.0, -30.0])])
    for ours, theirs in ((numerics.sigmoid, torch.sigmoid), (numerics.silu, F.silu), (numerics.softplus, F.softplus)):
        want = theirs(x.double())
        assert ((ours(x) - want).abs() <= 4e-7 * want.abs() + 1e-36).all(), theirs
        odd = ours(torch.tensor([math.nan, math.inf, 1.0]))
        assert odd.isnan().tolist() == [True, False, False]
    y = torch.randn(9, 37)
    assert (numerics.silu_times(y, y) - F.silu(y.double()) * y).abs().max() < 1e-5
    weight = torch.randn(37)
    want = F.rms_norm(y.double(), (37,), weight.double(), 1e-5)
    assert (numerics.rms_norm(y, weight, 1e-5) - want).abs().max() < 1e-5
    assert torch.equal(numerics.rms_norm(y[4:5], weight, 1e-5), numerics.rms_norm(y, weight, 1e-5)[4:5])


def test_it_serves_inference_on_a_cpu_and_says_so_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))  # also where there is no GPU to ask
    assert choose(torch.device("cpu")) == "numba" and choose(torch.device("cuda")) != "numba"
    with torch.enable_grad():
        assert choose(torch.device("cpu")) == "torch"
        with pytest.raises(ValueError, match="numba has no gradients"):
            choose(torch.device("cpu"), "numba")
    with pytest.raises(ValueError, match="needs a CPU"):
        choose(torch.device("cuda"), "numba")


def equation(inputs):
    """The operator in fp64, row by row and head by head, as the definition has it."""
    x = {name: t if t is None else t.double() for name, t in inputs.tensors.items()}
    q, k, z, state = x["q"][0], x["k"][0], x["z"][0], x["state"].clone()
    tokens, heads = z.shape[:2]
    o = torch.zeros_like(z)
    bounds = [0, tokens] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    for n, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for h in range(heads):
            s = state[n, h]
            for t in range(first, last):
                key = h * q.shape[1] // heads
                if x["g"] is not None:
                    g = x["g"][0, t, h * x["g"].shape[2] // heads].exp()
                    s = s * (g[:, None] if g.ndim else g)
                kept = z[t, h]
                if x["e"] is not None:
                    kept = kept - s.T @ x["e"][0, t, h * x["e"].shape[2] // heads]
                s = s + torch.outer(k[t, key], kept)
                o[t, h] = s.T @ q[t, key]
            state[n, h] = s
    return o, state


@pytest.mark.parametrize("key", [1, 5, 16, 33])
@pytest.mark.parametrize("value", [1, 15, 64, 70])
def test_every_width_is_the_equation(key, value):
    for decay, erase in (("channel", True), ("head", True), ("none", True), ("head", False)):
        case = Case(21, 2, 4, key, value, decay=decay, erase=erase, lengths=(4, 0, 17), seed=key * value)
        inputs = draw(case)
        want, last = equation(inputs)
        found = run(inputs.to(torch.float32), "numba")
        assert (found["o"][0] - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(1)
        assert (found["last"] - last).abs().max() <= 1e-5 * last.abs().max().clamp_min(1)


def test_a_bad_value_stays_in_its_sequence_and_head():
    case = Case(40, heads=2, value_heads=2, lengths=(20, 20))
    inputs = draw(case).to(torch.float32)
    clean = run(inputs, "numba")
    inputs.tensors["k"][0, 5, 0, 3] = math.nan
    found = run(inputs, "numba")
    assert found["o"][0, 5:20, 0].isnan().all() and found["last"][0, 0].isnan().any()
    for name in ("o", "last"):
        ok = ~found[name].isnan()
        assert torch.equal(found[name][ok], clean[name][ok])
    assert not found["o"][0, :5].isnan().any() and not found["o"][0, 20:].isnan().any()
    assert not found["o"][0, :, 1].isnan().any()


def test_inputs_are_left_as_they_are_and_need_not_be_contiguous():
    inputs = draw(Case(30, heads=2, value_heads=4)).to(torch.float32)
    want = run(inputs, "numba")
    copies = {name: t if t is None else t.clone() for name, t in inputs.tensors.items()}
    run(inputs, "numba")
    for name, t in inputs.tensors.items():
        assert t is None or torch.equal(t, copies[name]), name
        if t is not None:
            apart = torch.stack([t, t], dim=-1)[..., 0]
            assert not apart.is_contiguous()
            inputs.tensors[name] = apart
    found = run(inputs, "numba")
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_pool_in_another_layout_moves_on_too():
    x = draw(Case(3, heads=2, value_heads=2)).to(torch.float32).tensors
    rows = {name: x[name][0] for name in "qkezg"}
    plain = torch.randn(3, 2, 16, 16)
    odd = torch.stack([plain, plain], -1)[..., 0]
    want = delta_step(**rows, state=plain)
    assert torch.equal(delta_step(**rows, state=odd), want) and torch.equal(odd, plain)


def test_large_calls_are_shared_between_threads_and_small_ones_are_not(monkeypatch):
    calls = []

    def loop(x, begin, end):
        calls.append((begin, end))
        x[begin:end] += 1

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.zeros(7)
        numba._run(loop, (x,), 7, numba.SHARED_WORK)
        assert sorted(calls) == [(0, 3), (3, 7)] and torch.equal(x, torch.ones(7))
        calls.clear()
        numba._run(loop, (x,), 7, numba.SHARED_WORK - 1)
        assert calls == [(0, 7)]
    finally:
        torch.set_num_threads(before)


def test_without_numba_torch_serves(monkeypatch):
    monkeypatch.setattr(numba, "available", lambda: False)
    assert choose(torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="numba installed"):
        choose(torch.device("cpu"), "numba")
    x = torch.randn(5, 7)
    assert (numerics.silu(x) - F.silu(x)).abs().max() < 1e-6
    assert (numerics.silu_times(x, x) - F.silu(x) * x).abs().max() < 1e-6


@pytest.mark.parametrize("width", [16, 20])
def test_one_query_over_a_cache(width):
    """Against the definition in fp64, for caches filled to different lengths and several queries a key head."""
    q, k = torch.randn(3, 2, 4, width), torch.randn(3, 2, 9, width)
    v, filled = torch.randn(3, 2, 9, 7), torch.tensor([1, 9, 4])
    found = numba.attend_cached(q, k, v, filled)
    assert found.shape == (3, 2, 4, 7)
    for n, count in enumerate(filled.tolist()):
        scores = q[n].double() @ k[n, :, :count].double().mT * width**-0.5
        want = scores.softmax(-1) @ v[n, :, :count].double()
        assert (found[n] - want).abs().max() < 1e-5
        assert torch.equal(
            numba.attend_cached(q[n : n + 1], k[n : n + 1], v[n : n + 1], filled[n : n + 1])[0], found[n]
        )


def test_weights_of_visible_keys_in_two_parts():
    scores, values = 9 * torch.randn(5, 12), torch.randn(12, 3)
    firsts, lasts = torch.tensor([0, 3, 6, 0, 11]), torch.tensor([1, 9, 12, 5, 12])
    top, total, sums = torch.full((5,), -1e30), torch.zeros(5), torch.zeros(5, 3)
    for low, high in ((0, 7), (7, 12)):
        part = scores[:, low:high].contiguous()
        begin, end = ((x - low).clamp(0, high - low) for x in (firsts, lasts))
        shrink = numba.attend(part, begin, end, top, total)
        sums = sums * shrink[:, None] + part @ values[low:high]
    for row, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
        want = scores[row, first:last].double().softmax(-1) @ values[first:last].double()
        assert (sums[row] / total[row] - want).abs().max() < 1e-5
    assert part[0].abs().max() == 0  # nothing of the second part is visible to the first row
