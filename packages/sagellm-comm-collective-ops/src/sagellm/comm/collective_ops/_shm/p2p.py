"""Messages between ranks of a host: any order of tags, bounded memory, no deadlock by order.

A small message travels whole, and waits at the receiver if nobody asked for it yet; the sender
stops doing so while `_CREDIT_BYTES` of them are untaken. Any other is announced, and sent in parts
once a receive has been posted for it: unexpected messages cost the receiver next to nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagellm.core.protocols import CollectiveMismatchError, CommTimeoutError
from sagellm.core.protocols.process_group import RawCall, RawWork

from .rings import ANNOUNCE, CLEAR, DATA, SMALL, Frame, Ring

__all__ = ["Messages"]

_CREDIT_BYTES = 1 << 20
_SMALL_SHARE = 4
"""A small message takes at most this part of a ring, so that it fits wherever the ring stands."""
_LONGEST_NAP_S = 1e-3


class _Message(RawWork):
    """One send or receive, from its call to its end."""

    def __init__(self, owner: Messages, call: RawCall) -> None:
        assert call.peer is not None
        x = call.inputs[0] if call.op == "send" else call.outputs[0]
        self.bytes: Tensor = x.detach().as_strided((x.numel(),), (1,)).view(torch.uint8)
        self.op, self.peer, self.tag = call.op, call.peer, call.tag
        self.number = 0
        self.moved = 0
        self.over = False
        self.error: Exception | None = None
        self._owner = owner
        self._timeout_s = call.timeout_s
        self._deadline = time.monotonic() + call.timeout_s

    def wait(self, timeout_s: float) -> bool:
        if not self.over and not self._owner.advance(self, timeout_s):
            if time.monotonic() < self._deadline:
                return False
            raise CommTimeoutError(
                f"no sign of rank {self._owner.who(self.peer)} before the deadline of "
                f"{self._timeout_s} s: {self.text()}, {self.moved} of them moved"
            )
        if self.error is not None:
            raise self.error
        return True

    synchronize = wait

    def done(self) -> bool:
        return self.over or self._owner.advance(self, 0.0)

    def text(self) -> str:
        """The message in words."""
        way = "to" if self.op == "send" else "from"
        return f"{self.op} {way} rank {self.peer}, tag {self.tag}, {self.bytes.numel()} bytes"

    def end(self, error: Exception | None = None) -> None:
        """Say that it is over."""
        self.error = error
        self.over = True


@dataclass(slots=True)
class _Arrived:
    """A message that no receive has asked for: its bytes, or its number if only announced."""

    count: int
    number: int
    payload: Tensor | None


@dataclass(slots=True)
class _Peer:
    outgoing: Ring
    incoming: Ring
    sends: deque[_Message] = field(default_factory=deque)  # of which the peer knows nothing
    announced: dict[int, _Message] = field(default_factory=dict)
    cleared: deque[_Message] = field(default_factory=deque)
    clears: deque[int] = field(default_factory=deque)  # leave that we have to give
    receives: dict[int, deque[_Message]] = field(default_factory=dict)
    arriving: dict[int, _Message] = field(default_factory=dict)
    arrived: dict[int, deque[_Arrived]] = field(default_factory=dict)
    untaken: int = 0  # bytes of small messages sent so far
    number: int = 0


class Messages:
    """Sends and receives of one rank. Every thread that waits moves everybody's messages.

    Args:
        rings: Ring to and ring from each peer.
        health: Raises what a work with this peer fails with: the peer is gone, or the group dead.
        who: A rank as messages name it.
        polls: How often to look before yielding the core.
        name: Of the thread, which is started for works that nobody waits for.

    """

    def __init__(
        self,
        rings: dict[int, tuple[Ring, Ring]],
        *,
        health: Callable[[int], None],
        who: Callable[[int], str],
        polls: int,
        name: str,
    ) -> None:
        self.who = who
        self._peers = {peer: _Peer(*pair) for peer, pair in rings.items()}
        self._health = health
        self._polls = min(polls, 200)
        self._name = name
        self._lock = threading.Lock()
        self._wake = threading.Condition()
        self._pending: list[_Message] = []  # works that the thread looks after
        self._thread: threading.Thread | None = None
        self._closed = False

    def issue(self, calls: Iterable[RawCall]) -> list[RawWork]:
        """Post messages in order and start them; receives first, which never wait for room."""
        works = [(_Message(self, call), call.background) for call in calls]
        with self._lock, torch.inference_mode():
            for work, _ in works:
                peer = self._peers[work.peer]
                if work.op == "send":
                    peer.number += 1
                    work.number = peer.number
                    peer.sends.append(work)
                else:
                    self._post(peer, work)
            for peer in {work.peer: self._peers[work.peer] for work, _ in works}.values():
                self._push(peer)
        left = [work for work, background in works if background and not work.over]
        if left:
            self._look_after(left)
        return [work for work, _ in works]

    def advance(self, work: _Message, timeout_s: float) -> bool:
        """Move messages until `work` is over; False when it is not after `timeout_s`."""
        end = time.monotonic() + timeout_s
        idle, nap_s = 0, 0.0
        while not work.over:
            moved = self._move()
            if work.over:
                break
            if moved:
                idle, nap_s = 0, 0.0
                continue
            idle += 1
            if idle < self._polls and timeout_s > 0:
                continue
            if not self._healthy(work):
                break
            if time.monotonic() >= end:
                return False
            if nap_s == 0.0:
                os.sched_yield()
            else:
                time.sleep(nap_s)
            if idle > 2 * self._polls:
                nap_s = min(nap_s * 1.3 + 10e-6, _LONGEST_NAP_S)
        return True

    def sender_of(self, tag: int) -> int | None:
        """A peer whose message with this tag has come and was not asked for; None if there is none.

        Raises whatever `health` does once a peer is gone or the group dead.
        """
        found = self._arrived_from(tag)
        if found is None:
            try:
                for rank in tuple(self._peers):
                    self._health(rank)
            except Exception:
                found = self._arrived_from(tag)  # what a peer sent before it left still counts
                if found is None:
                    raise
        return found

    def _arrived_from(self, tag: int) -> int | None:
        with self._lock:
            self._move_all()
            return next((r for r, peer in self._peers.items() if peer.arrived.get(tag)), None)

    def _healthy(self, work: _Message) -> bool:
        """False once `work` is over, because its peer is gone if for nothing else."""
        try:
            self._health(work.peer)
        except Exception as e:  # becomes the work's error
            if not self._lock.acquire(timeout=_LONGEST_NAP_S):
                return True  # whoever holds it may be taking the message: ask again
            try:
                self._move_all()  # what the peer sent before it left still counts
                if not work.over:
                    work.end(e)
            finally:
                self._lock.release()
            return False
        return True

    def after_fork(self) -> None:
        """In a child: forget the rings, whose memory it does not have, and the threads."""
        self._peers = {}
        self._lock = threading.Lock()
        self._wake = threading.Condition()
        self._pending = []
        self._closed = True
        self._thread = None

    def close(self) -> None:
        """End the thread and let go of the rings."""
        with self._wake:
            self._closed = True
            self._pending = []
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)
        with self._lock:
            self._peers = {}

    # -- moving ---------------------------------------------------------------------------

    def _move(self) -> bool:
        """Take what has come and send what has room; whether anything moved."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._move_all()
        finally:
            self._lock.release()

    def _move_all(self) -> bool:
        moved = False
        with torch.inference_mode():
            for peer in self._peers.values():
                moved |= self._pull(peer)
                moved |= self._push(peer)
        return moved

    def _pull(self, peer: _Peer) -> bool:
        moved = False
        while (frame := peer.incoming.peek()) is not None:
            self._accept(peer, frame)
            peer.incoming.drop(frame)
            moved = True
        return moved

    def _accept(self, peer: _Peer, frame: Frame) -> None:
        kind, number, tag, count, payload = frame
        if kind == CLEAR:
            peer.cleared.append(peer.announced.pop(number))
        elif kind == DATA:
            work = peer.arriving[number]
            work.bytes[work.moved : work.moved + count].copy_(payload)
            work.moved += count
            if work.moved == work.bytes.numel():
                del peer.arriving[number]
                work.end()
        else:
            wanted = peer.receives.get(tag)
            whole = kind == SMALL
            if wanted:
                work = wanted.popleft()
                self._meet(peer, work, _Arrived(count, number, payload if whole else None))
            else:
                kept = _Arrived(count, number, payload.clone() if whole else None)
                peer.arrived.setdefault(tag, deque()).append(kept)

    def _post(self, peer: _Peer, work: _Message) -> None:
        there = peer.arrived.get(work.tag)
        if there:
            self._meet(peer, work, there.popleft())
        else:
            peer.receives.setdefault(work.tag, deque()).append(work)

    def _meet(self, peer: _Peer, work: _Message, message: _Arrived) -> None:
        if message.payload is not None:
            peer.incoming.take(message.count)
        if message.count != work.bytes.numel():
            work.end(
                CollectiveMismatchError(
                    f"{work.text()} met a send of {message.count} bytes",
                    calls={work.peer: f"send {message.count} bytes tag {work.tag}"},
                )
            )
        elif message.payload is not None:
            work.bytes.copy_(message.payload)
            work.moved = message.count
            work.end()
        else:
            peer.arriving[message.number] = work
            peer.clears.append(message.number)

    def _push(self, peer: _Peer) -> bool:
        ring, moved = peer.outgoing, False
        while peer.clears and ring.space() >= 0:
            ring.write(CLEAR, peer.clears.popleft(), 0, 0, None)
            moved = True
        while peer.sends and ring.space() >= 0:
            work = peer.sends[0]
            count = work.bytes.numel()
            free = _CREDIT_BYTES - (peer.untaken - ring.taken())
            if count <= min(ring.room // _SMALL_SHARE, free):
                if ring.space() < count:
                    break
                ring.write(SMALL, work.number, work.tag, count, work.bytes)
                peer.untaken += count
                work.moved = count
                work.end()
            else:
                ring.write(ANNOUNCE, work.number, work.tag, count, None)
                peer.announced[work.number] = work
            peer.sends.popleft()
            moved = True
        while peer.cleared:
            work = peer.cleared[0]
            left = work.bytes.numel() - work.moved
            part = min(left, ring.space())
            if part < min(left, ring.room // 8):
                break
            ring.write(DATA, work.number, 0, part, work.bytes[work.moved : work.moved + part])
            work.moved += part
            moved = True
            if work.moved == work.bytes.numel():
                peer.cleared.popleft()
                work.end()
        return moved

    # -- the thread -----------------------------------------------------------------------

    def _look_after(self, works: list[_Message]) -> None:
        with self._wake:
            self._pending += works
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()

    def _serve(self) -> None:
        nap_s = 0.0
        while True:
            with self._wake:
                self._pending = [work for work in self._pending if not work.over]
                while not self._pending:
                    if self._closed:
                        return
                    self._wake.wait()
                    nap_s = 0.0
                first = self._pending[0]
            moved = False
            with contextlib.suppress(Exception):  # kept in the work for whoever waits for it
                moved = self._move()
            if not moved and nap_s >= _LONGEST_NAP_S:
                self._healthy(first)
            nap_s = 0.0 if moved else min(nap_s * 1.3 + 20e-6, _LONGEST_NAP_S)
            time.sleep(nap_s)
