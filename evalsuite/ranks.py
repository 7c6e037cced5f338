"""The processes of one run, started by torchrun: who answers what, who waits for whom, and who is gone.

Samples are independent, so nothing is ever reduced over the network: the processes share torch.distributed's key-value
store alone, which CPUs and GPUs of any number of hosts can reach, and none of them can hang in a collective. Each one
adds to a counter of its own every few seconds; one whose counter stands still is lost, and the others go on.
"""

from __future__ import annotations

import heapq
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evalsuite.plan import Entry
from gdn2 import env
from gdn2.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_S = 2.0
SILENCE_S = 120.0  # after which a process counts as lost
POLL_S = 0.1
START_S = 600.0  # for all processes to appear

Account = Mapping[str, Any]  # what one process did, in plain JSON types


def shards(todo: Iterable[Entry], world: int) -> list[frozenset[str]]:
    """Split samples among `world` processes: the keys of each, the same whoever computes them.

    Largest first, each to the process with the fewest tokens so far; samples of one size in the order of their keys.
    """
    loads = [(0, rank) for rank in range(world)]
    keys: list[list[str]] = [[] for _ in range(world)]
    for entry in sorted(todo, key=lambda entry: (-entry.tokens, entry.key)):
        load, rank = heapq.heappop(loads)
        keys[rank].append(entry.key)
        heapq.heappush(loads, (load + max(entry.tokens, 1), rank))
    return [frozenset(part) for part in keys]


class Ranks:
    """This process among `world`. A context manager: inside it, the others are told that this one lives.

    Args:
        store: None where it is alone.
        silence_s: after which another process counts as lost.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Store | None = None, silence_s: float = SILENCE_S) -> None:
        self.rank, self.world = rank, world
        self._store, self._silence_s = store, silence_s
        self._turn = 0
        self._left = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Ranks:
        if self._store is not None:
            self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self._tell("failed", str(error)[:300] or kind.__name__)
        self._left.set()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Run `number` of several: inside it, what the processes tell one another concerns that run alone."""
        self._turn = number
        try:
            yield
        except BaseException as error:
            self._tell("failed", str(error)[:300] or type(error).__name__)
            raise

    def share(self, todo: Iterable[Entry]) -> frozenset[str]:
        """The keys of the samples that this process answers."""
        return shards(todo, self.world)[self.rank]

    def meet(self) -> None:
        """Return when every process that lives has come here.

        Raises:
            UserError: one of them failed before.
        """
        self._tell("here", "")
        self._wait("here", range(self.world))

    def gather(self, account: Account) -> list[Account | None]:
        """Leave this process's account; on rank 0, wait for those of all: None for a process that is lost.

        Elsewhere the list holds this process's own account alone.
        """
        self._tell("account", json.dumps(account))
        if self.rank or self._store is None:
            return [account]
        found = self._wait("account", range(1, self.world), raising=False)
        return [account, *(json.loads(found[rank]) if rank in found else None for rank in range(1, self.world))]

    def _wait(self, what: str, ranks: Iterable[int], *, raising: bool = True) -> dict[int, str]:
        """What each of `ranks` has to say about `what`; those that are lost are left out."""
        found: dict[int, str] = {}
        missing = set(ranks) if self._store is not None else set()
        heard = dict.fromkeys(missing, (0, time.monotonic()))
        while missing:
            for rank in sorted(missing):
                text = self._heard(f"{self._turn}/{what}/{rank}")
                if text is not None:
                    found[rank] = text
                    missing.discard(rank)
                    continue
                failure = self._heard(f"{self._turn}/failed/{rank}")
                if failure is not None and raising:
                    raise UserError(f"process {rank} of the run stopped: {failure}")
                beat, since = int(self._heard(f"beat/{rank}") or 0), time.monotonic()
                if beat != heard[rank][0]:
                    heard[rank] = beat, since
                elif failure is not None or since - heard[rank][1] > self._silence_s:
                    missing.discard(rank)
            if missing:
                time.sleep(POLL_S)
        return found

    def _heard(self, key: str) -> str | None:
        """The value of `key`, None where it is not set or where the store is gone with the process that kept it."""
        assert self._store is not None
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            return None

    def _tell(self, what: str, text: str) -> None:
        if self._store is not None:
            try:
                self._store.set(f"{self._turn}/{what}/{self.rank}", text)
            except RuntimeError:
                return  # nobody is left to hear it; the records are on disk

    def _beat(self) -> None:
        assert self._store is not None
        while not self._left.wait(BEAT_S):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except RuntimeError:
                return


def join(silence_s: float = SILENCE_S) -> Ranks:
    """The processes that torchrun started with this one; one alone where it did not.

    Raises:
        UserError: the others did not appear.
    """
    rank, world = env.launched()
    if world == 1:
        return Ranks()
    import torch.distributed as dist

    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_S)))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {rank} of {world} did not find the others: {error}; start them by torchrun") from None
    return Ranks(rank, world, store, silence_s)


def merged(accounts: Iterable[Account | None]) -> dict[str, Any]:
    """The sums, by name, over the accounts of all processes that are not lost."""
    out: dict[str, Any] = {}
    for account in accounts:
        for name, value in (account or {}).items():
            out[name] = out[name] + value if name in out else value
    return out


def device(name: str) -> str:
    """The device of this process: where several share a host, each has the GPU of its number there."""
    _, world = env.launched()
    return f"cuda:{env.local_rank()}" if world > 1 and name == "cuda" else name
