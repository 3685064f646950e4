"""What the channel remembers of transfers: those that run, and how the others ended."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

from sagellm.core.protocols import (
    CommError,
    Completion,
    KVTransferError,
    LayoutMismatchError,
    PeerLostError,
    ResourceError,
    TransferKey,
    error_from_code,
)

from . import wire
from .state import Event
from .transfer import Witness

__all__ = [
    "ABANDONED",
    "CANCELLED",
    "LEASE_EXPIRED",
    "MAX_MESSAGE",
    "CompletionQueue",
    "Memory",
    "bare",
    "code_of",
    "ending",
    "error_of",
    "error_of_code",
    "failure",
    "key_failure",
]

ABANDONED = "whoever began it was stopped before he had its handle"
CANCELLED = "cancelled"
LEASE_EXPIRED = "lease_expired"
MAX_MESSAGE = 2048
"""Characters that are kept of what a peer says went wrong."""

K = TypeVar("K")
V = TypeVar("V")


def code_of(error: BaseException) -> str:
    """What names an error on the wire."""
    if isinstance(error, KVTransferError):
        return error.cause
    return error.code if isinstance(error, CommError) else KVTransferError.code


def ending(error: BaseException) -> Event:
    """What an error is to the table of states."""
    return Event.CANCEL if code_of(error) == CANCELLED else Event.FAULT


def bare(error: CommError) -> CommError:
    """The same error without frames, which would keep alive what they hold: it is remembered."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def failure(tid: int, error: CommError) -> wire.Fail:
    """What tells a peer that a transfer is over."""
    text, ours, theirs = _told(error)
    return wire.Fail(tid, code_of(error), text, ours, theirs)


def key_failure(key: TransferKey, error: CommError) -> wire.KeyFail:
    """What tells every peer that an attempt is over."""
    text, ours, theirs = _told(error)
    return wire.KeyFail(key.id, key.attempt, code_of(error), text, ours, theirs)


def _told(error: CommError) -> tuple[str, str, str]:
    if not isinstance(error, LayoutMismatchError):
        return str(error)[:MAX_MESSAGE], "", ""
    bare = str(error).removesuffix(f"; ours: {error.ours}; theirs: {error.theirs}")
    return bare[:MAX_MESSAGE], error.ours[:MAX_MESSAGE], error.theirs[:MAX_MESSAGE]


def error_of(message: wire.Fail | wire.KeyFail) -> CommError:
    """The error that a peer named, seen from here: its layout is theirs."""
    ours, theirs = message.theirs[:MAX_MESSAGE], message.ours[:MAX_MESSAGE]
    return error_of_code(message.code, message.message[:MAX_MESSAGE], ours, theirs)


def error_of_code(code: str, text: str, ours: str, theirs: str) -> CommError:
    """The error of a code, as `code_of` names it; the layouts are for one that has them."""
    if code in (CANCELLED, LEASE_EXPIRED, KVTransferError.code):
        return KVTransferError(text, cause=code)
    if code == LayoutMismatchError.code:
        return LayoutMismatchError(text, ours=ours, theirs=theirs)
    return error_from_code(code, text)


class Memory(Generic[K, V]):
    """A bounded map that forgets what was put in first. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[K, V] = OrderedDict()
        self.get: Callable[[K], V | None] = self._items.get
        """What was put in; None when nothing was, or it is forgotten."""
        self._lock = threading.Lock()

    def __setitem__(self, key: K, value: V) -> None:
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self._limit:
                self._items.popitem(last=False)


class CompletionQueue:
    """Completions until `poll` takes them, with a descriptor that tells of them. Thread-safe.

    None is lost: when there are many, those go whose end somebody has seen on the handle, and when
    those are too few nothing new may begin.

    Args:
        limit: Completions, about; what was in flight when it was reached still finds room.

    """

    def __init__(self, limit: int) -> None:
        self._items: deque[tuple[Completion, Witness]] = deque()
        self._limit = limit
        self._sweep_at = limit + limit // 8 + 1
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._closed = False

    def put(self, completion: Completion, witness: Witness) -> None:
        """Add one."""
        with self._lock:
            if not self._items and self._pipe is not None:
                os.write(self._pipe[1], b"x")
            self._items.append((completion, witness))

    def check_room(self) -> None:
        """Refuse what would end with one completion too many.

        Raises:
            ResourceError: So many wait whose end nobody has seen.

        """
        if len(self._items) < self._sweep_at:
            return
        with self._lock:
            self._items = deque(item for item in self._items if not item[1].seen)
            if not self._items and self._pipe is not None:
                os.read(self._pipe[0], 1)
            count = len(self._items)
            full = count >= self._limit
            self._sweep_at = self._limit if full else self._limit + self._limit // 8 + 1
        if full:
            raise ResourceError(
                f"{count} completions wait for `poll`, and nobody has waited for their transfers; "
                f"max_remembered is {self._limit}: take them, then begin more"
            )

    def take(self, max_n: int | None) -> list[Completion]:
        """Those not taken before."""
        with self._lock:
            count = len(self._items) if max_n is None else min(max_n, len(self._items))
            taken = [self._items.popleft()[0] for _ in range(count)]
            if taken and not self._items and self._pipe is not None:
                os.read(self._pipe[0], 1)
            return taken

    def fileno(self) -> int:
        """Readable while there is something to take; made when it is first asked for.

        Raises:
            PeerLostError: It is closed.

        """
        with self._lock:
            if self._closed:
                raise PeerLostError("the channel is closed")
            if self._pipe is None:
                self._pipe = os.pipe()
                if self._items:
                    os.write(self._pipe[1], b"x")
            return self._pipe[0]

    def close(self) -> None:
        """Release the descriptor; what is queued can still be taken. Idempotent."""
        with self._lock:
            self._closed = True
            pipe, self._pipe = self._pipe, None
        for fd in pipe or ():
            os.close(fd)
