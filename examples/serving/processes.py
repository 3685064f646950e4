"""Starts the rank processes, hears what they say, and makes sure that none outlives the parent.

Ranks share nothing but a store on loopback, in the parent, whose port the kernel chooses. They
are in process groups of their own, so that Ctrl-C reaches the parent alone, which then ends them.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's __all__ lacks it

from sagellm.core.protocols import CommError, CommTimeoutError
from sagellm.core.protocols.ports import SagePorts
from serving.messages import (
    Command,
    Event,
    Exited,
    Failed,
    Job,
    Stop,
    Timeline,
    decode_event,
    encode,
)

EXAMPLES = Path(__file__).parent.parent
_NOTICE_S = 2.5
"""How long the other ranks have to say what they saw when one has failed."""
_STOP_S = 5.0
_LAST_LINES = 15


class RankLostError(CommError, RuntimeError):
    """Ranks are lost; the message has a line for each rank of the job.

    Attributes:
        failed: What each rank that failed said, by rank.

    """

    code = "distributed_runtime_error"

    def __init__(self, message: str, failed: dict[int, Failed | Exited]) -> None:
        super().__init__(message)
        self.failed = failed


@contextmanager
def _deaf() -> Iterator[None]:
    """Ignores the signals that end a program, in the main thread, which alone gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, signal.SIG_IGN) for n in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Heard(NamedTuple):
    """An event, and the rank it came from."""

    rank: int
    event: Event


class Fleet:
    """The processes of a job. Leaving its context ends them all, politely if nothing failed.

    Attributes:
        processes: By rank.

    """

    def __init__(self, job: Job) -> None:
        """Starts every rank; `next` then hears `Ready` from each."""
        self.job = job
        self.processes: list[subprocess.Popen[bytes]] = []
        self._heard: queue.Queue[Heard] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._logs: list[IO[bytes]] = []
        self._failed: dict[int, Failed | Exited] = {}
        self._stopping = False
        listener = SagePorts().listen("store", host="127.0.0.1")
        port = listener.getsockname()[1]
        self._store: TCPStore | None = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        try:
            for rank in range(job.world_size):
                self._start(rank, port)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.kill()

    def _start(self, rank: int, port: int) -> None:
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.job.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours, no rank opens one
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "OMP_NUM_THREADS": str(self.job.threads),
            "PYTHONPATH": os.pathsep.join(
                [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        log = tempfile.TemporaryFile()
        self._logs.append(log)
        ours, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.rank", encode(self.job).decode(), str(theirs)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[theirs],
                process_group=0,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self.processes.append(process)
        thread = threading.Thread(target=self._listen, args=(rank, ours, process), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _listen(self, rank: int, fd: int, process: subprocess.Popen[bytes]) -> None:
        with open(fd, "rb") as events:
            for line in events:
                self._heard.put(Heard(rank, decode_event(line)))
        at_s = time.monotonic()
        self._heard.put(Heard(rank, Exited(process.wait(), at_s)))

    def tell(self, ranks: list[int], command: Command) -> None:
        """Send a command to some ranks; one that is gone shows up in `next`."""
        line = encode(command) + b"\n"
        for rank in ranks:
            stdin = self.processes[rank].stdin
            assert stdin is not None
            with suppress(BrokenPipeError):
                stdin.write(line)
                stdin.flush()

    def next(self, timeout_s: float, waiting_for: str) -> Heard:
        """Wait for the next event of any rank.

        Raises:
            RankLostError: A rank failed or died. The others have been given time to say so too.
            CommTimeoutError: Nothing came.

        """
        try:
            heard = self._heard.get(timeout=timeout_s)
        except queue.Empty:
            raise CommTimeoutError(
                f"no rank said anything for {timeout_s:g} s while waiting for {waiting_for}"
            ) from None
        if isinstance(heard.event, Failed | Exited) and not self._stopping:
            raise self._failure(heard)
        return heard

    def stop(self) -> dict[int, list[Timeline]]:
        """End every rank politely, and return what each hands over at the end.

        Raises:
            RankLostError: A rank failed while it ended.

        """
        self._stopping = True
        timelines: dict[int, list[Timeline]] = {r: [] for r in range(self.job.world_size)}
        self.tell(list(timelines), Stop())
        left = set(timelines)
        while left:
            rank, event = self.next(_STOP_S, f"the end of ranks {sorted(left)}")
            if isinstance(event, Timeline):
                timelines[rank].append(event)
            elif isinstance(event, Exited):
                left.discard(rank)
                if event.returncode:
                    raise self._failure(Heard(rank, event))
            elif isinstance(event, Failed):
                raise self._failure(Heard(rank, event))
        return timelines

    def kill(self) -> None:
        """End every rank that is left, and release the store. Idempotent.

        Returns when all are gone, which takes a second at most; Ctrl-C is not heard meanwhile.
        """
        with _deaf():
            self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()  # a rank that hears this closes its channel
        end_s = time.monotonic() + 1.0
        for process in self.processes:
            try:
                process.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        for thread in self._threads:
            thread.join()
        for log in self._logs:
            log.close()
        self._store = None  # closes its listener

    def _failure(self, first: Heard) -> RankLostError:
        self._note(first)
        end_s = time.monotonic() + _NOTICE_S
        while len(self._failed) < self.job.world_size:
            try:
                heard = self._heard.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                break
            self._note(heard)
        lines = [self._describe(rank) for rank in range(self.job.world_size)]
        blamed = self._blamed(first.rank)
        return RankLostError(
            f"rank {blamed} ({self.job.role(blamed)}) is lost:\n" + "\n".join(lines), self._failed
        )

    def _note(self, heard: Heard) -> None:
        said = self._failed.get(heard.rank)
        if isinstance(heard.event, Failed) or (isinstance(heard.event, Exited) and said is None):
            self._failed[heard.rank] = heard.event

    def _blamed(self, first: int) -> int:
        """A rank that died without a word, else the first that failed."""
        silent = [r for r, e in self._failed.items() if isinstance(e, Exited)]
        return silent[0] if silent else min(self._failed, key=lambda r: self._failed[r].at_s)

    def _describe(self, rank: int) -> str:
        event = self._failed.get(rank)
        head = f"  rank {rank} ({self.job.role(rank)})"
        if event is None:
            return f"{head} was still running and has been ended"
        if isinstance(event, Failed):
            return f"{head} failed with [{event.code}] {event.message.rstrip()}"
        code = event.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"{head} {how}{self._last_lines(rank)}"

    def _last_lines(self, rank: int) -> str:
        log = self._logs[rank]
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        return "".join(f"\n    | {line}" for line in lines)
