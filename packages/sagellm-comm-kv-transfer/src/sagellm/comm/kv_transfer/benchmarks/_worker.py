"""The body of a contender's two processes: it does what the measuring process tells it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import threading
import time
from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sagellm.core.protocols import BackendUnavailableError, ConfigError
from sagellm.core.protocols.netns import enter_namespace

from ._turns import Blocks, Region, Turn, sums

__all__ = ["End", "Spec", "cpu_seconds", "work"]


@dataclass(frozen=True, slots=True)
class Spec:
    """How to make a contender.

    Attributes:
        end: `module:Class` of an `End`, in this package.
        options: Arguments of the class.
        environ: Variables of its processes, for libraries that read them as they load.
        spins: Whether it burns a core while idle; it is stopped while others are measured.
        hog: Whether a Python thread of the receiver holds the GIL meanwhile.
        noisy: Whether its library prints errors on a healthy start; they are not shown.

    """

    end: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    spins: bool = False
    hog: bool = False
    noisy: bool = False


class End(ABC):  # noqa: B024 - every method has a sensible default, but for one that moves bytes
    """What one process of a contender does: role `P` has the blocks, role `D` wants them.

    Args:
        role: Which of the two.
        case: The benchmark's case; `source` and `target` name the shared regions.
        host: Address of this process for the other.

    """

    random = True
    """Whether it moves random blocks, or, as a bound for others, one stretch of memory."""

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        self.sends = role == "P"
        self.case = case
        self.host = host
        self.blocks = self.open_blocks()

    def open_blocks(self) -> Blocks:
        """The memory of this side."""
        name = self.case["source" if self.sends else "target"]
        return Region.open(name, self.case["block_bytes"])

    def hello(self) -> object:
        """What the other side has to know of this one."""
        return None

    def meet(self, theirs: object) -> None:
        """Connect."""
        return None

    def begin(self, turn: Turn) -> None:
        """Start the transfer of a turn; returns at once."""
        return None

    def finish(self, turn: Turn) -> None:
        """Return when this side knows that it is over."""
        return None

    def close(self) -> None:
        """Release everything."""
        return None


def cpu_seconds() -> float:
    """What this process, its threads and its children have used so far."""
    ticks = 0
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in listed.read_text().split():
            with contextlib.suppress(OSError):  # it has just ended
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def gil_hog() -> Iterator[None]:
    """A thread that never gives the GIL up by itself."""
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def work(
    pipe: Connection, spec: Spec, role: str, case: Mapping[str, Any], host: str, netns: int | None
) -> None:
    """Serve one end until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    _die_with_parent()
    if netns is not None:
        enter_namespace(netns)
    os.environ.update(spec.environ)
    if spec.noisy:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    module, _, name = spec.end.partition(":")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(EOFError))  # the measuring process is done
        try:
            kind = getattr(importlib.import_module(module), name)
            end: End = kind(role, case, host, **spec.options)
            stack.callback(end.close)
            pipe.send(("hello", end.hello()))
            end.meet(pipe.recv())
            pipe.send(("ready", None))
        except (ImportError, OSError, ConfigError, BackendUnavailableError) as e:
            pipe.send(("missing", f"{type(e).__name__}: {e}"))
            return
        if spec.hog and role == "D":
            stack.enter_context(gil_hog())
        while True:
            command, argument = pipe.recv()
            try:
                answer = ("ok", _obey(end, case, command, argument))
            except Exception as e:
                answer = ("error", f"{role}: {command}: {type(e).__name__}: {e}")
            pipe.send(answer)


def _die_with_parent() -> None:
    """Also while stopped: the fork server ends with the process that measures.

    It would wait for whoever holds the end of a pipe that each of its children is given.
    """
    server: Any = forkserver._forkserver  # type: ignore[attr-defined,unused-ignore]  # private
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _obey(end: End, case: Mapping[str, Any], command: str, argument: Any) -> object:  # noqa: ANN401
    turn = Turn.make(case, argument, random=end.random)
    match command:
        case "stamp":  # what an earlier turn left can never pass for this turn's data
            end.blocks[turn.source, :8].reshape(-1, 8).view("int64")[:] = argument
            return None
        case "sums":
            return sums(end.blocks, turn.source if end.sends else turn.target)
        case "begin":
            end.begin(turn)
            return None
        case "run":
            used, started = cpu_seconds(), time.perf_counter()
            end.begin(turn)
            end.finish(turn)
            return started, time.perf_counter(), cpu_seconds() - used
        case "finish":  # to read the processor's clock takes longer than one block
            started = time.perf_counter()
            if end.sends:
                end.begin(turn)
            end.finish(turn)
            return started, time.perf_counter(), 0.0
        case "cpu":
            return time.perf_counter(), cpu_seconds()
        case _:
            raise ConfigError(f"no command {command!r}")
