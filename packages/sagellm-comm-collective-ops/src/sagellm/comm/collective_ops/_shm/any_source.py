"""A receive from whichever rank sends first."""

from __future__ import annotations

import threading
import time
from typing import Protocol, cast

from torch import Tensor

from sagellm.core.protocols import CommTimeoutError, ConfigError, Work

__all__ = ["AnySourceReceive"]

_LONGEST_NAP_S = 1e-3


class _Receiver(Protocol):
    """The part of a backend that receives."""

    timeout_s: float

    def recv(
        self, x: Tensor, src: int, tag: int = 0, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]: ...


class _Senders(Protocol):
    """The part of a transport that knows who has sent."""

    def sender_of(self, tag: int) -> int | None: ...


class AnySourceReceive:
    """One such receive: it becomes an ordinary one once a message with its tag has come.

    Messages are looked for while somebody waits or asks, not in between.
    """

    def __init__(self, backend: _Receiver, senders: _Senders | None, x: Tensor, tag: int) -> None:
        if senders is None:
            raise ConfigError("recv without a source needs a group of several ranks")
        self._backend, self._senders, self._x, self._tag = backend, senders, x, tag
        self._deadline = time.monotonic() + backend.timeout_s
        self._lock = threading.Lock()
        self._work: Work[Tensor] | None = None
        self._error: Exception | None = None
        self._source = -1

    @property
    def source(self) -> int:
        """The rank it came from; -1 until it is known."""
        return self._source

    def _look(self) -> Work[Tensor] | None:
        with self._lock:
            if self._work is None and self._error is None:
                try:
                    found = self._senders.sender_of(self._tag)
                    if found is not None:
                        work = self._backend.recv(self._x, found, self._tag, async_op=True)
                        self._source, self._work = found, cast("Work[Tensor]", work)
                except Exception as e:
                    self._error = e
            if self._error is not None:
                raise self._error
            return self._work

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Block until it is done; see `Work.wait`."""
        end = self._deadline if timeout_s is None else time.monotonic() + timeout_s
        nap_s = 0.0
        while (work := self._look()) is None:
            if time.monotonic() >= end:
                raise CommTimeoutError(
                    f"recv of {self._x.nbytes} bytes, tag {self._tag}, from any rank: none has "
                    f"sent within {self._backend.timeout_s} s"
                )
            time.sleep(nap_s)
            nap_s = min(nap_s * 1.3 + 5e-6, _LONGEST_NAP_S)
        return work.wait(None if timeout_s is None else max(0.0, end - time.monotonic()))

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        try:
            work = self._look()
        except Exception as e:
            return e is self._error
        return work is not None and work.done()

    def exception(self) -> BaseException | None:
        """What it failed with; None while it runs and after success."""
        return self._error or (None if self._work is None else self._work.exception())
