"""A thread that runs a group's calls in order, for callers who do not wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.process_group import RawCall, RawWork

from .forks import FORKED

__all__ = ["CallQueue", "FinishedWork", "QueuedWork"]


class FinishedWork(RawWork):
    """A call that is over."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def wait(self, timeout_s: float) -> bool:
        if self._error is not None:
            raise self._error
        return True

    synchronize = wait

    def done(self) -> bool:
        return True


class QueuedWork(RawWork):
    """A call that a thread will run, or has run."""

    def __init__(self, queue: CallQueue, call: RawCall) -> None:
        self.call: RawCall | None = call
        self._queue = queue
        self.inference = torch.is_inference_mode_enabled()
        self._over = threading.Event()
        self._error: Exception | None = None

    def end(self, error: Exception | None) -> None:
        """Say that it is over."""
        self._error = error
        self.call = None
        self._over.set()

    def wait(self, timeout_s: float) -> bool:
        if not self._over.is_set():
            if self._queue.forked:
                raise ConfigError(FORKED)
            if not self._over.wait(max(0.0, timeout_s)):
                return False
        if self._error is not None:
            raise self._error
        return True

    synchronize = wait

    def done(self) -> bool:
        return self._over.is_set() or self._queue.forked


class CallQueue:
    """Runs calls one after another; its thread starts with the first.

    Args:
        run: Runs one call to its end.
        name: Of the thread.
        on_change: Told True when calls begin to wait here, False when none do any more. Called
            under the queue's lock.

    Attributes:
        busy: Whether calls wait here, or one runs.
        forked: Whether this is a forked child's copy, which has no thread.

    """

    def __init__(
        self, run: Callable[[RawCall], None], name: str, on_change: Callable[[bool], None]
    ) -> None:
        self.busy = self.forked = False
        self._run = run
        self._name = name
        self._on_change = on_change
        self._works: deque[QueuedWork] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, call: RawCall) -> QueuedWork:
        """Have a call run after all the others."""
        work = QueuedWork(self, call)
        with self._changed:
            self._works.append(work)
            if not self.busy:
                self.busy = True
                self._on_change(True)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()
        return work

    def after_fork(self) -> None:
        """In a child: nothing that waits here will ever run."""
        self.forked = True

    def close(self, timeout_s: float) -> bool:
        """Run what is there and end the thread; whether it ended in time."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
            return not thread.is_alive()
        return True

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._works:
                    if self.busy:
                        self.busy = False
                        self._on_change(False)
                    if self._closed:
                        return
                    self._changed.wait()
                work = self._works[0]
            error: Exception | None = None
            call = work.call
            assert call is not None
            try:
                with torch.inference_mode(work.inference):
                    self._run(call)
            except Exception as e:  # reaches whoever waits for the work
                error = e
            del call
            with self._changed:
                self._works.popleft()
                last = not self._works
                if last:
                    self.busy = False
                    self._on_change(False)
            work.end(error)
            del work
