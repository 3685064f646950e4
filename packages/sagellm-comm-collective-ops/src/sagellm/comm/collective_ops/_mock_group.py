"""The meeting place of a mock group's ranks: rounds of collectives, mailboxes, failures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagellm.core.protocols import CommError, DistributedRuntimeError, PeerLostError
from sagellm.core.protocols.process_group import RawCall, RawWork, fingerprint, mismatch

from ._mock_clock import VirtualClock
from ._mock_math import outcome, traffic

__all__ = ["Faults", "MockGroup", "MockWork", "Transfer"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one rank sent: a message, or what a call would have sent had it gone round a ring.

    Attributes:
        op: Primitive operation.
        group: Group name.
        rank: Rank in the group.
        nbytes: Bytes of the rank's contribution.
        steps: Messages one after the other.
        sent_bytes: Bytes the rank sends in all steps.
        peer: Who gets a message; None for calls of all ranks.

    """

    op: str
    group: str
    rank: int
    nbytes: int
    steps: int
    sent_bytes: int
    peer: int | None = None


@dataclass(slots=True)
class Faults:
    """What a test wants to go wrong, by global rank. Guarded by the world's lock."""

    delays_s: dict[int, float] = field(default_factory=dict)
    late_s: dict[int, float] = field(default_factory=dict)  # in virtual time
    losing: dict[int, int] = field(default_factory=dict)  # messages still to be lost
    corrupt: dict[int, str] = field(default_factory=dict)  # rank to op, "" is every op
    dead: set[int] = field(default_factory=set)


class MockWork(RawWork):
    """One rank's part of a round, or a message; results are written by whoever asks first."""

    def __init__(self, call: RawCall, clock: VirtualClock, global_rank: int) -> None:
        self.call = call
        self.when = 0.0  # in virtual time: when it was called, then when it is over
        self._clock = clock
        self._global_rank = global_rank
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._results: list[Tensor] = []
        self._error: Exception | None = None

    def succeed(self, results: list[Tensor]) -> None:
        """End well; `results` go to the call's outputs in the caller's thread."""
        self._results = results
        self._over.set()

    def fail(self, error: Exception) -> None:
        """End badly, unless it is over."""
        if not self._over.is_set():
            self._error = error
            self._over.set()

    def wait(self, timeout_s: float) -> bool:
        if not self._over.wait(max(0.0, timeout_s)):
            return False
        if self._error is not None:
            raise self._error
        with self._lock:
            # In the caller's thread, so that inference tensors may be written.
            results, self._results = self._results, []
            with torch.no_grad():
                for out, result in zip(self.call.outputs, results, strict=False):
                    out.copy_(result.view_as(out))
            self._clock.reach(self._global_rank, self.when)
        return True

    synchronize = wait

    def done(self) -> bool:
        if not self._over.is_set():
            return False
        if self._error is None:
            self.wait(0)
        return True


class _Round:
    """One position of the call order: what each rank called, and its work."""

    __slots__ = ("data", "works")

    def __init__(self) -> None:
        self.works: dict[int, MockWork] = {}
        self.data: dict[int, list[Tensor]] = {}


class MockGroup:
    """Shared state of one group of a `MockWorld`. Thread-safe.

    Args:
        name: For messages.
        global_ranks: Members, in the group's order.
        faults: The world's.
        ledger: The world's record of transfers.
        lock: The world's lock.
        clock: The world's.

    """

    def __init__(
        self,
        name: str,
        global_ranks: tuple[int, ...],
        faults: Faults,
        ledger: list[Transfer],
        lock: threading.RLock,
        clock: VirtualClock,
    ) -> None:
        self.name = name
        self.global_ranks = global_ranks
        self.size = len(global_ranks)
        self._faults = faults
        self._ledger = ledger
        self._lock = lock
        self._clock = clock
        self._turns = [0] * self.size
        self._rounds: dict[int, _Round] = {}
        self._mail: dict[tuple[int, int, int], deque[tuple[Tensor, float]]] = {}
        self._receivers: dict[tuple[int, int, int], deque[MockWork]] = {}
        self._children: dict[tuple[int, tuple[int, ...]], MockGroup] = {}
        self._splits = [0] * self.size
        self._failure: Exception | None = None
        self._missing: list[int] = []  # who had not come when the group failed

    def issue(self, rank: int, call: RawCall) -> MockWork:
        """Start a call; a delayed rank's contribution arrives later."""
        me = self.global_ranks[rank]
        work = MockWork(call, self._clock, me)
        if me in self._faults.dead:
            error = PeerLostError(f"{call.describe}: this rank was dropped", rank=me)
            work.fail(error)
            return work
        data = [_snapshot(x) for x in call.inputs or call.outputs]
        if call.op == "recv":
            data = []
        wanted = self._faults.corrupt.get(me)
        if wanted is not None and wanted in ("", call.op) and data and data[0].numel():
            _flip(data[0])
        delay_s = self._faults.delays_s.get(me, 0.0)
        with self._lock:
            turn = self._turns[rank]
            if call.op not in ("send", "recv"):
                self._turns[rank] += 1
            # Time is told in the caller's thread, whenever the contribution arrives.
            late_s = self._faults.late_s.get(me, 0.0)
            arrives = work.when = self._clock.now[me] + late_s
            if call.op == "send":
                peer = self.global_ranks[call.peer or 0]
                work.when, arrives = self._clock.send(me, peer, data[0].nbytes, late_s)
        if delay_s > 0:
            # The call order was fixed above: only the contribution is late.
            timer = threading.Timer(delay_s, self._arrive, (rank, turn, work, data, arrives))
            timer.daemon = True
            timer.start()
        else:
            self._arrive(rank, turn, work, data, arrives)
        return work

    def _arrive(
        self, rank: int, turn: int, work: MockWork, data: list[Tensor], arrives: float
    ) -> None:
        with self._lock:
            if self._failure is not None:
                work.fail(self._failure)
                return
            nbytes = sum(x.nbytes for x in data)
            steps, sent = traffic(work.call.op, nbytes, self.size)
            op, peer = work.call.op, work.call.peer if work.call.op == "send" else None
            self._ledger.append(Transfer(op, self.name, rank, nbytes, steps, sent, peer))
            if work.call.op == "send":
                self._deliver(rank, work, data[0], arrives)
            elif work.call.op == "recv":
                self._await_message(rank, work)
            else:
                self._join(rank, turn, work, data)

    def _join(self, rank: int, turn: int, work: MockWork, data: list[Tensor]) -> None:
        meeting = self._rounds.setdefault(turn, _Round())
        meeting.works[rank], meeting.data[rank] = work, data
        prints = {r: f"#{turn} {fingerprint(w.call)}" for r, w in meeting.works.items()}
        if len(set(prints.values())) > 1:
            self._fail_all(mismatch(work.call.describe, prints))
            return
        lost = self._faults.dead.intersection(self.global_ranks)
        if lost:
            self.lose(min(lost))
            return
        if len(meeting.works) < self.size:
            return
        del self._rounds[turn]
        try:
            calls = {r: w.call for r, w in meeting.works.items()}
            with torch.inference_mode(False):
                results = outcome(work.call.op, calls, meeting.data)
        except (RuntimeError, TypeError, ValueError) as e:  # what torch's arithmetic raises
            self._fail_all(DistributedRuntimeError(f"{work.call.describe}: {e}"))
            return
        # Ranks may contribute different sizes: the largest decides.
        costs = [
            self._clock.collective(
                self.global_ranks,
                *traffic(work.call.op, sum(x.nbytes for x in parts), self.size),
            )
            for parts in meeting.data.values()
        ]
        over = max(w.when for w in meeting.works.values()) + max(costs)
        for r, w in meeting.works.items():
            w.when = over
            w.succeed(results[r])

    def _deliver(self, rank: int, work: MockWork, message: Tensor, arrives: float) -> None:
        me = self.global_ranks[rank]
        key = (rank, work.call.peer or 0, work.call.tag)
        if self._faults.losing.get(me, 0) > 0:
            self._faults.losing[me] -= 1
            work.succeed([])
            return
        receivers = self._receivers.get(key)
        if receivers:
            self._hand_over(receivers.popleft(), message, arrives)
        else:
            self._mail.setdefault(key, deque()).append((message, arrives))
        work.succeed([])

    def _await_message(self, rank: int, work: MockWork) -> None:
        src = work.call.peer or 0
        mail = self._mail.get((src, rank, work.call.tag))
        if mail:
            self._hand_over(work, *mail.popleft())
        elif self.global_ranks[src] in self._faults.dead:
            self.lose(self.global_ranks[src])
            work.fail(self._failure or PeerLostError(rank=self.global_ranks[src]))
        else:
            self._receivers.setdefault((src, rank, work.call.tag), deque()).append(work)

    def _hand_over(self, work: MockWork, message: Tensor, arrives: float) -> None:
        target = work.call.outputs[0]
        if message.nbytes != target.nbytes or message.dtype != target.dtype:
            calls = {
                work.call.peer or 0: f"send {message.nbytes} bytes {message.dtype}",
                self.size: f"recv {target.nbytes} bytes {target.dtype}",
            }
            self._fail_all(mismatch(work.call.describe, calls))
            work.fail(self._failure or DistributedRuntimeError(work.call.describe))
            return
        work.when = arrives
        work.succeed([message])

    # -- failure --------------------------------------------------------------------------

    def missing(self, rank: int) -> list[int]:
        """Ranks that have not made the call at which `rank` waits."""
        with self._lock:
            waiting = [m for m in self._rounds.values() if rank in m.works]
            if not waiting:
                return self._missing
            return [r for r in range(self.size) if r not in waiting[0].works]

    def lose(self, global_rank: int) -> None:
        """A member is gone: everything in flight, and everything later, fails."""
        with self._lock:
            members = self._children.values()
            if global_rank in self.global_ranks:
                rank = self.global_ranks.index(global_rank)
                text = f"rank {rank} (global {global_rank}) of group {self.name} is gone"
                self._fail_all(PeerLostError(text, rank=global_rank))
            for child in members:
                child.lose(global_rank)

    def leave(self, rank: int, reason: str) -> None:
        """A member gave up: its peers see a lost rank."""
        me = self.global_ranks[rank]
        text = f"rank {rank} (global {me}) left group {self.name}: {reason}"
        self._fail_all(PeerLostError(text, rank=me))

    def _fail_all(self, error: CommError) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error
                first = min(self._rounds, default=None)
                if first is not None:
                    there = self._rounds[first].works
                    self._missing = [r for r in range(self.size) if r not in there]
            works = [w for m in self._rounds.values() for w in m.works.values()]
            works += [w for queue in self._receivers.values() for w in queue]
            self._rounds.clear()
            self._receivers.clear()
        for work in works:
            work.fail(error)

    # -- groups ---------------------------------------------------------------------------

    def split(self, rank: int, ranks: Sequence[int], name: str) -> MockGroup | None:
        """The group that the members' n-th calls with these ranks share."""
        with self._lock:
            number = self._splits[rank]
            self._splits[rank] += 1
            if rank not in ranks:
                return None
            key = (number, tuple(ranks))
            child = self._children.get(key)
            if child is None:
                members = tuple(self.global_ranks[r] for r in ranks)
                child = MockGroup(
                    name, members, self._faults, self._ledger, self._lock, self._clock
                )
                self._children[key] = child
            return child


def _snapshot(x: Tensor) -> Tensor:
    """The contents now: the caller may be late in another thread's eyes."""
    with torch.inference_mode(False), torch.no_grad():
        return x.detach().clone()


def _flip(x: Tensor) -> None:
    raw = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
    raw[0] ^= 0x40
