"""What a forked child must let go of."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

__all__ = ["FORKED", "Forkable", "release_in_children"]

FORKED = (
    "this process is a forked child: a group belongs to the process that made it; "
    "make a new one here, or start the child with spawn"
)


class Forkable(Protocol):
    """Something that a forked child cannot use."""

    def after_fork(self) -> None:
        """Let go of descriptors and refuse further use; runs in the child."""
        ...


_held: weakref.WeakSet[Forkable] = weakref.WeakSet()
_lock = threading.Lock()
_registered = False


def release_in_children(thing: Forkable) -> None:
    """Call `thing.after_fork()` in every child forked from now on, while `thing` lives."""
    global _registered
    with _lock:
        if not _registered:
            os.register_at_fork(after_in_child=_run)
            _registered = True
    _held.add(thing)


def _run() -> None:
    for thing in list(_held):
        thing.after_fork()
