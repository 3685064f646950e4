"""Where a sender shows its peers which of its words still hold.

A peer that copies out of our memory may be stopped in the middle and go on long after we have
given the blocks back. So every transfer that refers to memory has a slot on a board that
peers can read, with the number of its pledge in it: a copy counts only if the number is still
there afterwards. Taking the word back is one store; nobody has to be asked.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import Pledge

from ._segment import Segment

__all__ = ["BOARD_BYTES", "Board", "BoardPledge"]

BOARD_BYTES = 1 << 16


class Board:
    """The slots of one sender. Thread-safe.

    Raises:
        ResourceError: No memory or descriptors are left.
        UnsupportedOperationError: The system cannot share it.

    """

    def __init__(self) -> None:
        self.segment = Segment(BOARD_BYTES, "a board of pledges")
        try:
            self.segment.seal(share=False)
        except BaseException:
            self.segment.close()
            raise
        self._words: NDArray[np.uint64] = self.segment.memory.view(np.uint64)
        self._free = list(range(len(self._words)))
        self._next = 1
        self._lock = threading.Lock()

    def pledge(self) -> BoardPledge | None:
        """A fresh pledge; None when every slot is taken."""
        with self._lock:
            if not self._free:
                return None
            slot, number = self._free.pop(), self._next
            self._next += 1
            self._words[slot] = number
            return BoardPledge(self, slot, number)

    def revoke(self, slot: int, number: int) -> None:
        """Empty a slot, if it holds that pledge."""
        with self._lock:
            if slot < len(self._words) and self._words[slot] == number:
                self._words[slot] = 0
                self._free.append(slot)

    def close(self) -> None:
        """Take everything back. Idempotent."""
        with self._lock:
            self._free.clear()
            self._words[:] = 0
            self._words = self._words[:0].copy()  # lets go of the memory
        self.segment.close()


class BoardPledge(Pledge):
    """A number in a slot of a board."""

    def __init__(self, board: Board, slot: int, number: int) -> None:
        self.slot = slot
        self.number = number
        self._board = board

    def revoke(self) -> None:
        """Take it back."""
        self._board.revoke(self.slot, self.number)
