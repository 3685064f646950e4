"""The handle that tensor backends return: deadlines, results, hooks, and torch futures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from sagellm.core.protocols.comm_types import CommCall
from sagellm.core.protocols.errors import CommTimeoutError

from .recorder import Record
from .transport import RawWork

__all__ = ["GroupWork", "WorkOwner", "completed_future"]

T = TypeVar("T")


def completed_future(
    result: object, error: BaseException | None = None
) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
    """A torch future that is already set to `result`, or to `error`."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    _settle(future, result, error)
    return future


def _settle(future: torch.futures.Future[Any], result: object, error: BaseException | None) -> None:
    if isinstance(error, Exception):
        future.set_exception(error)
    else:
        future.set_result(result)


class WorkOwner(Protocol):
    """What a work tells the backend that made it."""

    def work_done(
        self, record: Record, call: CommCall | None, *, timed: bool, raws: Sequence[RawWork]
    ) -> None:
        """Count it and run the hooks."""
        ...

    def work_failed(self, record: Record, call: CommCall | None, error: Exception) -> Exception:
        """Declare the group dead, run the hooks, and return the error to raise."""
        ...


class GroupWork(Generic[T]):
    """A `Work` over one or more primitive works of a transport.

    Args:
        owner: The backend.
        record: What was called.
        call: The same as hooks saw it, None without hooks.
        raws: Primitive works; the work is done when all are.
        finish: Makes the result, once, in the thread or stream that waits first.
        timeout_s: The group's deadline for this call, counted from now.
        on_device: Whether `wait` only orders a stream.

    """

    def __init__(
        self,
        owner: WorkOwner,
        record: Record,
        call: CommCall | None,
        raws: Sequence[RawWork],
        finish: Callable[[], T],
        timeout_s: float,
        *,
        on_device: bool,
    ) -> None:
        self._owner = owner
        self._record = record
        self._call = call
        self._raws = raws
        self._finish: Callable[[], T] | None = finish
        self._timeout_s = timeout_s
        self._started = time.monotonic()
        self._on_device = on_device
        # Held while settling only, so that a blocked waiter never keeps another from polling.
        self._lock = threading.RLock()
        self._result: T | None = None
        self._error: Exception | None = None
        self._settled = False

    def wait(self, timeout_s: float | None = None) -> T:
        """Order the caller after the work and return its result; see `Work.wait`."""
        return self._await(timeout_s, host=False)

    def synchronize(self, timeout_s: float | None = None) -> T:
        """Block the host until the work is done, then return its result."""
        return self._await(timeout_s, host=True)

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._settled or all(raw.done() for raw in self._raws)

    def exception(self) -> BaseException | None:
        """What it failed with; None while it runs and after success."""
        if not self._settled and self.done():
            try:
                self._await(0, host=False)
            except Exception as e:
                return e
        return self._error

    def result(self) -> T:
        """The result of a finished work."""
        return self._await(0, host=False)

    def get_future(self) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
        """A torch future of the result, set by a thread when the work ends."""
        if self._settled:
            return completed_future(self._result, self._error)
        future: torch.futures.Future[Any] = torch.futures.Future()

        def run() -> None:
            try:
                result = self.wait()
            except Exception as e:
                _settle(future, None, e)
            else:
                _settle(future, result, None)

        threading.Thread(target=run, name="sagellm-comm-future", daemon=True).start()
        return future

    def __await__(self) -> Generator[Any, None, T]:
        """Wait on a thread, so that the event loop runs on."""
        loop = asyncio.get_running_loop()
        return asyncio.shield(loop.run_in_executor(None, self.synchronize)).__await__()

    def _await(self, timeout_s: float | None, *, host: bool) -> T:
        if not self._settled or (host and self._on_device):
            deadline = self._started + self._timeout_s
            now = time.monotonic()
            end = deadline if timeout_s is None else now + timeout_s
            for raw in self._raws:
                left = max(0.0, end - time.monotonic())
                try:
                    over = raw.synchronize(left) if host else raw.wait(left)
                except Exception as e:  # whatever the library beneath raised
                    self._fail(e)
                    break
                if not over:
                    if timeout_s is None or time.monotonic() >= deadline:
                        self._fail(CommTimeoutError(f"not done within {self._timeout_s} s"))
                        break
                    raise CommTimeoutError(
                        f"{self._record.text} is still in flight after {timeout_s} s; it goes on"
                    )
            self._complete(host)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by _complete whenever _error is not

    def _fail(self, cause: Exception) -> None:
        with self._lock:
            if self._settled:
                return
            error = self._owner.work_failed(self._record, self._call, cause)
            if error is not cause:
                error.__cause__ = cause
            self._error = error
            self._finish = None
            self._raws = ()
            self._settled = True

    def _complete(self, host: bool) -> None:
        with self._lock:
            if self._settled:
                return
            assert self._finish is not None
            try:
                self._result = self._finish()
                timed = host or not self._on_device
                self._owner.work_done(self._record, self._call, timed=timed, raws=self._raws)
            except Exception as e:  # a hook's error, or one of lowering: both end the group
                self._error = e
                self._settled = True
                raise
            self._finish = None
            self._settled = True
