"""What the probe measures, against a plain loop over the tokens, and where the answer is known."""

import math

import numpy as np
import pytest
import torch

from evalsuite.backends import observing
from evalsuite.probe.measures import WORST, Follower, Tokens, effective_rank, half_life
from gdn2.errors import UserError
from gdn2.models import observe
from gdn2.ragged import Ragged

RECURRENT = ["gdn2", "gdn", "kda", "deltanet", "mamba2", "mamba3-siso", "mamba3-mimo"]
NEEDLE, VALUE, WINDOW = range(60, 70), [4, 5, 6], range(50, 100)
BLOCK = 64


def prompt(count=210):
    return np.random.default_rng(0).integers(1, 64, count).astype(np.int32)


def followed(backend, ids, block=BLOCK):
    """One Follower for each group of heads, after the whole prompt."""
    followers = None
    for start, groups in observing.pieces(backend, ids, block):
        followers = followers or [Follower(NEEDLE, VALUE, WINDOW) for _ in groups]
        for follower, tokens in zip(followers, groups, strict=True):
            follower.read(start, tokens)
            if (start + len(tokens.k)) % block == 0 or start + len(tokens.k) == len(ids):
                follower.close()
    return followers


class Brute:
    """The same quantities of one layer's one head from numpy loops over whole states: nothing is projected or cut."""

    def __init__(self, seen, head):
        rows = seen.rows.repeated(torch.float64)
        q, k, e, z, g = (None if x is None else x[:, head].numpy() for x in (rows.q, rows.k, rows.e, rows.z, rows.g))
        rank = rows.rank
        self.count = len(k) // rank
        states, decayed, erased = [np.zeros((k.shape[-1], z.shape[-1]))], [], []
        for t in range(self.count):
            at = range(t * rank, (t + 1) * rank)
            keep = np.ones(1) if g is None else np.exp(sum(g[i] for i in at))
            state = np.broadcast_to(np.atleast_1d(keep)[:, None], (k.shape[-1], 1)) * states[-1]
            decayed.append(state)
            minus = 0 if e is None else np.outer(k[at[0]], e[at[0]] @ state)
            erased.append(state - minus)
            states.append(state - minus + sum(np.outer(k[i], z[i]) for i in at))
        self.states, self.decayed, self.erased = np.array(states), decayed, erased
        self.keys = k[rank - 1 :: rank]
        self.rows_k, self.rank = k, rank
        self.write_norm = [np.linalg.norm(self.states[t + 1] - erased[t]) for t in range(self.count)]
        self.decay = None if g is None else -np.stack([g[i::rank] for i in range(rank)]).sum(0)  # [T, K] or [T]
        self.q, self.e = q[rank - 1 :: rank], e

    def overlap(self, state, p):
        """(S^T k_p) . r_p / |r_p|^2."""
        read = self.states[p + 1].T @ self.keys[p]
        return (state.T @ self.keys[p]) @ read / (read @ read)

    def retention(self, p, t):
        return self.overlap(self.states[t + 1], p)

    def survival(self, p):
        """k_p . x_t / |k_p|^2 after every token, and its changes by decay and erase."""
        x, key = self.keys[p], self.keys[p]
        out, parts = {p: 1.0}, {}
        for t in range(p + 1, self.count):
            decayed = x if self.decay is None else np.exp(-self.decay[t]) * x
            e = None if self.e is None else self.e[t]
            after = decayed if e is None else decayed - self.keys[t] * (e @ decayed)
            parts[t] = [key @ (b - a) / (key @ key) for a, b in ((x, decayed), (decayed, after))]
            x, out[t] = after, key @ after / (key @ key)
        return out, parts

    def change(self, p, t):
        """Decay, erase and write of token t > p."""
        steps = [self.overlap(s, p) for s in (self.states[t], self.decayed[t], self.erased[t], self.states[t + 1])]
        return np.diff(steps)

    def damage(self, t):
        """Mean erase and write of token t over the value's tokens."""
        changes = [self.change(p, t) if t > p else np.zeros(3) for p in (NEEDLE[n] for n in VALUE)]
        return np.mean(changes, 0)


@pytest.fixture(scope="module", params=RECURRENT)
def case(request, small):
    backend = small.make((request.param, request.param))
    backend.model.double()
    ids, seen = prompt(), []
    with torch.inference_mode(), observe(backend.model, seen.append):
        backend.model(torch.from_numpy(ids.astype(np.int64)), Ragged([len(ids)]))
    (follower,) = followed(backend, ids)
    brutes = [Brute(s, head) for s in seen for head in range(s.rows.z.shape[1])]
    return request.param, follower, brutes, seen


def test_retention_and_read_outs(case):
    _, follower, brutes, _ = case
    ends = [64, 128, 192, 210]
    assert len(follower.blocks) == len(ends)
    for g, brute in enumerate(brutes):
        for end, block in zip(ends, follower.blocks, strict=True):
            for n, p in enumerate(NEEDLE):
                got = block.retention[n, g].item()
                if p >= end:
                    assert math.isnan(got)
                else:
                    assert got == pytest.approx(brute.retention(p, end - 1), rel=1e-8)
        reads = [brute.states[p + 1].T @ brute.keys[p] for p in NEEDLE]
        assert follower.read_norm[:, g].tolist() == pytest.approx([np.linalg.norm(r) for r in reads], rel=1e-8)
        answer = brute.states[-1].T @ brute.q[-1]
        cosines = [answer @ r / np.linalg.norm(answer) / np.linalg.norm(r) for r in reads]
        assert follower.asked()[:, g].tolist() == pytest.approx(cosines, abs=1e-9)


def test_survival_of_the_write_alone(case):
    _, follower, brutes, _ = case
    for g, brute in enumerate(brutes):
        found = [brute.survival(p) for p in NEEDLE]
        for end, block in zip([64, 128, 192, 210], follower.blocks, strict=True):
            wanted = [out[end - 1] if end > p else math.nan for p, (out, _) in zip(NEEDLE, found, strict=True)]
            assert block.survival[:, g].tolist() == pytest.approx(wanted, rel=1e-8, nan_ok=True)
        lost = np.sum([part for n in VALUE for part in found[n][1].values()], 0) / len(VALUE)
        assert sum(block.loss[:2, g] for block in follower.blocks).tolist() == pytest.approx(lost, rel=1e-8)
        near = [part for n in VALUE for t, part in found[n][1].items() if t in WINDOW]
        total = np.sum(near, 0) / len(VALUE)
        assert sum(moment.loss[:2, g] for moment in follower.moments).tolist() == pytest.approx(total, rel=1e-8)
        assert not any(block.loss[2].any() for block in follower.blocks)


def test_changes_add_up_and_are_those_of_the_loop(case):
    name, follower, brutes, _ = case
    for g, brute in enumerate(brutes):
        found = np.array([block.change[:, g].tolist() for block in follower.blocks])
        for block, (begin, end) in zip(found, [(0, 64), (64, 128), (128, 192), (192, 210)], strict=True):
            assert block == pytest.approx(sum(brute.damage(t) for t in range(begin, end)), abs=1e-10)
        final = follower.blocks[-1].retention[VALUE, g].mean().item()
        assert 1 + found.sum() == pytest.approx(final, abs=1e-9)
    if name == "deltanet":
        assert not any(block.change[0].any() for block in follower.blocks)
    if name.startswith("mamba"):
        assert not any(block.change[1].any() for block in follower.blocks)


def test_moments_near_the_needle(case):
    _, follower, brutes, _ = case
    assert len(follower.moments) == len(WINDOW)
    for position, moment in zip(WINDOW, follower.moments, strict=True):
        for g, brute in enumerate(brutes):
            assert moment.norm[g].item() == pytest.approx(np.linalg.norm(brute.states[position + 1]), rel=1e-8)
            assert moment.change[:, g].tolist() == pytest.approx(brute.damage(position), abs=1e-10)
            rows = brute.rows_k[position * brute.rank : (position + 1) * brute.rank]
            written = [NEEDLE[n] for n in VALUE if NEEDLE[n] < position]
            pairs = [(k, brute.keys[p]) for p in written for k in rows]
            near = max((abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs), default=0.0)
            assert moment.overlap[g].item() == pytest.approx(near, rel=1e-8)
            kept = None if brute.decay is None else np.exp(-brute.decay[position]).mean()
            assert (moment.kept is None) == (kept is None)
            assert kept is None or moment.kept[g].item() == pytest.approx(kept, rel=1e-9)


def test_norm_rank_decay_and_gates_of_blocks(case):
    name, follower, brutes, seen = case
    for begin, end, block in [(0, 64, follower.blocks[0]), (192, 210, follower.blocks[3])]:
        for g, brute in enumerate(brutes):
            state = brute.states[end]
            assert block.norm[g].item() == pytest.approx(np.linalg.norm(state), rel=1e-8)
            share = np.linalg.svd(state, compute_uv=False)
            share = share[share > 0] / share.sum()
            assert block.rank[g].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-8)
            assert block.write_norm[g].item() == pytest.approx(np.mean(brute.write_norm[begin:end]), rel=1e-8)
            if brute.decay is None:
                assert block.half_life is None and block.half_life_max is None
                continue
            lives = np.log(2) / np.atleast_1d(brute.decay[begin:end].mean(0))
            assert block.half_life_max[g].item() == pytest.approx(lives.max(), rel=1e-8)
            assert block.half_life[g].item() == pytest.approx(np.sort(lives)[(len(lives) - 1) // 2], rel=1e-8)
        gates = [(s.erase, s.write) for s in seen]
        if name.startswith("mamba"):
            assert block.erase is None and block.write is None and gates == [(None, None)] * 2
        else:
            for got, index in ((block.erase, 0), (block.write, 1)):
                wanted = torch.cat([pair[index][begin:end].double().mean((0, 2)) for pair in gates])
                assert got.tolist() == pytest.approx(wanted.tolist(), rel=1e-8)


def test_the_models_own_states_agree(case):
    assert case[1].drift < 1e-10


def test_the_worst_writes_are_those_of_all_tokens_and_heads(case):
    _, follower, brutes, _ = case
    every = []
    for g, brute in enumerate(brutes):
        for t in range(NEEDLE[VALUE[0]] + 1, brute.count):
            _, erase, write = brute.damage(t)
            every.append((-(erase + write), t, g, erase, write))
    worst = [w for w in sorted(every, reverse=True) if w[0] > 1e-12][:WORST]
    for got, want in zip(follower.worst, worst, strict=True):
        assert (got.token, got.head) == want[1:3]
        assert (got.damage, got.erase, got.write) == pytest.approx((want[0], *want[3:]), rel=1e-7)


def test_pieces_equal_the_whole(small):
    for pattern in (("gdn2", "gdn2"), ("deltanet", "window", "mamba3-mimo", "gdn2")):
        backend = small.make(pattern)
        backend.model.double()
        fine, coarse = followed(backend, prompt(), 64), followed(backend, prompt(), 256)
        assert len(fine) == len(coarse) == len({p for p in pattern if p != "window"})
        for a, b in zip(fine, coarse, strict=True):
            assert len(b.blocks) == 1
            assert torch.allclose(a.blocks[-1].retention, b.blocks[-1].retention, rtol=1e-9, atol=1e-12)
            assert torch.allclose(sum(block.change for block in a.blocks), b.blocks[0].change, rtol=1e-8, atol=1e-11)
            assert torch.equal(a.blocks[-1].norm, b.blocks[-1].norm)
            assert [(w.token, w.head) for w in a.worst] == [(w.token, w.head) for w in b.worst]


def made(*, k, z, e=None, g=None, q=None):
    """A prompt in one head from its inputs: k, q, e [T, K], z [T, V], g [T, K or 1]; its last state is found here."""
    q = k if q is None else q
    q, k, z, e, g = (None if x is None else torch.as_tensor(x, dtype=torch.float64)[:, None] for x in (q, k, z, e, g))
    after = state = torch.zeros(1, k.shape[-1], z.shape[-1], dtype=torch.float64)
    for t in range(len(k)):
        after = after if g is None else g[t].exp()[..., None] * after
        written = z[t, :, None] if e is None else z[t, :, None] - e[t, :, None] @ after
        after = after + k[t][..., None] @ written
    rows = [None if x is None else x[:, None] for x in (k, e, z)]
    return Tokens(q, *rows, g, state, after, None, None)


def alone(tokens, needle=range(0, 1)):
    follower = Follower(needle, [0], range(0, len(tokens.k)))
    follower.read(0, tokens)
    follower.close()
    return follower


def unit(*places, width=8):
    return np.eye(width)[list(places)]


def test_one_write_then_pure_decay_has_the_decays_half_life():
    count, life = 41, 10.0
    z = np.zeros((count, 4))
    z[0] = 3, 1, -2, 0
    follower = alone(made(k=unit(*[0] * count), z=z, g=np.full((count, 1), -math.log(2) / life)))
    (block,) = follower.blocks
    assert block.half_life.tolist() == block.half_life_max.tolist() == pytest.approx([life])
    curve = 1 + torch.stack([moment.change[:, 0] for moment in follower.moments]).cumsum(0)[:, 0]
    assert curve[[10, 20, 30, 40]].tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert block.retention.item() == pytest.approx(1 / 16) == block.survival.item()
    assert block.change[:, 0].tolist() == pytest.approx([1 / 16 - 1, 0, 0]) and follower.worst == []
    assert follower.read_norm.item() == pytest.approx(math.sqrt(14))


def test_orthogonal_keys_do_not_interfere():
    k, z = unit(0, 1, 2, 3, 4, 5, 6, 7), np.random.default_rng(0).normal(size=(8, 4))
    follower = alone(made(k=k, z=z, e=k, q=unit(*[0] * 8)))
    (block,) = follower.blocks
    assert block.retention.item() == pytest.approx(1, abs=1e-14) and not block.change.any() and follower.worst == []
    assert all(moment.overlap.item() == 0 for moment in follower.moments)
    assert follower.asked().item() == pytest.approx(1)  # the last token's query is the first one's key
    assert block.rank.item() == pytest.approx(effective_rank(torch.as_tensor(k.T @ z)[None]).item())


def test_a_second_write_under_the_same_key_takes_the_place_of_the_first():
    k, z = unit(0, 1, 0, 2), np.array([[1.0, 0, 0], [0, 0, 5], [0, 2, 0], [0, 0, 7]])
    follower = alone(made(k=k, z=z, e=k))
    (block,), (worst,) = follower.blocks, follower.worst
    assert block.retention.item() == 0 and block.change[:, 0].tolist() == [0, -1, 0]
    assert worst == (1.0, 2, 0, -1.0, 0.0, 1.0)
    half = alone(made(k=k, z=z, e=k / 2))  # an erase gate of a half leaves half
    assert half.blocks[0].retention.item() == 0.5 and half.worst[0].damage == 0.5
    kept = alone(made(k=k, z=z))  # nothing is erased: the second stands beside the first
    assert kept.blocks[0].retention.item() == 1 and kept.worst == []
    again = alone(made(k=k, z=z[[0, 1, 0, 3]], e=k))  # the same value again: what is read stays, the first write goes
    assert again.blocks[0].retention.item() == 1 and again.blocks[0].survival.item() == 0
    assert again.blocks[0].change[:, 0].tolist() == [0, -1, 1] and again.worst == []


def test_what_reads_nothing_has_no_retention():
    follower = alone(made(k=unit(0, 1), z=np.array([[0.0, 0], [1, 1]])))
    assert math.isnan(follower.blocks[0].retention.item()) and follower.read_norm.item() == 0
    assert follower.worst == [] and follower.drift == 0


def test_half_life_and_effective_rank():
    assert half_life(torch.tensor([-math.log(2), 0.0, -math.inf])).tolist() == [1, math.inf, 0]
    assert effective_rank(torch.eye(5)[None]).item() == pytest.approx(5)
    assert effective_rank(torch.ones(1, 4, 6)).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(2, 4, 6)).tolist() == [0, 0]


def test_what_cannot_be_probed_is_refused_in_one_line(small):
    from evalsuite.backends import scripted

    with pytest.raises(UserError, match="model small is a transformer: it keeps no recurrent state"):
        observing.watchable(small.make(("window", "full")))
    with pytest.raises(UserError, match="scripted-perfect cannot be probed"):
        observing.watchable(scripted.load("scripted:perfect"))
    with pytest.raises(UserError, match="block 100 is not a multiple of 64 tokens"):
        next(observing.pieces(small.make(), prompt(), 100))


def test_a_piece_is_no_longer_for_a_longer_prompt(small):
    backend = small.make(("gdn2", "mamba2"))
    kept = []
    for count, block in ((300, 64), (5000, 1024)):
        followers, longest, begun = [Follower(NEEDLE, VALUE, WINDOW) for _ in range(2)], 0, []
        for start, groups in observing.pieces(backend, prompt(count), block):
            begun.append(start)
            longest = max(longest, *(len(tokens.k) for tokens in groups))
            for follower, tokens in zip(followers, groups, strict=True):
                follower.read(start, tokens)
        assert longest == min(block, observing.PIECE) and begun == list(range(0, count, longest))
        held = [x for f in followers for x in vars(f).values() if isinstance(x, torch.Tensor)]
        kept.append(sum(x.numel() for x in held))  # what goes from piece to piece
    assert kept[0] == kept[1]


def test_heads_are_named_in_the_order_of_the_pieces(small):
    backend = small.make(("gdn2", "window", "mamba2", "gdn2"))
    named = observing.heads(backend)
    assert [[(h.layer, h.mixer, h.head) for h in group] for group in named] == [
        [("0", "gdn2", 0), ("0", "gdn2", 1), ("3", "gdn2", 0), ("3", "gdn2", 1)],
        [("2", "mamba2", head) for head in range(4)],
    ]
    _, groups = next(observing.pieces(backend, prompt(), 64))
    assert [tokens.k.shape[2] for tokens in groups] == [4, 4]
