"""Who reads a lane: its own thread, or a caller who waits for something small that comes over it.

What a thread has received, another that waits for it sees only after the kernel and the GIL have
come to it, which takes longer than to receive a small block. So whoever waits asks the lane's
thread for its turn, reads what has come until his own is there, and gives the turn back.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Protocol

__all__ = ["Gate", "ReadTurn", "Seat"]


class Gate:
    """What one caller waits at; whoever opens it may do so twice."""

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

    def sit(self, turn: ReadTurn | None) -> None:
        """Note that the caller may be reading."""
        self._turn = turn


class ReadTurn:
    """The right to read one lane. Thread-safe.

    Args:
        fd: What becomes readable when something comes.
        buffered: Whether something has been received that nobody has looked at.

    """

    def __init__(self, fd: int, buffered: Callable[[], bool]) -> None:
        self._buffered = buffered
        self._lock = threading.Lock()
        self._back = threading.Lock()
        self._back.acquire()
        self._guest: Gate | None = None
        self._reader = 0
        self._lent = self._sleeps = self._closed = False
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
        """
        while True:
            if self._buffered():
                return False
            with self._lock:
                guest = self._guest
                self._lent = guest is not None
                self._sleeps = guest is None
            if guest is not None:
                guest.step_up()
                self._back.acquire()
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
            self._guest, self._reader = gate, threading.get_ident()
            gate.sit(self)
            if self._sleeps:
                os.eventfd_write(self._wake, 1)
            return True

    def has(self, gate: Gate) -> bool:
        """Whether it is the caller's turn."""
        return self._lent and self._guest is gate

    def come(self, timeout_s: float) -> bool:
        """Wait for something to read; False when there is nothing, or somebody has poked."""
        return self._buffered() or self._come(timeout_s)

    def poke(self, gate: Gate) -> None:
        """Have the caller look up from the lane, unless it is he who pokes."""
        if self._reader == threading.get_ident():
            return
        with self._lock:
            if self._guest is gate and self._lent and not self._closed:
                os.eventfd_write(self._wake, 1)

    def leave(self, gate: Gate) -> None:
        """Give the turn back, or ask for it no longer. Idempotent."""
        with self._lock:
            if self._guest is not gate:
                return
            self._guest, self._reader = None, 0
            gate.sit(None)
            lent, self._lent = self._lent, False
        if lent:
            self._back.release()

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
