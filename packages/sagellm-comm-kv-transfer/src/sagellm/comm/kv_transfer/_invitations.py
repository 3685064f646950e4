"""What peers are ready to receive from this node, told ahead so that no offer is needed."""

from __future__ import annotations

import threading

from sagellm.core.protocols import TransferKey

from . import wire
from ._room import Room

__all__ = ["Invitations"]


class Invitations:
    """Invitations over one link that nobody has taken yet. Thread-safe.

    To forget one is always right: the transfer then begins with an offer.

    Args:
        max_count: Kept at most; the oldest goes.
        max_bytes: Memory they take at most, about.
        room: What those of all links together take; what finds none is not kept.

    """

    def __init__(self, max_count: int, max_bytes: int, room: Room) -> None:
        self._room = room
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._bytes = 0
        self._by_tid: dict[int, wire.Invite] = {}
        self._tids: dict[TransferKey, int] = {}
        self._lock = threading.Lock()
        self._newest = wire.INVITED - 1

    def __len__(self) -> int:
        return len(self._by_tid)

    def fresh(self, tid: int) -> bool:
        """Whether a tid is one that an honest peer may use next; notes it."""
        if not self._newest < tid < 1 << 32:
            return False
        self._newest = tid
        return True

    def add(self, invite: wire.Invite) -> None:
        """Keep one; a newer one of a key replaces the older."""
        with self._lock:
            key = TransferKey(invite.id, invite.attempt)
            if (old := self._tids.get(key)) is not None:
                self._drop(old)
            size = wire.held_bytes(invite)
            while self._by_tid and (
                len(self._by_tid) >= self._max_count or self._bytes + size > self._max_bytes
            ):
                self._drop(next(iter(self._by_tid)))
            if size > self._max_bytes or not self._room.take(size):
                return
            self._by_tid[invite.tid] = invite
            self._tids[key] = invite.tid
            self._bytes += size

    def take(self, key: TransferKey) -> wire.Invite | None:
        """The invitation of a key, which only one caller gets."""
        with self._lock:
            tid = self._tids.get(key)
            return None if tid is None else self._drop(tid)

    def forget(self, tid: int) -> wire.Invite | None:
        """The peer has withdrawn one; None when it was not kept."""
        with self._lock:
            return self._drop(tid) if tid in self._by_tid else None

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._room.give(self._bytes)
            self._by_tid.clear()
            self._tids.clear()
            self._bytes = 0

    def _drop(self, tid: int) -> wire.Invite:
        invite = self._by_tid.pop(tid)
        del self._tids[TransferKey(invite.id, invite.attempt)]
        size = wire.held_bytes(invite)
        self._bytes -= size
        self._room.give(size)
        return invite
