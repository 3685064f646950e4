"""Keeps the deadlines of works that nobody blocks on: those of devices."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1


class Watchdog:
    """A thread that polls works until they are done, and reports the ones that are late.

    It starts with the first work and ends with `close`. Works that belong to a graph capture
    must not be given to it: polling them would break the capture.
    """

    def __init__(self, name: str, *, poll_s: float = _POLL_S) -> None:
        self._name = name
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._works: list[tuple[Callable[[], bool], float, Callable[[], None]]] = []
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def watch(
        self, done: Callable[[], bool], timeout_s: float, expired: Callable[[], None]
    ) -> None:
        """Call `expired` once, from the watchdog's thread, unless `done` in time."""
        with self._lock:
            if self._closed:
                return
            self._works.append((done, time.monotonic() + timeout_s, expired))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"sagellm-comm-watchdog-{self._name}", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """End the thread; safe more than once and from the thread itself."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5 * self._poll_s + 1)

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                works, self._works = self._works, []
            left = []
            for work in works:
                done, deadline, expired = work
                if _is_over(done):
                    continue
                if time.monotonic() < deadline:
                    left.append(work)
                else:
                    expired()
            with self._lock:
                self._works = left + self._works
                idle = not self._works
                self._wake.clear()
                if self._closed:
                    return
            self._wake.wait(None if idle else self._poll_s)


def _is_over(done: Callable[[], bool]) -> bool:
    try:
        return done()
    except Exception as e:  # a failed work is over: its error reaches whoever waits for it
        logger.debug("a watched work failed: %s", e)
        return True
