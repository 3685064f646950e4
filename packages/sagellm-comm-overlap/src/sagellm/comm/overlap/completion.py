"""Waiting, with a deadline, for whatever a task may return.

A handle is a `Work` or `Transfer` of these packages, a `torch.distributed.Work`, a torch or a
concurrent `Future`, or a list or tuple that holds one (a tensor with its work, None for a peer that
is the rank itself). Anything else is a value that is there already.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch

from sagellm.core.protocols import CommTimeoutError

from ._values import Foreign

__all__ = ["StillRunning", "is_handle", "note_end", "resolve"]

_NO_HANDLES = (torch.Tensor, str, bytes, int, float, dict)
_TorchWork: type | None = torch.distributed.Work if torch.distributed.is_available() else None


class StillRunning(Exception):  # noqa: N818  # a state on the way to CommTimeoutError, not an error
    """The deadline passed before the handle was done; its buffers are still in use."""


def is_handle(value: object) -> bool:
    """Whether a task's return value must be waited for."""
    if value is None or isinstance(value, _NO_HANDLES):
        return False
    if isinstance(value, (list, tuple)):
        return any(map(is_handle, value))
    kind = type(value)
    if isinstance(value, (Future, torch.futures.Future)):
        return True
    return callable(getattr(kind, "wait", None)) and callable(getattr(kind, "exception", None))


def note_end(handle: object) -> list[float]:
    """A list that gets the time at which a handle ended, on `time.perf_counter`, once it has.

    It stays empty for handles that tell nobody: some of torch's works, and those of which a thread
    each would have to wait.
    """
    ended: list[float] = []
    future: Foreign = handle
    if _TorchWork is not None and isinstance(handle, _TorchWork):
        try:
            future = handle.get_future()  # type: ignore[attr-defined]  # the stub of Work has nothing
        except RuntimeError:  # gloo's point-to-point works have none
            return ended
    if isinstance(future, (Future, torch.futures.Future)):
        future.add_done_callback(lambda _: ended.append(time.perf_counter()))
    return ended


def resolve(
    value: Foreign, timeout_s: float
) -> Foreign:  # Any: the handle's result, whatever it is
    """Block until a handle is done and return its result.

    The result of a `torch.distributed.Work` is the work itself: torch writes into the buffers.

    Raises:
        StillRunning: Not done within `timeout_s`.
        Exception: What the handle failed with.

    """
    if isinstance(value, (list, tuple)):
        deadline = time.monotonic() + timeout_s
        results = [
            resolve(one, deadline - time.monotonic()) if is_handle(one) else one for one in value
        ]
        return results if isinstance(value, list) else tuple(results)
    timeout_s = max(timeout_s, 0.001)
    if isinstance(value, Future):
        return _concurrent(value, timeout_s)
    if isinstance(value, torch.futures.Future):
        return _torch_future(value, timeout_s)
    if _TorchWork is not None and isinstance(value, _TorchWork):
        return _torch_work(value, timeout_s)
    try:
        return value.wait(timeout_s)
    except CommTimeoutError as error:
        raise StillRunning(str(error)) from error


def _concurrent(future: Future[Any], timeout_s: float) -> Foreign:  # the future's own type
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        if not future.done():
            raise StillRunning(f"future not done after {timeout_s:.3g} s") from error
        return future.result()  # it ended just now, perhaps with a TimeoutError of its own


def _torch_future(future: torch.futures.Future[Any], timeout_s: float) -> Foreign:  # as above
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    if not done.wait(timeout_s):
        raise StillRunning(f"torch future not done after {timeout_s:.3g} s")
    return future.wait()


def _torch_work(
    work: Foreign, timeout_s: float
) -> Foreign:  # torch.distributed.Work, which has no stub
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        if not work.is_completed():
            raise StillRunning(str(error)) from error
        work.wait()  # it ended just now: raises what it failed with, if it did
    return work
