"""How long a phase lasts: the timer that the table asks for."""

from __future__ import annotations

from collections.abc import Callable

from ._loop import EventLoop, Timer
from .state import RULES, Limit
from .transfer import TransferHandle

__all__ = ["Watch"]


class Watch:
    """Ends the phases of one transfer in time; runs on the event loop.

    Args:
        loop: The loop.
        handle: The transfer.
        quiesce_s: How long its threads may take to leave its blocks.
        at_deadline: Called when its deadline has passed.
        break_off: Called when its threads have not left.

    """

    def __init__(
        self,
        loop: EventLoop,
        handle: TransferHandle,
        quiesce_s: float,
        at_deadline: Callable[[], None],
        break_off: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._handle = handle
        self._quiesce_s = quiesce_s
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
            self._timer = self._loop.call_later(self._quiesce_s, self._break_off)

    def _at_limit(self) -> None:
        """Look whether the deadline, which a renewal may have moved, has passed."""
        if self._handle.expire():
            self._at_deadline()
        else:
            self._timer = self._loop.call_later(self._handle.left_s, self._at_limit)
