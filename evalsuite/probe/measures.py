"""What became of a needle in a recurrent state, from the operator's inputs, token by token in fp64.

For the needle's token p with key k_p let r_p = S_p^T k_p be what its key reads right after it was written. Its
retention after token t is the normalised overlap

    rho_p(t) = (S_t^T k_p) . r_p / |r_p|^2,     rho_p(p) = 1,

and the operator's S_t = D_t S_{t-1} - k_t (e_t^T D_t S_{t-1}) + k_t z_t^T splits each of its changes exactly:

    decay   k_p^T (D_t - 1) S_{t-1} r_p / |r_p|^2
    erase   -(k_p . k_t) (e_t^T D_t S_{t-1} r_p) / |r_p|^2
    write   +(k_p . k_t) (z_t . r_p) / |r_p|^2

The last two are interference: nothing where the later key is orthogonal to k_p. Later writes may also add to what r_p
says (a haystack that repeats itself refills it), so the write's own share is followed apart: what is left of k_p z_p^T
is x_t z_p^T with x_p = k_p and x_t = (1 - k_t e_t^T) D_t x_{t-1}, and its survival

    sigma_p(t) = k_p . x_t / |k_p|^2,           sigma_p(p) = 1,

is lost to decay and to erasing alone. Only x_t and u_p = S_t r_p / |r_p|^2 are needed, which follow the same recurrence
with V = 1, so the state itself is looked at in pieces and memory does not grow.

Axes: T tokens of a piece, R rows a token, G heads of all layers of one shape, K key width, V value width, N needle
tokens. A token of several rows has the last one's key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WORST = 8  # later writes kept of each sample
CHANGES = ("decay", "erase", "write")


@dataclass(frozen=True)
class Tokens:
    """A piece of a prompt as the operator received it in G heads; fp64."""

    q: Tensor  # [T, G, K] of the last row
    k: Tensor  # [T, R, G, K]
    e: Tensor | None  # [T, R, G, K]; None never erases
    z: Tensor  # [T, R, G, V]
    g: Tensor | None  # log-decay [T, G, K or 1]; None keeps everything
    before: Tensor  # state [G, K, V] before the first token
    after: Tensor  # and after the last
    erase: Tensor | None  # gate, averaged over its channels [T, G]; None where the mixer has none
    write: Tensor | None  # [T, G]

    @property
    def shape(self) -> tuple[object, ...]:
        """Pieces of one shape can be joined."""
        g = None if self.g is None else self.g.shape[-1]
        return self.k.shape[1], self.k.shape[-1], self.z.shape[-1], g, self.e is None, self.erase is None

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """The heads of several layers side by side."""

        def side(axis: int, tensors: list[Tensor | None]) -> Tensor | None:
            there = [t for t in tensors if t is not None]
            return torch.cat(there, axis) if there else None

        q, k, z = (torch.cat([getattr(p, name) for p in parts], axis) for name, axis in (("q", 1), ("k", 2), ("z", 2)))
        before, after = (torch.cat([getattr(p, name) for p in parts]) for name in ("before", "after"))
        e, g = side(2, [p.e for p in parts]), side(1, [p.g for p in parts])
        return Tokens(
            q, k, e, z, g, before, after, side(1, [p.erase for p in parts]), side(1, [p.write for p in parts])
        )


class Block(NamedTuple):
    """A block of the prompt, or its last, shorter part; [G] each, on the CPU."""

    half_life: Tensor | None  # tokens; median over key channels; None where nothing decays
    half_life_max: Tensor | None  # of the slowest channel
    erase: Tensor | None  # mean gate
    write: Tensor | None
    write_norm: Tensor  # |k_t z_t^T|, mean over tokens
    norm: Tensor  # |S| at the block's end (Frobenius)
    rank: Tensor  # effective rank of S there
    retention: Tensor  # of each needle token there [N, G]; NaN before it is written
    survival: Tensor  # the same
    change: Tensor  # of the retention over the block, mean over the value's tokens [3, G]; see CHANGES
    loss: Tensor  # of the survival, likewise; nothing by writes


class Moment(NamedTuple):
    """One token near the needle; [G] each, on the CPU."""

    norm: Tensor  # |S| after it
    kept: Tensor | None  # exp(g), mean over key channels
    erase: Tensor | None
    write: Tensor | None
    change: Tensor  # of the retention, mean over the value's tokens [3, G]
    loss: Tensor  # of the survival
    overlap: Tensor  # |cosine of k_t and k_p|, largest over the value's tokens written before


class Write(NamedTuple):
    """A later token that did damage in one head: its changes of the retention, mean over the value's tokens."""

    damage: float  # -(erase + write)
    token: int
    head: int  # 0 .. G - 1
    erase: float
    write: float
    overlap: float  # |cosine of k_t and k_p|, largest over the value's tokens


class Follower:
    """Follows one needle through one prompt, in G heads.

    Args:
        needle: positions of its tokens.
        value: those of them that hold the answer, counted from the needle's start.
        window: positions to keep a `Moment` of; it holds the needle.
    """

    def __init__(self, needle: range, value: Sequence[int], window: range) -> None:
        self.needle, self.value, self.window = needle, list(value), window
        self.blocks: list[Block] = []
        self.moments: list[Moment] = []
        self.worst: list[Write] = []
        self.drift = 0.0  # largest difference of a retention from the one in the model's own states
        self._sums: dict[str, Tensor] = {}  # over the tokens of the present block
        self._tokens = 0

    @property
    def read_norm(self) -> Tensor:
        """|r_p| of each needle token [N, G]."""
        sizes: Tensor = (self._reads * self._reads).sum(1).rsqrt()
        return torch.nan_to_num(sizes).T.cpu()

    def asked(self) -> Tensor:
        """Cosine of what the last token reads in each head, S_T^T q_T, and r_p: [N, G]."""
        answer = (self._last.q[-1, :, None] @ self._last.after)[:, 0]  # [G, V]
        product = (answer[..., None] * self._reads).sum(1)
        cosine: Tensor = product / (answer.norm(dim=-1, keepdim=True) * self._reads.norm(dim=1))
        return cosine.T.cpu()

    def read(self, start: int, piece: Tokens) -> None:
        """Take the next piece, whose first token has position `start`."""
        if not self.blocks and not self._tokens:
            self._begin(piece.before)
        stop = start + len(piece.k)
        near = start < self.window.stop and stop > self.window.start
        norms, born = self._states(start, piece) if near else ({}, {})
        changes, overlap = self._changes(start, piece, born)
        mean = changes.unflatten(-1, (2, -1))[..., self.value].mean(-1).movedim(-1, 0)  # [2, T, 3, G]
        largest = overlap[..., self.value].amax(-1)  # [T, G]
        self._remember(start, mean[0], largest)
        self._near(start, piece, norms, mean, largest)
        self._count(piece, mean)
        n = len(self.needle)
        own = (self._keys[..., :n] * (piece.after @ self._reads)).sum(1)
        self.drift = max(self.drift, (own - self._rho[:, :n]).abs().nan_to_num().max().item())
        self._last = piece

    def close(self) -> None:
        """End the block made up of the pieces read since the last call."""
        mean = {name: total / self._tokens for name, total in self._sums.items()}
        after = self._last.after
        retention, survival = torch.where(self._written, self._rho.unflatten(1, (2, -1)), math.nan).permute(1, 2, 0)
        lives = half_life(mean["g"]) if "g" in mean else None
        block = Block(
            None if lives is None else lives.median(-1).values, None if lives is None else lives.amax(-1),
            mean.get("erase"), mean.get("write"), mean["write_norm"], after.flatten(1).norm(dim=1),
            effective_rank(after), retention, survival, *self._sums["change"],
        )  # fmt: skip
        self.blocks.append(Block(*(None if x is None else x.cpu() for x in block)))  # type: ignore[arg-type]
        self._sums, self._tokens = {}, 0

    def _begin(self, state: Tensor) -> None:
        heads, width, values = state.shape
        n = len(self.needle)
        self._reads = state.new_zeros(heads, values, n)  # r_p / |r_p|^2
        # Two columns a needle token: k_p and u_p, whose product is rho; k_p / |k_p|^2 and x_t, whose product is sigma.
        self._keys, self._u = state.new_zeros(heads, width, 2 * n), state.new_zeros(heads, width, 2 * n)
        self._rho = state.new_zeros(heads, 2 * n)
        self._written = torch.zeros(n, dtype=torch.bool, device=state.device)

    def _states(self, start: int, piece: Tokens) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """|S_t| [G] at the positions of the window, and u_p, x_p [G, K, 2] at those of the needle.

        Sets the keys and read-outs of the needle's tokens.
        """
        norms, born = {}, {}
        state = piece.before
        for t in range(min(len(piece.k), self.window.stop - start)):
            kept = state if piece.g is None else piece.g[t].exp()[..., None] * state
            written = piece.z[t].transpose(0, 1)  # [G, R, V]
            if piece.e is not None:
                written = written - piece.e[t].transpose(0, 1) @ kept
            state = kept + piece.k[t].permute(1, 2, 0) @ written
            if start + t in self.window:
                norms[start + t] = state.flatten(1).norm(dim=1)
            if start + t in self.needle:
                n = self.needle.index(start + t)
                key = piece.k[t, -1]
                read = (key[:, None] @ state)[:, 0]
                self._reads[..., n] = read / (read * read).sum(-1, keepdim=True)  # NaN where nothing is read
                self._keys[..., n :: len(self.needle)] = torch.stack([key, key / (key * key).sum(-1, keepdim=True)], -1)
                born[start + t] = torch.stack([(state @ self._reads[..., n, None])[..., 0], key], -1)
        return norms, born

    def _changes(self, start: int, piece: Tokens, born: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Changes of retention and survival [T, 3, G, 2 N] and overlaps [T, G, N]. `_u` and `_rho` move on."""
        count, device = len(piece.k), piece.k.device
        changes = self._rho.new_zeros(count, 3, *self._rho.shape)
        position = torch.arange(start, start + count, device=device)
        later = position[:, None] > torch.tensor(list(self.needle), device=device)  # [T, N]
        if not born and not later.any():
            return changes, changes[:, 0, :, : len(self.needle)]
        later = later[:, None, None]  # [T, 1, 1, N]
        overlap = torch.where(later.repeat(1, 1, 1, 2), torch.einsum("trgk,gkn->trgn", piece.k, self._keys), 0.0)
        wrote = torch.where(later, torch.einsum("trgv,gvn->trgn", piece.z, self._reads), 0.0)
        wrote = torch.cat([wrote, torch.zeros_like(wrote)], -1)
        changes[:, 2] = (overlap * wrote).sum(1)
        u, rho = self._u, self._rho
        for t in range(count):
            kept, held = u, rho
            if piece.g is not None:
                kept = piece.g[t].exp()[..., None] * u
                held = (self._keys * kept).sum(1)
                changes[t, 0] = held - rho
            written = wrote[t].transpose(0, 1)  # [G, R, N]
            if piece.e is not None:
                erased = piece.e[t].transpose(0, 1) @ kept  # [G, 1, N]
                changes[t, 1] = -overlap[t, 0] * erased[:, 0]
                written = written - erased
            u = torch.baddbmm(kept, piece.k[t].permute(1, 2, 0), written)
            rho = held + changes[t, 1] + changes[t, 2]
            if start + t in born:
                n = self.needle.index(start + t)
                columns = slice(n, None, len(self.needle))
                u[..., columns] = born[start + t]
                rho[:, columns] = (self._keys[..., columns] * u[..., columns]).sum(1)  # 1; NaN where nothing is read
                self._written[n] = True
        self._u, self._rho = u, rho
        n = len(self.needle)
        sizes = piece.k.norm(dim=-1, keepdim=True) * self._keys[..., :n].norm(dim=1)  # [T, R, G, N]
        return changes, (overlap[..., :n].abs() / sizes).nan_to_num().amax(1)

    def _remember(self, start: int, mean: Tensor, overlap: Tensor) -> None:
        """Keep the most damaging writes so far."""
        damage = -(mean[:, 1] + mean[:, 2]).nan_to_num()  # [T, G]
        values, places = damage.flatten().topk(min(WORST, damage.numel()))
        heads = damage.shape[1]
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if value > 0:
                t, head = divmod(place, heads)
                erase, write, near = mean[t, 1, head].item(), mean[t, 2, head].item(), overlap[t, head].item()
                self.worst.append(Write(value, start + t, head, erase, write, near))
        self.worst = sorted(self.worst, key=lambda w: -w.damage)[:WORST]

    def _near(self, start: int, piece: Tokens, norms: dict[int, Tensor], mean: Tensor, overlap: Tensor) -> None:
        for position, norm in norms.items():
            t = position - start
            moment = Moment(
                norm, None if piece.g is None else piece.g[t].exp().mean(-1),
                None if piece.erase is None else piece.erase[t], None if piece.write is None else piece.write[t],
                mean[0, t], mean[1, t], overlap[t],
            )  # fmt: skip
            self.moments.append(Moment(*(None if x is None else x.cpu() for x in moment)))  # type: ignore[arg-type]

    def _count(self, piece: Tokens, mean: Tensor) -> None:
        keys, values = (torch.einsum("trgx,tsgx->tgrs", x, x) for x in (piece.k, piece.z))
        found = {"write_norm": (keys * values).sum((-1, -2)).clamp_min(0).sqrt().sum(0), "change": mean.sum(1)}
        for name, gate in (("g", piece.g), ("erase", piece.erase), ("write", piece.write)):
            if gate is not None:
                found[name] = gate.sum(0)
        for name, total in found.items():
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._tokens += len(piece.k)


def half_life(g: Tensor) -> Tensor:
    """Tokens after which a log-decay of `g` a token leaves half; inf where nothing decays."""
    return math.log(2) / g.abs()


def effective_rank(state: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of state [G, K, V] (Roy and Vetterli 2007); 0 for zeros."""
    sizes = torch.linalg.svdvals(state)
    total = sizes.sum(-1, keepdim=True)
    share = sizes / total
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total[:, 0] > 0, entropy.exp(), 0.0)
