"""Who reads a lane: its own thread, or a caller who waits for something small that comes over it.

What a thread has received, another that waits for it sees only after the kernel and the GIL have
come to it, which takes longer than to receive a small block. So whoever waits asks the lane's
thread for its turn, reads what has come until his own is there, and gives the turn back.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from sagellm.core.protocols import PeerLostError

__all__ = ["Gate", "ReadTurn", "Seat"]

_TICK_S = 1.0
"""How often the lane's thread looks whether it must not wait for its turn any longer."""
_PATIENCE_S = 5.0
"""How long a visitor may take to leave a connection that was broken."""


class Gate:
    """What one caller waits at; whoever opens it may do so twice.

    That it was opened is a hint to look, and says nothing about why.
    """

    __slots__ = ("_lock", "_turn")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._turn: ReadTurn | None = None

    def open(self) -> None:
        """Let the caller go on, also when he is reading."""
        turn = self._turn
        self.step_up()
        if turn is not None:
            turn.poke(self)

    def step_up(self) -> None:
        """Let the caller look whether it is his turn."""
        try:  # cheaper than contextlib's way, in the middle of a small transfer
            self._lock.release()
        except RuntimeError:  # it is open already
            return

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is opened, and close it again; False when it was not."""
        return self._lock.acquire(timeout=timeout_s)

    def sit(self, turn: ReadTurn) -> None:
        """Note that the caller may be reading."""
        self._turn = turn

    def rise(self) -> None:
        """Give back what the caller may have been lent, also by an interrupt. Idempotent."""
        if self._turn is not None:
            self._turn.leave(self)


class ReadTurn:
    """The right to read one lane. Thread-safe.

    Args:
        fd: What becomes readable when something comes.
        buffered: Whether something has been received that nobody has looked at.
        aborted: Whether the connection was broken.

    """

    def __init__(
        self, fd: int, buffered: Callable[[], bool], aborted: Callable[[], bool] = lambda: False
    ) -> None:
        self._aborted = aborted
        self._buffered = buffered
        self._lock = threading.Lock()
        self._back = threading.Lock()
        self._back.acquire()
        self._guest: Gate | None = None  # the truth about who asks for the turn or has it
        self._lent: Gate | None = None  # whom it was lent to last: his while he is the guest, too
        self._reader = 0
        self._sleeps = self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    @staticmethod
    def possible() -> bool:
        """Whether this system has what it takes."""
        return hasattr(os, "eventfd")

    # -- the lane's thread --------------------------------------------------------------------

    def settle(self) -> bool:
        """Wait until something has come, and lend the turn meanwhile to whoever asks for it.

        Returns True when somebody has had it, who may have left something to be finished.

        Raises:
            PeerLostError: The connection was broken, and whoever has the turn keeps it.

        """
        while True:
            if self._buffered():
                return False
            with self._lock:
                guest = self._guest
                self._lent = guest
                self._sleeps = guest is None
            if guest is not None:
                guest.step_up()
                self._await_return(guest)
                return True
            came = self._come(None)
            with self._lock:
                self._sleeps = False
            if came:
                return False

    def close(self) -> None:
        """Lend it no more; on the lane's thread, which has it."""
        with self._lock:
            self._closed = True
            os.close(self._wake)

    # -- somebody who waits -------------------------------------------------------------------

    def ask(self, gate: Gate) -> bool:
        """Have a gate opened when it is the caller's turn; False when it never will be."""
        with self._lock:
            if self._closed or self._guest is not None:
                return False
            gate.sit(self)
            self._reader = threading.get_ident()
            self._guest = gate
            if self._sleeps:
                os.eventfd_write(self._wake, 1)
            return True

    def has(self, gate: Gate) -> bool:
        """Whether it is the caller's turn."""
        return self._lent is gate and self._guest is gate

    def come(self, timeout_s: float) -> bool:
        """Wait for something to read; False when there is nothing, or somebody has poked."""
        return self._buffered() or self._come(timeout_s)

    def poke(self, gate: Gate) -> None:
        """Have the caller look up from the lane, unless it is he who pokes."""
        if self._reader == threading.get_ident():
            return
        with self._lock:
            if self.has(gate) and not self._closed:
                os.eventfd_write(self._wake, 1)

    def leave(self, gate: Gate) -> None:
        """Give the turn back, or ask for it no longer. Idempotent."""
        with self._lock:
            if self._guest is not gate:
                return
            self._reader = 0
            self._guest = None  # what follows is a hint, which an interrupt may take away
        with contextlib.suppress(RuntimeError):
            self._back.release()

    def _await_return(self, guest: Gate) -> None:
        broken_at = None
        while self._guest is guest:
            if self._back.acquire(timeout=_TICK_S) or not self._aborted():
                continue
            broken_at = broken_at or time.monotonic()
            if time.monotonic() - broken_at > _PATIENCE_S:
                raise PeerLostError("the connection was broken, and its reader does not leave it")

    def _come(self, timeout_s: float | None) -> bool:
        ready = self._poll.poll(None if timeout_s is None else 1000.0 * timeout_s)
        came = False
        for fd, _ in ready:
            if fd == self._wake:
                os.eventfd_read(fd)
            else:
                came = True
        return came


class Seat(Protocol):
    """Where a caller who waits for a transfer may sit to read it himself."""

    def read(self, gate: Gate, over: Callable[[], bool], timeout_s: float) -> None:
        """Read until it is over, the gate is opened for nothing, or the time is up."""
        ...
