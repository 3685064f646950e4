"""How long a phase lasts: the timer that the table asks for."""

from __future__ import annotations

import time
from collections.abc import Callable

from ._loop import EventLoop, Timer
from .settings import KVTransferSettings
from .state import RULES, Limit
from .transfer import TransferHandle

__all__ = ["Watch"]


class Watch:
    """Ends the phases of one transfer in time; runs on the event loop.

    Args:
        loop: The loop.
        handle: The transfer.
        settings: `quiesce_s` is how long its threads may take to leave its blocks while nothing
            moves, `io_timeout_s` how long in any case.
        moved_bytes: Grows while something moves.
        at_deadline: Called when its deadline has passed.
        break_off: Called when its threads have not left.

    """

    def __init__(
        self,
        loop: EventLoop,
        handle: TransferHandle,
        settings: KVTransferSettings,
        moved_bytes: Callable[[], int],
        at_deadline: Callable[[], None],
        break_off: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._handle = handle
        self._settings = settings
        self._moved_bytes = moved_bytes
        self._at_deadline = at_deadline
        self._break_off = break_off
        self._limit = Limit.NONE
        self._timer: Timer | None = None

    def follow(self) -> None:
        """Keep the limit of the phase that the transfer is in now."""
        limit = RULES[self._handle.phase].limit
        if limit is self._limit:
            return
        self._limit = limit
        if self._timer is not None:
            self._timer.cancel()
        if limit is Limit.DEADLINE:
            self._timer = self._loop.call_later(self._handle.left_s, self._at_limit)
        elif limit is Limit.QUIESCE:
            end = time.monotonic() + self._settings.io_timeout_s
            self._await_quiet(self._moved_bytes(), end)

    def _await_quiet(self, moved: int, end: float) -> None:
        """Look after a while whether its frame is slow, or stuck."""

        def look() -> None:
            now = self._moved_bytes()
            if now == moved or time.monotonic() >= end:
                self._break_off()
            else:
                self._await_quiet(now, end)

        self._timer = self._loop.call_later(self._settings.quiesce_s, look)

    def _at_limit(self) -> None:
        """Look whether the deadline, which a renewal may have moved, has passed."""
        if self._handle.expire():
            self._at_deadline()
        else:
            self._timer = self._loop.call_later(self._handle.left_s, self._at_limit)
