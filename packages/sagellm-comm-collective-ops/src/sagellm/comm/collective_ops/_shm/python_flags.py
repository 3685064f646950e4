"""Steps, signatures and waiting of the Python engine: the flag protocol of `layout` on x86-64.

CPython stores an item of a `memoryview` of 64-bit words by one aligned move, and x86-64 keeps
stores in order and loads in order (TSO). So bytes written before a flag is stored are seen by
whoever has read that flag. No other architecture promises this: see `python_engine.supported`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import threading
import time
from collections.abc import Mapping

from .engine import EngineFailure
from .layout import CAUSES, H_POISON, REASON, SEQUENCE, SIGNATURE, SYMMETRIC, Layout

__all__ = ["POISON", "Flags", "clock"]

POISON = H_POISON // 8
"""Index of the poison word."""
_YIELDS = 400
_FIRST_NAP_S, _LONGEST_NAP_S = 20e-6, 1e-3
_REASON_BYTES = 128

clock = time.monotonic_ns


class Flags:
    """This rank's steps, and what it knows of its peers'.

    A call is `open`, then for every step `begin`, write the slot, `publish`, `wait`, read.

    Attributes:
        step: The step this rank is in.
        calls: Calls that have ended well so far, which is the number of the next.
        wait_ns: Time spent waiting, of all calls.
        timeout_ns: Longest time of the call.
        deadline_ns: When it ends by `clock`; 0 to count from the first long wait.
        all_symmetric: Whether every peer gave an offset in its arena; after a call's first wait.

    """

    def __init__(
        self,
        memory: mmap.mmap,
        layout: Layout,
        rank: int,
        sockets: Mapping[int, int],
        *,
        polls: int,
    ) -> None:
        self.rank, self.polls = rank, polls
        self.peers = tuple(r for r in range(layout.world) if r != rank)
        self.control = tuple(layout.control(r) // 8 for r in range(layout.world))
        self.mine = self.control[rank] + SEQUENCE
        self.theirs = tuple(self.control[r] + SEQUENCE for r in self.peers)
        self._view = memoryview(memory)[: layout.data_offset]
        self.words = self._view.cast("q")
        reason = layout.control(rank) + REASON
        self._reason = self._view[reason : reason + _REASON_BYTES]
        self._poller = select.poll()
        self._ranks: dict[int, int] = {}
        for peer, fd in sockets.items():
            if peer != rank:
                self._ranks[fd] = peer
                self._poller.register(fd, select.POLLRDHUP)
        self._lock = threading.Lock()
        self._closed = False
        self.step = self.words[self.mine]
        self.calls = 0
        self.wait_ns = 0
        self.timeout_ns = 0
        self.deadline_ns = 0
        self._opening = False
        self._signature = (0, 0, 0)
        self._offsets = (0, 0)
        self._any_symmetric = self.all_symmetric = False

    # -- a call ---------------------------------------------------------------------------

    def open(
        self, packed: int, nbytes: int, timeout_s: float, offsets: tuple[int, int] = (0, 0)
    ) -> None:
        """Begin a call: its signature travels with its first step.

        Args:
            packed: First signature word.
            nbytes: Second signature word.
            timeout_s: Time from now within which its waits must end.
            offsets: The words of `layout.SYMMETRIC`.

        """
        self.check_poison()
        self.timeout_ns = int(timeout_s * 1e9)
        self.deadline_ns = clock() + self.timeout_ns
        self._signature = (packed, nbytes, self.calls)
        self._offsets = offsets
        self._opening = True

    def begin(self) -> int:
        """Go to the next step; this rank's slot of its parity may now be written."""
        step = self.step
        words = self.words
        for peer in self.theirs:
            if words[peer] < step:
                self.wait_for(peer, step)
        self.step = step + 1
        return step + 1

    def publish(self) -> None:
        """Let the peers read what this rank wrote in this step."""
        step, words = self.step, self.words
        if self._opening:
            own = self.control[self.rank]
            at = own + SIGNATURE[step & 1]
            words[at], words[at + 1], words[at + 2] = self._signature
            at = own + SYMMETRIC[step & 1]
            words[at], words[at + 1] = self._offsets
        words[self.mine] = step

    def wait(self, peer: int | None = None) -> None:
        """Until `peer`, or every peer, has published this step; in a call's first step all.

        Raises:
            EngineFailure: Signatures differ, a peer is late or lost, or the group is poisoned.

        """
        step, words = self.step, self.words
        if peer is not None and not self._opening:
            if words[self.control[peer]] < step:
                self.wait_for(self.control[peer], step)
            return
        for at in self.theirs:
            if words[at] < step:
                self.wait_for(at, step)
        if self._opening:
            self._opening = False
            self._compare(step & 1)

    def _compare(self, parity: int) -> None:
        words = self.words
        packed, nbytes, _ = self._signature
        anyone, everyone = False, True
        for peer in self.peers:
            at = self.control[peer] + SIGNATURE[parity]
            if words[at] != packed or words[at + 1] != nbytes:
                raise self.mismatch(peer)
            offset = words[self.control[peer] + SYMMETRIC[parity]]
            anyone = anyone or offset != 0
            everyone = everyone and offset != 0
        self._any_symmetric, self.all_symmetric = anyone, everyone

    def offered(self) -> bool:
        """Whether a peer gave an offset in this call's first step: says so once."""
        anyone, self._any_symmetric = self._any_symmetric, False
        return anyone

    def offset(self, rank: int) -> int:
        """Where `rank`'s input of this step's call lies in its arena; only after `wait`."""
        return self.words[self.control[rank] + SYMMETRIC[self.step & 1]] - 1

    # -- waiting --------------------------------------------------------------------------

    def wait_for(self, at: int, step: int) -> None:
        """Until word `at`, a peer's `SEQUENCE`, has reached `step`."""
        started = clock()
        words = self.words
        for _ in range(self.polls):
            if words[at] >= step:
                self.wait_ns += clock() - started
                return
        try:
            self._wait_long(at, step)
        finally:
            self.wait_ns += clock() - started

    def _wait_long(self, at: int, step: int) -> None:
        """Give way: by `sched_yield`, then by naps between looks at sockets and clock."""
        words = self.words
        if not self.deadline_ns:
            self.deadline_ns = clock() + self.timeout_ns
        for _ in range(_YIELDS):
            os.sched_yield()
            if words[at] >= step:
                return
            if words[POISON]:
                break
        nap = _FIRST_NAP_S
        while words[at] < step:
            lost = self._lost(step)
            if lost is not None:
                raise self._report("lost", lost, f"rank {lost} is gone")
            self.check_poison()
            if clock() > self.deadline_ns:
                if words[at] >= step:
                    return
                late = self.control.index(at)
                raise self._report(
                    "timeout", late, f"rank {late} is at step {words[at]}, awaited at {step}"
                )
            time.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP_S)

    def _lost(self, step: int) -> int | None:
        """A peer whose socket has ended before it published `step`."""
        for fd, event in self._poller.poll(0):
            rank = self._ranks[fd]
            if self.words[self.control[rank]] >= step:
                self._poller.unregister(fd)  # it has done its part and left
            elif event & select.POLLNVAL:
                raise self._failure("closed", self.rank)
            elif self._poisoner() != rank:
                return rank
        return None

    # -- failure --------------------------------------------------------------------------

    def _poisoner(self) -> int:
        return (self.words[POISON] & 0xFFFF_FFFF) - 1

    def check_poison(self) -> None:
        """Raise if any rank has poisoned the group."""
        if self._closed:
            raise self._failure("closed", self.rank)
        word = self.words[POISON]
        if word:
            cause = word >> 32
            known = 0 < cause < len(CAUSES)
            raise self._failure(CAUSES[cause] if known else "error", self._poisoner())

    def poison(self, cause: str, reason: str) -> None:
        """Write cause and reason where all ranks see them, unless there are such already."""
        with self._lock:
            if self._closed or self.words[POISON]:
                return
            text = reason.encode()[: _REASON_BYTES - 1].decode(errors="ignore").encode()
            self._reason[: len(text) + 1] = text + b"\0"
            self.words[POISON] = CAUSES.index(cause) << 32 | (self.rank + 1)

    def _report(self, cause: str, rank: int, reason: str) -> EngineFailure:
        self.poison(cause, reason)
        return self._failure(cause, rank)

    def _failure(self, cause: str, rank: int) -> EngineFailure:
        return EngineFailure(cause, rank, self.step, self.calls)

    def mismatch(self, peer: int) -> EngineFailure:
        """The failure of a call that `peer` made differently, told to every rank."""
        return self._report("mismatch", peer, f"ranks {self.rank} and {peer} made different calls")

    def close(self) -> None:
        """Let go of the words. Safe more than once."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for fd in self._ranks:
                    with contextlib.suppress(KeyError):
                        self._poller.unregister(fd)
                for view in (self.words, self._reason, self._view):
                    view.release()
