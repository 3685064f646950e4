"""How long until the survivors of a SIGKILL know: each time in new processes of a new group.

The rank's process only forks: it holds no group of its own. One child loops over a small
all_reduce; the last rank's child is killed at a random moment of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sagellm.core.protocols import BackendUnavailableError

DEADLINE_S = 60.0
WARM_CALLS = 20
NBYTES = 1 << 10


def _call(variant: str, rank: int, world: int, store: Path) -> Callable[[], object]:
    import torch
    import torch.distributed as dist

    from ._ours import backend, meet

    x = torch.zeros(NBYTES // 4)
    meet(rank, world, store)
    if variant == "gloo":
        return lambda: dist.all_reduce(x)
    made = backend(variant.removeprefix("shm-"), statistics=True)
    return lambda: made.all_reduce(x)


def _child(variant: str, rank: int, world: int, store: Path, out: int) -> None:
    def say(**found: object) -> None:
        os.write(out, json.dumps(found).encode() + b"\n")

    try:
        call = _call(variant, rank, world, store)
        for _ in range(WARM_CALLS):
            call()
    except BackendUnavailableError as e:
        say(missing=str(e))
        return
    except Exception as e:  # the launch process fails with it
        say(error=f"{type(e).__name__}: {e}")
        return
    say(looping=True)
    try:
        while True:
            call()
    except Exception as e:  # what this benchmark waits for
        say(at=time.perf_counter(), said=f"{type(e).__name__}: {e}")


def _read(fd: int, pending: bytearray) -> dict[str, Any]:
    deadline = time.monotonic() + DEADLINE_S
    while b"\n" not in pending:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return {"error": f"nothing was said in {DEADLINE_S:g} s"}
        more = os.read(fd, 65536)
        if not more:
            return {"error": "the process ended without a word"}
        pending += more
    line, _, rest = bytes(pending).partition(b"\n")
    pending[:] = rest
    found: dict[str, Any] = json.loads(line)
    return found


def _once(variant: str, rank: int, world: int, store: Path) -> dict[str, Any]:
    inner, outer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            from ._rank import end_with_parent

            end_with_parent()
            logging.disable()  # of a rank lost on purpose
            os.close(inner)
            _child(variant, rank, world, store, outer)
        finally:
            os._exit(0)
    os.close(outer)
    pending = bytearray()
    try:
        first = _read(inner, pending)
        if "looping" not in first:
            return first
        if rank == world - 1:
            time.sleep(random.uniform(0.005, 0.03))  # any moment of the loop will do
            killed = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            return {"killed": killed}
        return _read(inner, pending)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(inner)


def lose(
    rank: int, world: int, folder: Path, lines: Iterable[bytes], say: Callable[[object], None]
) -> None:
    """Answer requests `{"do": "lose", "variant": …, "turn": …}` until `quit`."""
    import torch

    torch.set_num_threads(1)
    for line in lines:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        if request["do"] == "schedule":
            from ._rank import schedule

            say({"answer": schedule(request["policy"])})
            continue
        store = folder / f"store-{request['turn']}"
        say({"answer": _once(request["variant"], rank, world, store)})
