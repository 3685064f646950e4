"""What process groups of ours return: works that torch's Python and C++ callers can wait for.

The value of a work's future is its list of tensors: DDP's reducer reads it in C++ and crashes the
process on anything else.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sagellm.comm.collective_ops._shm.forks import release_in_children
from sagellm.core.protocols import Work
from sagellm.core.protocols.process_group import completed_future

__all__ = ["BackendWork", "Completer", "DoneWork", "OwnWork"]

Future = torch.futures.Future[Any]  # Any: torch fixes the value type per backend

_KEPT_AT_MOST = 4096


def _torch_keeps_works() -> bool:
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)


class OwnWork(dist.Work):
    """A work in Python that may be handed to C++.

    The C++ side of torch 2.6 keeps its half of such a work only, and waits for ever on what is
    left when Python drops the other half: there, works stay until they are waited for.
    """

    _keeps = _torch_keeps_works()
    _kept: ClassVar[dict[int, OwnWork]] = {}

    def __init__(self) -> None:
        super().__init__()
        if not self._keeps:
            self._kept[id(self)] = self
            if len(self._kept) > _KEPT_AT_MOST:
                self._kept.pop(next(iter(self._kept)), None)

    def _let_go(self) -> None:
        if not self._keeps:
            self._kept.pop(id(self), None)


class DoneWork(OwnWork):
    """A call that ended before it returned; one object serves all calls without an own result."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._tensors = list(tensors)

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._keeps:
            self._let_go()
        return True

    def synchronize(self) -> None:
        return None

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._tensors

    def get_future(self) -> Future:
        return completed_future(self._tensors)


class Completer:
    """Sets the futures of one group's works in the order of the calls, on a thread of its own."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        release_in_children(self)

    def submit(self, complete: Callable[[], None]) -> None:
        """Run `complete` after all that were submitted before."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_complete_all, args=(self._queue,), name="sagellm-c10d", daemon=True
                )
                self._thread.start()
        self._queue.put(complete)

    def close(self) -> None:
        """End the thread once it has run what was submitted."""
        with self._lock:
            if self._thread is not None:
                self._thread = None
                self._queue.put(None)

    def after_fork(self) -> None:
        """In a forked child, which does not have the thread: what is submitted starts another."""
        self._queue, self._thread, self._lock = queue.SimpleQueue(), None, threading.Lock()


def _complete_all(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


class BackendWork(OwnWork):
    """A torch work over works of a backend.

    Args:
        works: All must end; waited for in this order.
        tensors: Value of the future.
        finish: Run once, by whoever waits first, when all have ended.
        completer: Sets futures in order; None gives each a thread, for calls without an order.
        source: Rank that a receive came from; a function, asked once it is done.

    """

    def __init__(
        self,
        works: Sequence[Work[Any]],  # Any: results differ by operation
        tensors: Sequence[Tensor],
        finish: Callable[[], object] | None = None,
        completer: Completer | None = None,
        source: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self._works = works
        self._tensors = list(tensors)
        self._finish = finish
        self._completer = completer
        self._source = source
        self._lock = threading.Lock()
        self._settled = False
        self._error: BaseException | None = None
        # whoever finishes writes the caller's tensors as the caller could
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()

    @property
    def works(self) -> Sequence[Work[Any]]:  # Any: results differ by operation
        """What is waited for."""
        return self._works

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._let_go()
        if not self._settled:
            limit = None if timeout is None else timeout.total_seconds()
            end = time.monotonic() + limit if limit is not None and limit > 0 else None
            for work in self._works:
                work.wait(None if end is None else max(0.0, end - time.monotonic()))
            with self._lock:
                if not self._settled:
                    try:
                        if self._finish is not None:
                            with torch.inference_mode(self._inference):
                                with torch.set_grad_enabled(self._grad and not self._inference):
                                    self._finish()
                    except Exception as e:
                        self._error = e
                        raise
                    finally:
                        self._finish = None
                        self._settled = True
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        if self._settled:
            return True
        if not all(work.done() for work in self._works):
            return False
        with contextlib.suppress(Exception):  # `wait` and `exception` give it again
            self.wait()  # nothing blocks; results are where the caller reads them
        return True

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        for work in self._works:
            error = work.exception()
            if error is not None:
                return error
        return self._error

    def result(self) -> list[Tensor]:
        return self._tensors

    def source_rank(self) -> int:
        return -1 if self._source is None else self._source()

    _source_rank = source_rank

    def get_future(self) -> Future:
        self._let_go()
        if self._settled and self._error is None:
            return completed_future(self._tensors)
        future: Future = torch.futures.Future()

        def complete() -> None:
            try:
                self.wait()
            except Exception as e:
                future.set_exception(e)
            else:
                future.set_result(self._tensors)

        if self._completer is not None:
            self._completer.submit(complete)
        else:
            threading.Thread(target=complete, name="sagellm-c10d-future", daemon=True).start()
        return future
