"""The threads that encode and decode for one channel, and the memory they may use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sagellm.core.protocols import CommTimeoutError, PeerLostError

__all__ = ["CodecThreads", "Credits"]


class Credits:
    """Bytes that may be held at once. Thread-safe.

    A single taker of more than all of it gets it when nobody else holds any.

    Args:
        limit: Bytes.

    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.most = 0
        """The largest that `used` has been."""
        self._changed = threading.Condition()
        self._waiting: dict[Callable[[], object], None] = {}  # in order
        self._closed = False

    def _fits(self, count: int) -> bool:
        return not self.used or self.used + count <= self.limit

    def _grant(self, count: int) -> None:
        self.used += count
        self.most = max(self.most, self.used)

    def try_take(self, count: int, again: Callable[[], object]) -> bool:
        """Take so many; False when they are not free, and `again` is called once some are.

        It is called on the thread that gives some back, and must not block.
        """
        with self._changed:
            if self._closed:
                return False
            if not self._fits(count):
                self._waiting[again] = None
                return False
            self._grant(count)
            return True

    def take(self, count: int, timeout_s: float) -> None:
        """Take so many, waiting for them.

        Raises:
            CommTimeoutError: Not free in time.
            PeerLostError: The channel is closed.

        """
        with self._changed:
            free = self._changed.wait_for(lambda: self._closed or self._fits(count), timeout_s)
            if self._closed:
                raise PeerLostError("the channel is closed")
            if not free:
                raise CommTimeoutError(
                    f"{self.used} of {self.limit} bytes for coded sections stayed in use for "
                    f"{timeout_s:g} s"
                )
            self._grant(count)

    def give(self, count: int) -> None:
        """Give so many back."""
        with self._changed:
            self.used -= count
            self._changed.notify_all()
            woken, self._waiting = self._waiting, {}
        for again in woken:
            again()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()


class CodecThreads:
    """A bounded number of threads, started when there is work, ended by `close`.

    Args:
        name: Prefix of the threads' names.
        workers: Threads at most.
        limit: Bytes of sections, coded and not, that each direction may hold.

    """

    def __init__(self, name: str, workers: int, limit: int) -> None:
        self.workers = workers
        self.encoding = Credits(limit)
        self.decoding = Credits(limit)
        self._pool = ThreadPoolExecutor(workers, name, _work_alone)

    def submit(self, job: Callable[[], object]) -> bool:
        """Have a job run, which must not raise; False when the channel is closed."""
        try:
            self._pool.submit(job)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Wait for the jobs under way, which are short, and end the threads. Idempotent."""
        self.encoding.close()
        self.decoding.close()
        self._pool.shutdown(wait=True)


def _work_alone() -> None:
    """Have torch use this thread only for what this thread asks of it.

    Sections are small: helpers that each operation waits for cost more than they bring, and on a
    busy machine every wait lasts a time slice. torch also takes the number for threads that
    begin later, hence what was goes back to it from a thread that ends at once.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,), name="kv-codec-set")
    restorer.start()
    restorer.join()
