"""One thread that owns a channel's state: sockets, timers, and calls from other threads."""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from sagellm.core.protocols import CommTimeoutError, PeerLostError

__all__ = ["READ", "WRITE", "EventLoop", "Timer"]

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 3600.0
"""The kernel counts milliseconds in 32 bits, and a deadline may be years away."""
T = TypeVar("T")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Timer:
    """A call that will happen, unless cancelled."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget it."""
        self.callback = None


class EventLoop:
    """Runs callbacks on its own thread, one at a time.

    `call` and `run` are for any thread; everything else only for callbacks. An exception in a
    callback is a bug: it is logged, and the loop goes on.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._selector.register(self._wake_r, READ, self._drain_wake)
        self._calls: deque[Callable[[], None]] = deque()
        self._last: list[Callable[[], None]] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._ids = itertools.count()
        self._stopping = self._roused = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, callback: Callable[[], None]) -> bool:
        """Run it on the loop soon; False when the loop has stopped."""
        with self._lock:
            if self._stopping:
                return False
            self._calls.append(callback)
            first, self._roused = not self._roused, True
        if first and threading.get_ident() != self._thread.ident:
            self._wake()
        return True

    def post(self, callback: Callable[[], None]) -> None:
        """Queue it like `call`, and leave it to `rouse`, which has to follow, to wake the loop."""
        with self._lock:
            if not self._stopping:
                self._calls.append(callback)

    def rouse(self) -> None:
        """Have the loop look at what was posted."""
        with self._lock:
            first, self._roused = not self._roused, True
        if first:
            self._wake()

    def run(self, function: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Run it on the loop and give its result; from another thread.

        What has not begun when this raises never will.

        Raises:
            PeerLostError: The loop has stopped.
            CommTimeoutError: It did not come to it in time, or not to its end in twice that.

        """
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as e:
                future.set_exception(e)

        if not self.call(call):
            raise PeerLostError("the channel is closed")
        try:
            try:
                return future.result(timeout_s)
            except TimeoutError:
                if future.cancel():
                    raise
            return future.result(timeout_s)  # it has begun, and cannot be taken back
        except BaseException as e:
            future.cancel()  # an interrupt of our caller's takes it back, too
            if not isinstance(e, TimeoutError) or (future.done() and not future.cancelled()):
                raise
            raise CommTimeoutError(f"the channel's thread is busy for {timeout_s:g} s") from e

    def at_end_of_turn(self, callback: Callable[[], None]) -> None:
        """Run it once what has come in this turn is handled."""
        self._last.append(callback)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Run it after a delay."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._ids), timer))
        return timer

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call back with the events when the socket is ready; replaces what was watched."""
        try:
            self._selector.modify(sock, events, callback)
        except KeyError:
            self._selector.register(sock, events, callback)

    def unwatch(self, sock: socket.socket) -> None:
        """Stop watching. Idempotent."""
        try:
            self._selector.unregister(sock)
        except (KeyError, ValueError):
            logger.debug("socket was not watched")

    def stop(self) -> None:
        """End the thread after the calls that are queued; from another thread. Idempotent."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._wake()
        self._thread.join()
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()

    def _wake(self) -> None:
        try:
            self._wake_w.send(b"x")
        except BlockingIOError:  # full of wake-ups already
            pass

    def _drain_wake(self, _: int) -> None:
        try:
            while self._wake_r.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _run(self) -> None:
        while True:
            self._run_calls()
            if self._stopping:
                self._run_calls()
                self._end_turn()
                return
            self._run_timers()
            self._end_turn()
            ready = self._selector.select(self._until_next())
            self._run_calls()  # before answers to what their callers have sent since
            watched = self._selector.get_map()
            for key, events in ready:
                if watched.get(key.fd) is key:
                    self._guard(functools.partial(key.data, events))

    def _end_turn(self) -> None:
        last, self._last = self._last, []
        for callback in last:
            self._guard(callback)

    def _run_calls(self) -> None:
        with self._lock:
            self._roused = False  # who comes from now on may find it asleep
        for _ in range(len(self._calls)):  # not those that these make: sockets have their turn
            self._guard(self._calls.popleft())

    def _run_timers(self) -> None:
        if len(self._timers) > 4096 and sum(t.callback is None for *_, t in self._timers) > 2048:
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].callback is None):
            _, _, timer = heapq.heappop(self._timers)
            if (callback := timer.callback) is not None:
                timer.cancel()  # who keeps the timer does not keep what it calls
                self._guard(callback)

    def _until_next(self) -> float | None:
        """Seconds until there is something to do besides sockets; None when nothing is known."""
        if self._calls:
            return 0.0
        if not self._timers:
            return None
        return min(max(0.0, self._timers[0][0] - time.monotonic()), _LONGEST_WAIT_S)

    @staticmethod
    def _guard(callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("a bug in the channel's event loop")
