"""Messages that wait for their other half: offers nobody has received, fetches nobody offered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from . import wire
from ._link import Link
from ._room import Room

__all__ = ["Backlog"]

M = TypeVar("M", wire.Offer, wire.Fetch)


class Backlog(Generic[M]):
    """Waiting messages by link and transfer id; runs on the event loop.

    Args:
        max_count: Of one link at most.
        max_bytes: Memory that those of one link take at most, about.
        room: What those of all links together take.

    """

    def __init__(self, max_count: int, max_bytes: int, room: Room) -> None:
        self._room = room
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._by_link: dict[Link, dict[int, M]] = {}
        self._bytes: dict[Link, int] = {}
        self._by_id: dict[str, dict[tuple[Link, int], M]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_link.values()))

    def __contains__(self, name: tuple[Link, int]) -> bool:
        return name[1] in self._by_link.get(name[0], ())

    def __iter__(self) -> Iterator[tuple[Link, M]]:
        return iter([(k, m) for k, waiting in self._by_link.items() for m in waiting.values()])

    def add(self, link: Link, message: M) -> bool:
        """Keep one; False when its link has too many, they are too large, or all together are."""
        waiting = self._by_link.setdefault(link, {})
        size = wire.held_bytes(message)
        held = self._bytes.get(link, 0) + size
        if len(waiting) >= self._max_count or held > self._max_bytes or not self._room.take(size):
            return False
        waiting[message.tid] = message
        self._bytes[link] = held
        self._by_id.setdefault(message.id, {})[link, message.tid] = message
        return True

    def of(self, name: str) -> list[tuple[Link, M]]:
        """Those of one transfer, in the order in which they came."""
        return [(link, m) for (link, _), m in self._by_id.get(name, {}).items()]

    def pop(self, link: Link, tid: int) -> M | None:
        """Take one out; None when there is none."""
        message = self._by_link.get(link, {}).pop(tid, None)
        if message is None:
            return None
        size = wire.held_bytes(message)
        self._bytes[link] -= size
        self._room.give(size)
        named = self._by_id[message.id]
        del named[link, tid]
        if not named:
            del self._by_id[message.id]
        return message

    def get(self, link: Link, tid: int) -> M | None:
        """One of them; None when there is none."""
        return self._by_link.get(link, {}).get(tid)

    def replace(self, link: Link, message: M) -> None:
        """Put a message of the same name and size in the place of one that is kept."""
        self._by_link[link][message.tid] = message
        self._by_id[message.id][link, message.tid] = message

    def drop(self, link: Link) -> None:
        """Forget what came over a link that is gone."""
        for tid in list(self._by_link.get(link, ())):
            self.pop(link, tid)
        self._by_link.pop(link, None)
        self._bytes.pop(link, None)
