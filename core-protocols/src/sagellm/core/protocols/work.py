"""The handle of a communication that may still be in flight."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import torch

__all__ = ["CompletedWork", "Work"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Work(Protocol[T_co]):
    """A communication that has been started.

    Until the work is done its buffers belong to the transport: writing an input or reading
    an output before then is a data race. The transport keeps them alive; the handle itself
    may be dropped, and dropping it cancels nothing.

    Every method may be called from any thread and more than once.
    """

    def wait(self, timeout_s: float | None = None) -> T_co:
        """Order the caller after the work and return its result.

        On a CPU this blocks until the work is done. On a device it makes the caller's
        current stream wait, as torch does, and returns without a host synchronisation.

        Args:
            timeout_s: Longest wait in seconds; None is the group's deadline (never for
                ever), 0 polls. On a device the group's watchdog keeps the deadline.

        Raises:
            CommTimeoutError: Still in flight. The work goes on: wait again, or give up the
                whole group.
            PeerLostError: A rank is gone, and the contents of the buffers are undefined.

        """
        ...

    def synchronize(self, timeout_s: float | None = None) -> T_co:
        """Block the host until the work is done on every device, then return its result.

        Raises:
            CommTimeoutError: As in `wait`.
            PeerLostError: As in `wait`.

        """
        ...

    def done(self) -> bool:
        """Whether `wait` would return or raise at once. Never blocks."""
        ...

    def exception(self) -> BaseException | None:
        """What the work failed with; None while it runs and after success. Never blocks."""
        ...

    def result(self) -> T_co:
        """The result of a finished work; the same as `wait(0)`."""
        ...

    def get_future(self) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
        """A torch future of the result, for torch APIs that chain callbacks."""
        ...

    def __await__(self) -> Generator[Any, None, T_co]:
        """Wait without blocking the running event loop. Timeouts are the caller's.

        Cancelling the awaiter never cancels the work: peers can see it.
        """
        ...


class CompletedWork(Generic[T]):
    """A `Work` that was over before it was handed out.

    >>> work = CompletedWork(3)
    >>> work.wait(), work.done(), work.exception()
    (3, True, None)
    """

    __slots__ = ("_error", "_result")

    def __init__(self, result: T, error: BaseException | None = None) -> None:
        self._result = result
        self._error = error

    def wait(self, timeout_s: float | None = None) -> T:
        """Return the result, or raise what the work failed with."""
        if self._error is not None:
            raise self._error
        return self._result

    def synchronize(self, timeout_s: float | None = None) -> T:
        """Return the result, or raise what the work failed with."""
        return self.wait(timeout_s)

    def done(self) -> bool:
        """Return True."""
        return True

    def exception(self) -> BaseException | None:
        """Return what the work failed with, or None."""
        return self._error

    def result(self) -> T:
        """Return the result, or raise what the work failed with."""
        return self.wait(0)

    def get_future(self) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
        """Return a torch future that is already set."""
        from .process_group import completed_future

        return completed_future(self._result, self._error)

    def __await__(self) -> Generator[Any, None, T]:
        """Return the result without suspending."""
        return self.wait(0)
        yield  # makes this a generator, which is what `await` needs
