"""One rank's process: `python -m serving.rank JOB EVENTS_FD`.

Commands come on stdin, events leave on a pipe of their own. The end of stdin means that the
parent is gone, however it went, and then so is the rank.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sagellm.core.protocols import CommError
from serving.messages import (
    Command,
    Event,
    Failed,
    Job,
    Stop,
    Timeline,
    decode_command,
    decode_job,
    encode,
)

if TYPE_CHECKING:
    from serving.worker import Worker

_CLOSE_S = 0.5
ABANDONED = 3
"""Exit status of a rank whose parent is gone."""


class Parent:
    """The pipes to the parent. Thread-safe.

    Attributes:
        on_exit: Called, for at most half a second, before the process ends early.

    """

    def __init__(self, events_fd: int) -> None:
        self.on_exit: Callable[[], None] | None = None
        self._events_fd = events_fd
        self._lock = threading.Lock()
        self._ending = threading.Lock()

    def say(self, event: Event) -> None:
        """Send an event."""
        line = memoryview(encode(event) + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._events_fd, line) :]

    def die(self, error: BaseException) -> None:
        """Report an error and end the process, from any thread."""
        at_s = time.monotonic()
        with self._ending:  # held to the end: the first error is the one reported
            code, message = "bug", "".join(traceback.format_exception(error))
            if isinstance(error, CommError):
                code, message = error.code, str(error)
            try:
                self.say(Failed(code, message, at_s))
            except BrokenPipeError:
                pass  # the parent is gone: nobody is left to tell
            self._end(1)

    def listen(self, take: Callable[[Command], None]) -> None:
        """Pass on commands until stdin ends, then end the process. Runs on a thread."""
        try:
            for line in _lines():
                take(decode_command(line))
        except Exception as e:
            self.die(e)
        with self._ending:
            self._end(ABANDONED)

    def _end(self, status: int) -> None:
        if self.on_exit is not None:
            closing = threading.Thread(target=self.on_exit, daemon=True)
            closing.start()
            closing.join(_CLOSE_S)
        os._exit(status)


def _lines() -> Iterator[bytes]:
    """Lines of stdin, without its lock: a thread that waits in `sys.stdin` breaks a clean exit."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _serve(worker: Worker, parent: Parent, commands: queue.SimpleQueue[Command]) -> None:
    parent.on_exit = worker.abandon
    worker.meet()
    parent.say(worker.ready())
    while True:
        command = commands.get()
        if isinstance(command, Stop):
            break
        worker.do(command)
    worker.close()
    parent.say(Timeline(worker.spans))


def main(job: Job, events_fd: int) -> None:
    """Serve until told to stop."""
    parent = Parent(events_fd)
    rank = int(os.environ["RANK"])
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    held: list[Worker] = []
    loaded = threading.Event()

    def take(command: Command) -> None:
        # what must not wait for the computation at hand is done on this thread
        if not isinstance(command, Stop):
            loaded.wait()
            if held[0].do_now(command):
                return
        commands.put(command)

    threading.Thread(target=parent.listen, args=(take,), daemon=True).start()
    try:
        if job.role(rank) == "prefill":
            from serving.prefill import PrefillWorker

            held.append(PrefillWorker(job, rank, parent))
        else:
            from serving.decode import DecodeWorker

            held.append(DecodeWorker(job, rank, parent))
        loaded.set()
        _serve(held[0], parent, commands)
    except BaseException as e:
        parent.die(e)


if __name__ == "__main__":
    main(decode_job(sys.argv[1]), int(sys.argv[2]))
