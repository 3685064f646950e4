"""Copy workers: processes that write one pool, so that copying needs none of our GIL."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import ResourceError

from ._copy_worker import COPY, HEAD, MAP, UNMAP

U64 = NDArray[np.uint64]

__all__ = ["CopyWorkers", "Job", "Working"]

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_START_S = 30.0
_PATIENCE_S = 2.0
"""For a worker whose transfer has ended: one that is killed is not replaced."""
_MAX_REPLY = 1 << 20
_TUNABLES = "glibc.cpu.x86_non_temporal_threshold=0x8000"
"""Blocks go around the cache: 1.2 times as fast as in this process in blocks of 64 KiB, 1.6 times
in blocks of 1 MiB. Other C libraries, and glibc on other CPUs, pass over it."""


class Job(NamedTuple):
    """What to copy into the pool, and how to check it.

    Attributes:
        files: Size and descriptor of each memory file that is read, by a number of its own.
        stretches: Columns file, offset in it, offset in the pool, bytes.
        batches: Rows of stretches from, to, and units from, to, copied and checked in turn.
        units: Columns offset in the pool, bytes, seed and sum; no columns to check nothing.

    """

    files: Mapping[int, tuple[int, int]]
    stretches: U64
    batches: U64
    units: U64


class CopyWorkers:
    """Processes that map one pool for writing. Thread-safe; each serves one job at a time.

    They map the pool before it is sealed against further writers, so that a worker which dies
    is not replaced: the rest do its work, and without any the caller does. They end when this
    process does, however it ends.

    Args:
        fd: Of the pool.
        nbytes: Of the pool.
        count: How many.
        shares: Whether the caller copies, too: then a job is a part of what it has to do.

    Raises:
        ResourceError: They could not be started.

    """

    def __init__(self, fd: int, nbytes: int, count: int, *, shares: bool = False) -> None:
        self.shares = shares
        self._idle = threading.Condition()
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(_Worker(fd, nbytes))
            for worker in self._workers:
                worker.wait_ready()
        except OSError as e:
            self.close()
            raise ResourceError(f"copy workers could not be started: {e}") from e
        except BaseException:
            self.close()
            raise
        self._free = list(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    def begin(self, job: Job, given_up: Callable[[], bool], timeout_s: float) -> Working | None:
        """Have a worker copy and check; None when none could, or, where it shares, none is free.

        Args:
            job: The work.
            given_up: Whether nobody waits for it any more.
            timeout_s: A worker that takes longer is ended; nor is a free one waited for longer.

        """
        end = time.monotonic() + timeout_s
        while True:
            with self._idle:
                while self._workers and not self._free:
                    if self.shares or given_up() or time.monotonic() >= end:
                        return None
                    self._idle.wait(_TICK_S)
                if not self._workers:
                    return None
                worker = self._free.pop()
            working = Working(self, worker, job, given_up, timeout_s)
            if working.sent():
                return working
            if given_up():
                return None

    def lost(self, worker: _Worker, error: OSError) -> None:
        """Go on without one."""
        logger.warning("a copy worker is gone (%s); copying goes on without it", error)
        with self._idle:
            if worker in self._workers:
                self._workers.remove(worker)
            self._idle.notify_all()
        worker.end()

    def done(self, worker: _Worker) -> None:
        """Take one back."""
        with self._idle:
            if worker in self._workers:
                worker.let_go()
                self._free.append(worker)
            self._idle.notify_all()

    def forget(self, number: int) -> None:
        """Let go of a memory file that is gone: now, or after the job in hand."""
        with self._idle:
            for worker in self._workers:
                worker.gone.append(number)
            for worker in self._free:
                worker.let_go()

    def close(self) -> None:
        """End them. Idempotent."""
        with self._idle:
            workers, self._workers = self._workers, []
            self._idle.notify_all()
        for worker in workers:
            worker.end()


class Working:
    """A job that a worker has; whoever began it waits for it, whatever happens.

    Args:
        workers: Whose worker.
        worker: Which.
        job: The work.
        given_up: As for `CopyWorkers.begin`.
        timeout_s: As for `CopyWorkers.begin`.

    """

    def __init__(
        self,
        workers: CopyWorkers,
        worker: _Worker,
        job: Job,
        given_up: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        self._workers = workers
        self._worker = worker
        self._count = job.units.shape[1]
        self._given_up = given_up
        self._end = time.monotonic() + timeout_s
        self._given_up_end = time.monotonic() + _PATIENCE_S
        self._error: OSError | None = None
        try:
            worker.send(job, self._again)
        except OSError as e:
            self._error = e
            workers.lost(worker, e)

    def sent(self) -> bool:
        """Whether the worker has it."""
        return self._error is None

    def wait(self) -> list[int] | None:
        """Positions of damaged units, or None when it was not done; call it once.

        When it returns no worker writes for this job any more.
        """
        try:
            found = self._worker.answer(self._count, self._wait_on)
        except OSError as e:
            self._workers.lost(self._worker, e)
            return None
        except BaseException:
            self._workers.lost(self._worker, OSError("the wait for it was interrupted"))
            raise
        self._workers.done(self._worker)
        return found

    def _wait_on(self) -> None:
        """Go on waiting: what nobody waits for any more is done soon, and harmless until then."""
        if self._given_up():
            self._end = min(self._end, self._given_up_end)
        else:
            self._given_up_end = time.monotonic() + _PATIENCE_S
        if time.monotonic() > self._end:
            raise TimeoutError("it did not answer in time")

    def _again(self) -> None:
        if self._given_up() or time.monotonic() > self._end:
            raise TimeoutError("it did not answer in time")


class _Worker:
    """One process."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._sock, theirs = socket.socketpair()
        try:
            program = str(Path(__file__).with_name("_copy_worker.py"))
            arguments = [str(theirs.fileno()), str(fd), str(nbytes)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", program, *arguments],
                pass_fds=(theirs.fileno(), fd),
                stdin=subprocess.DEVNULL,
                env={"GLIBC_TUNABLES": _TUNABLES, **os.environ},
                process_group=0,  # a terminal's interrupt is for us, who end it
            )
        except BaseException:
            self._sock.close()
            raise
        finally:
            theirs.close()
        self._known: set[int] = set()
        self.gone: list[int] = []

    def wait_ready(self) -> None:
        """Wait until it has mapped the pool."""
        self._sock.settimeout(_START_S)
        if self._sock.recv(1) != b"r":
            raise ConnectionResetError(f"it ended with status {self._process.poll()}")
        tick = struct.pack("ll", 0, int(_TICK_S * 1e6))
        self._sock.setblocking(True)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)

    def send(self, job: Job, again: Callable[[], None]) -> None:
        """Give it a job; any OSError means that it has to be ended."""
        for number, (nbytes, fd) in job.files.items():
            if number not in self._known:
                self._send(HEAD.pack(MAP, number, nbytes, 0, 0), again)
                socket.send_fds(self._sock, [b"f"], [fd])
                self._known.add(number)
        stretches, batches = job.stretches, job.batches
        count, check = job.units.shape[1], job.units.shape[1] > 0
        head = HEAD.pack(COPY, stretches.shape[1], len(batches), count, int(check))
        parts = (stretches.tobytes(), batches.tobytes(), job.units.tobytes())
        self._send(b"".join((head, *parts)), again)

    def answer(self, count: int, again: Callable[[], None]) -> list[int]:
        """Damaged units of the job, out of so many; any OSError as with `send`."""
        (bad,) = struct.unpack("<Q", self._receive(8, again))
        if bad > min(count, _MAX_REPLY):
            raise ConnectionResetError(f"it answers with {bad} of {count} units")
        positions: list[int] = array.array("Q", self._receive(8 * bad, again)).tolist()
        return positions

    def let_go(self) -> None:
        """Have it unmap what is gone; it is idle."""
        while self.gone:
            number = self.gone.pop()
            if number in self._known:
                self._known.discard(number)
                with contextlib.suppress(OSError):  # the next job will tell
                    self._sock.send(HEAD.pack(UNMAP, number, 0, 0, 0))

    def _send(self, data: bytes, again: Callable[[], None]) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                again()

    def _receive(self, size: int, again: Callable[[], None]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                got = self._sock.recv(size - len(data))
            except BlockingIOError:
                again()
                continue
            if not got:
                raise ConnectionResetError(f"it ended with status {self._process.poll()}")
            data += got
        return data

    def end(self) -> None:
        """Kill it, and wait until it writes no more."""
        self._sock.close()
        self._process.kill()
        self._process.wait()
