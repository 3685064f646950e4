"""Ranks of shm groups for tests: a long-lived pool, and forked processes that may be broken."""

import contextlib
import ctypes
import gc
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sagellm.comm.collective_ops import ShmBackend
from sagellm.comm.collective_ops._shm.engines import ENGINES, available_engines
from sagellm.core.protocols import CommError

_LOAD = os.getloadavg()[0] / (os.cpu_count() or 1)
SLACK_S = 2 + (_LOAD if _LOAD > 2 else 0)
"""Two seconds to learn of a lost rank; where more than two processes wait for each core when tests
begin, their number is added, for each may run before one that has news."""
CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWUSER = 0x40000000, 0x20000000, 0x10000000


def join(rank, size, meet, *, timeout_s=30.0, name="shm", **options):
    """A rank's backend over a file, whose name may end in the engine's."""
    engine = meet.rpartition(".")[2]
    if engine in ENGINES:
        options.setdefault("engine", engine)
    return ShmBackend.over_store(
        dist.FileStore(meet, size), rank, size, name=name, timeout_s=timeout_s, options=options
    )


def on_group(rank, size, meet, fn):
    """In a worker: `fn(backend)` on a new group of all ranks."""
    with join(rank, size, meet) as b:
        result = fn(b)
        b.barrier()
    return result


def engines():
    """The engines to test here: those that exist."""
    return list(available_engines())


def same(got, wanted):
    """Equal in type and value."""
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted), (got, wanted)


def forked(body):
    """Run `body` in a forked child and return its pid; the child ends when `body` does."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid, timeout_s=20.0):
    """How a child ended: the exit code, or minus the signal; 'stopped' if it was stopped."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            return "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"child {pid} did not end")
        time.sleep(0.002)


def failure(call):
    """When a call failed, how, what it said, and the rank and calls that the error names."""
    try:
        call()
    except CommError as e:
        return (
            time.monotonic(),
            type(e).__name__,
            str(e),
            getattr(e, "rank", None),
            getattr(e, "calls", {}),
        )
    raise AssertionError("it did not fail")


def mark(meet, what, text=""):
    """Leave word for the other ranks."""
    path = Path(f"{meet}.{what}")
    path.with_suffix(path.suffix + ".new").write_text(text)
    path.with_suffix(path.suffix + ".new").rename(path)


def await_mark(meet, *names, timeout_s=20.0):
    """Wait for words of other ranks, and return the first one's text."""
    deadline = time.monotonic() + timeout_s
    while not all(Path(f"{meet}.{name}").exists() for name in names):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no word of {names}")
        time.sleep(0.002)
    return Path(f"{meet}.{names[0]}").read_text()


def unshare(flags):
    """Leave namespaces; whether this process may."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(flags) == 0


def may_unshare(flags):
    """Whether children of this process may leave their namespaces."""
    pid = forked(lambda: os._exit(0 if unshare(flags) else 1))
    return ended(pid) == 0


def leftovers():
    """What a group could leave behind in this process: descriptors, mappings, threads."""
    gc.collect()
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fds.append(os.readlink(f"/proc/self/fd/{fd}").split(":[")[0])
    lines = Path("/proc/self/maps").read_text().splitlines()
    shared = ("memfd:", "/dev/shm/")
    maps = [line for line in lines if any(word in line for word in shared)]
    threads = [t.name for t in threading.enumerate() if t.name.startswith("sagellm-comm-shm")]
    return sorted(f for f in fds if f == "socket" or any(w in f for w in shared)), maps, threads


def settled(before, timeout_s=5.0):
    """`leftovers` once they are as before; what they are still after a while."""
    deadline = time.monotonic() + timeout_s
    while (found := leftovers()) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    return found
