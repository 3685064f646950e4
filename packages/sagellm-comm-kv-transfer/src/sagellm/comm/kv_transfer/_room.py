"""Memory that what comes from all peers of a channel takes together, however many they are."""

from __future__ import annotations

import threading
from typing import Protocol

from sagellm.core.protocols import CommError, ResourceError

__all__ = ["Holder", "Pressed", "Room"]


class Room:
    """A bound that several keepers share. Thread-safe.

    Args:
        limit: Bytes that all of them keep at most, about.

    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Count bytes that are kept from now on; False, and nothing is, when they do not fit."""
        with self._lock:
            if self.used + size > self.limit:
                return False
            self.used += size
            return True

    def give(self, size: int) -> None:
        """Count bytes as free."""
        with self._lock:
            self.used -= size


class Holder(Protocol):
    """What holds memory that it can give back only by ending."""

    held_bytes: int

    def give_way(self, error: CommError) -> None:
        """End, and hold nothing any more."""
        ...


class Pressed:
    """Memory of control connections: whoever holds most of it ends when it becomes too much.

    So many peers that each stay within their own bound fill no memory, and one that reads what it
    is told and ends what it begins to say is the last to go. Runs on the event loop.

    Args:
        limit: Bytes that all hold together, about.

    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._holders: set[Holder] = set()
        self._relieving = False

    def hold(self, holder: Holder, more: int) -> None:
        """Count bytes that it holds from now on, or no longer; it may have to give way."""
        self.used += more
        holder.held_bytes += more
        if holder.held_bytes:
            self._holders.add(holder)
        else:
            self._holders.discard(holder)
        if self.used > self.limit and not self._relieving:
            self._relieve()

    def free(self, holder: Holder) -> None:
        """Count all that it holds as free. Idempotent."""
        self.hold(holder, -holder.held_bytes)

    def _relieve(self) -> None:
        """To end one says something to others, which may be too much in turn: no recursion."""
        self._relieving = True
        try:
            while self.used > self.limit and self._holders:
                most = max(self._holders, key=lambda h: h.held_bytes)
                most.give_way(
                    ResourceError(
                        f"control connections hold {self.used} bytes, more than max_control_bytes "
                        f"({self.limit}); this one holds most: {most.held_bytes}"
                    )
                )
                self.free(most)
        finally:
            self._relieving = False
