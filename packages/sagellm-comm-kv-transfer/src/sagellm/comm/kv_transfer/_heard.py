"""What peers say has failed, kept for transfers that this node has not begun."""

from __future__ import annotations

import threading
from collections import OrderedDict

from sagellm.core.protocols import CommError, LayoutMismatchError, TransferKey

from ._records import code_of, error_of_code

__all__ = ["HEARD_BYTES", "Heard"]

HEARD_BYTES = 8 << 20
"""What those of all peers take together, about."""
_TEXT = 200
"""Characters that are kept of what a peer says."""
_ENTRY_BYTES = 1024
"""Of the objects, about, besides their texts."""


class Heard:
    """Errors by peer and attempt, within bounds of number and memory. Thread-safe.

    When there are too many, the peer whose word takes most memory has its oldest forgotten: what
    one says costs no other.

    Args:
        limit: Errors of all peers at most.
        max_bytes: Their memory at most, about.

    """

    def __init__(self, limit: int, max_bytes: int = HEARD_BYTES) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._peers: dict[int, OrderedDict[TransferKey, tuple[CommError, int]]] = {}
        self._bytes: dict[int, int] = {}
        self._count = self._used = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Memory that they take, about."""
        return self._used

    def get(self, name: tuple[int, TransferKey]) -> CommError | None:
        """What a peer has said of an attempt; None when it has not, or that is forgotten."""
        with self._lock:
            kept = self._peers.get(name[0], {}).get(name[1])
            return None if kept is None else kept[0]

    def __setitem__(self, name: tuple[int, TransferKey], error: CommError) -> None:
        peer, key = name
        kept, size = _shortened(error)
        size += _ENTRY_BYTES + 4 * len(key.id)
        with self._lock:
            self._forget(peer, key)
            self._peers.setdefault(peer, OrderedDict())[key] = (kept, size)
            self._count_in(peer, 1, size)
            while self._count > self._limit or self._used > self._max_bytes:
                most = max(self._bytes, key=lambda n: self._bytes[n])
                self._forget(most, next(iter(self._peers[most])))

    def _forget(self, peer: int, key: TransferKey) -> None:
        known = self._peers.get(peer, OrderedDict())
        if (kept := known.pop(key, None)) is not None:
            self._count_in(peer, -1, -kept[1])
        if not known and peer in self._peers:
            del self._peers[peer], self._bytes[peer]

    def _count_in(self, peer: int, count: int, size: int) -> None:
        self._count += count
        self._used += size
        self._bytes[peer] = self._bytes.get(peer, 0) + size


def _shortened(error: CommError) -> tuple[CommError, int]:
    """The same error in few words, and the bytes that they may take."""
    text, ours, theirs = str(error)[:_TEXT], "", ""
    if isinstance(error, LayoutMismatchError):
        ours, theirs = error.ours[:_TEXT], error.theirs[:_TEXT]
    return error_of_code(code_of(error), text, ours, theirs), 4 * len(text + 2 * (ours + theirs))
