"""Ranks for tests: a pool of long-lived processes, and threads of one process.

Importing torch costs seconds, so a test that spawned its ranks would mostly wait. A `RankPool`
starts its workers once and feeds them functions; a function runs on every rank at the same
time and gets `(rank, size, *args)`. Each job has a deadline: ranks that pass it are killed,
with a stack of where they stood in the error, and replaced.

    with RankPool(2) as pool:
        results = pool.run(fn, 3, timeout_s=30)      # [fn(0, 2, 3), fn(1, 2, 3)]

Functions, arguments and results are pickled over pipes between a parent and its own children.
A function is found by its module's file, so one defined in a test module works too; a lambda
or a nested function does not.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection as mpc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sagellm.core.protocols.errors import CommTimeoutError, ConfigError, DistributedRuntimeError

from . import _rank_worker
from .rank_threads import (
    GRACE_S,
    RankFailedError as RankFailedError,
    RankOutcome as RankOutcome,
    RankRunner as RankRunner,
    ThreadRanks as ThreadRanks,
)

__all__ = [
    "RankFailedError",
    "RankJob",
    "RankOutcome",
    "RankPool",
    "RankRunner",
    "ThreadRanks",
    "torch_group",
]

T = TypeVar("T")

_START_TIMEOUT_S = 180.0  # importing torch on a busy machine


# -- processes ----------------------------------------------------------------------------


class _Worker:
    """One process of a pool, its pipe, and the file where it writes its stack when asked."""

    def __init__(self, rank: int, preload: Sequence[str], folder: Path) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        # The write end stays here alone: its end of file tells the worker that we are gone.
        alive_r, self._alive_w = os.pipe()
        self.stack_file = folder / f"stack-{rank}-{time.monotonic_ns()}"
        environ = dict(os.environ)
        environ.setdefault("OMP_NUM_THREADS", "1")
        environ["SAGELLM_RANK_WORKER"] = "1"
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-c", f"from {_rank_worker.__name__} import run; run()",
                    str(theirs.fileno()), str(alive_r), str(self.stack_file),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), alive_r),
                env=environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(alive_r)
        self.pipe = mpc.Connection(ours.detach())
        self.pipe.send_bytes(_rank_worker.dumps(("start", list(preload))))
        self.ready = False

    def fate(self) -> str:
        """How a process that closed its pipe ended."""
        try:
            code = self.process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe and went on"
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with code {code}"

    def stack(self) -> str:
        """Where its threads stand now, as faulthandler prints it."""
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGUSR1)
            deadline = time.monotonic() + 2.0
            before = -1
            while time.monotonic() < deadline:
                now = self.stack_file.stat().st_size
                if now and now == before:
                    return self.stack_file.read_text(errors="replace")
                before = now
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=0.05)
        return "no stack: the process does not answer"

    def kill(self) -> None:
        """End it now. Safe more than once."""
        self.pipe.close()
        if self._alive_w >= 0:
            os.close(self._alive_w)
            self._alive_w = -1
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.stack_file.unlink(missing_ok=True)


class RankJob:
    """One function running on ranks of a pool; `wait` or `outcomes` collects it."""

    def __init__(self, pool: RankPool, workers: Sequence[_Worker]) -> None:
        self._pool = pool
        self._workers = list(workers)
        self._outcomes: dict[int, RankOutcome] = {}
        self._started = time.monotonic()

    def wait(self, timeout_s: float = 30.0) -> list[Any]:  # Any: whatever fn returns
        """Results in rank order.

        Raises:
            RankFailedError: Some rank raised, died, or had not ended after `timeout_s`.

        """
        outcomes = self.outcomes(timeout_s)
        if any(o.error for o in outcomes):
            raise RankFailedError(outcomes)
        return [o.result for o in outcomes]

    def outcomes(self, timeout_s: float = 30.0) -> list[RankOutcome]:
        """Every rank's outcome, in rank order; never raises for a rank's sake.

        Once a rank has raised, the others get a few seconds to end by themselves. A rank that
        is still running at the deadline is killed and reported with its stack.
        """
        deadline = time.monotonic() + timeout_s
        pending = {w.pipe: (i, w) for i, w in enumerate(self._workers) if i not in self._outcomes}
        while pending:
            left = deadline - time.monotonic()
            ready = mpc.wait(list(pending), max(0.0, left))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, mpc.Connection)
                index, worker = pending[pipe]
                outcome = self._read(index, worker)
                if outcome is None:
                    continue
                del pending[pipe]
                self._outcomes[index] = outcome
                if outcome.error:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        seconds = time.monotonic() - self._started
        stacks = {index: worker.stack() for index, worker in pending.values()}
        for index, worker in pending.values():
            worker.kill()
            self._outcomes[index] = RankOutcome(
                index,
                error=f"still running after {seconds:.1f} s, killed\n{stacks[index]}",
                exception=CommTimeoutError(f"rank {index} did not end within {timeout_s:g} s"),
                seconds=seconds,
            )
        self._pool._finish(self)
        return [self._outcomes[i] for i in range(len(self._workers))]

    def _read(self, index: int, worker: _Worker) -> RankOutcome | None:
        seconds = time.monotonic() - self._started
        try:
            kind, value = _rank_worker.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            fate = worker.fate()
            worker.kill()
            return RankOutcome(index, error=f"the process {fate}", seconds=seconds)
        if kind == "ready":
            worker.ready = True
            return None
        if kind == "result":
            return RankOutcome(index, result=value, seconds=seconds)
        text, exception = value
        return RankOutcome(index, error=text, exception=exception, seconds=seconds)


class RankPool:
    """A fixed number of worker processes that run functions as ranks. Not thread-safe.

    Workers die with this process, whatever it dies of. A worker that was killed, or that died,
    is replaced before the next job.

    Args:
        size: Number of ranks.
        preload: Modules that each worker imports at once; torch where it is installed.

    """

    def __init__(self, size: int, *, preload: Sequence[str] = ("torch",)) -> None:
        if size < 1:
            raise ConfigError(f"a pool has at least one rank, not {size}")
        self._size = size
        self._preload = tuple(preload)
        self._folder = Path(tempfile.mkdtemp(prefix="sagellm-ranks-"))
        self._stores = 0
        self._busy: RankJob | None = None
        self._closed = False
        self._workers = [_Worker(rank, self._preload, self._folder) for rank in range(size)]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, by rank."""
        return tuple(w.process.pid for w in self._workers)

    def run(self, fn: Callable[..., T], *args: object, timeout_s: float = 30.0) -> list[T]:
        """Results of `fn(rank, size, *args)` on every rank, in rank order.

        Args:
            fn: Function of a module; it and its arguments must be picklable.
            *args: Handed to every rank.
            timeout_s: Longest time for the slowest rank, once the workers are up.

        Raises:
            RankFailedError: Some rank raised, died, or had not ended after `timeout_s`.

        """
        return self.submit(fn, *args).wait(timeout_s)

    def submit(self, fn: Callable[..., Any], *args: object, ranks: int | None = None) -> RankJob:
        """Start a job and return at once, for tests that do something meanwhile.

        Args:
            fn: As in `run`.
            *args: As in `run`.
            ranks: Use only the first so many ranks; the function sees that size.

        Raises:
            ConfigError: The pool is closed or busy, or `fn` cannot be found by a worker.

        """
        if self._closed:
            raise ConfigError("this pool is closed")
        if self._busy is not None:
            raise ConfigError("a job is running on this pool: wait for it first")
        size = self._size if ranks is None else ranks
        if not 1 <= size <= self._size:
            raise ConfigError(f"{size} ranks of a pool of {self._size}")
        message = _rank_worker.dump_job(fn, args)
        self._revive()
        workers = self._workers[:size]
        for rank, worker in enumerate(workers):
            worker.pipe.send_bytes(_rank_worker.dumps(("job", (rank, size, message))))
        self._busy = RankJob(self, workers)
        return self._busy

    def kill(self, rank: int) -> None:
        """Kill one worker with SIGKILL, as a machine that fails would."""
        process = self._workers[rank].process
        process.kill()
        process.wait()

    def store_path(self) -> str:
        """A fresh path for a `torch.distributed.FileStore`, or anything else ranks meet at."""
        self._stores += 1
        return str(self._folder / f"store-{self._stores}")

    def close(self) -> None:
        """End the workers and remove what they left. Safe more than once."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                worker.pipe.close()  # an idle worker ends by itself
            deadline = time.monotonic() + GRACE_S
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    if self._busy is None:
                        worker.process.wait(max(0.0, deadline - time.monotonic()))
                worker.kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return itself; `close` runs at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _revive(self) -> None:
        """Replace dead workers, and wait until all have imported what they preload."""
        for rank, worker in enumerate(self._workers):
            if worker.process.poll() is not None:
                worker.kill()
                self._workers[rank] = _Worker(rank, self._preload, self._folder)
        deadline = time.monotonic() + _START_TIMEOUT_S
        for worker in self._workers:
            while not worker.ready:
                if not worker.pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise CommTimeoutError(
                        f"worker {worker.rank} was not ready after {_START_TIMEOUT_S:g} s\n"
                        + worker.stack()
                    )
                try:
                    kind, value = _rank_worker.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError):
                    raise DistributedRuntimeError(
                        f"worker {worker.rank} did not start: the process {worker.fate()}"
                    ) from None
                if kind == "error":
                    raise DistributedRuntimeError(f"worker {worker.rank} did not start: {value[0]}")
                worker.ready = True

    def _finish(self, job: RankJob) -> None:
        if self._busy is job:
            self._busy = None


# -- inside a rank ------------------------------------------------------------------------


@contextlib.contextmanager
def torch_group(
    rank: int,
    size: int,
    store_path: str,
    *,
    backend: str = "gloo",
    timeout_s: float = 30.0,
) -> Iterator[Any]:  # Any: torch is not imported here
    """The default torch process group of these ranks, over a file, for as long as the block.

    The block begins once every rank has its end of the group.

    Args:
        rank: This rank.
        size: Number of ranks.
        store_path: From `RankPool.store_path`, the same on every rank, used once.
        backend: Name of a c10d backend.
        timeout_s: The group's own deadline.

    """
    import datetime

    import torch.distributed as dist

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(store_path, size)  # type: ignore[attr-defined]  # torch's stubs omit it
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        # Torch lets a rank go on while others still connect to it; if it fails, they would, too.
        store.set(f"made/{rank}", "")
        store.wait([f"made/{r}" for r in range(size)], datetime.timedelta(seconds=timeout_s))
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
