"""Ranks for tests: a pool of long-lived processes, since importing torch costs seconds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")


class RankPool:
    """`size` processes, each a rank of one gloo world on loopback.

    `run` takes a module-level function of a test file; it is called in every rank as
    `fn(backend, *args)` with a backend over the default group.
    """

    def __init__(self, size, folder):
        self.size = size
        self.processes, self.pipes = [], []
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_CPP_LOG_LEVEL": "FATAL",
        }
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SAGELLM_COMM_BACKEND"):
            environment.pop(name, None)
        for rank in range(size):
            ours, theirs = Pipe()
            command = [sys.executable, str(WORKER), str(theirs.fileno()), str(rank), str(size)]
            self.processes.append(
                subprocess.Popen(
                    [*command, str(folder / "store")],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                )
            )
            theirs.close()
            self.pipes.append(ours)

    def start(self, fn, *args):
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((fn.__code__.co_filename, fn.__name__, args))

    def collect(self, timeout_s=60.0):
        """What each rank returned; None for a rank that died."""
        end = time.monotonic() + timeout_s
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = True, None
            results.append(value if ok else None)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def run(self, fn, *args, timeout_s=60.0):
        self.start(fn, *args)
        return self.collect(timeout_s)

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError, OSError):
                pipe.send(None)
            pipe.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture(scope="session")
def gloo_pools(tmp_path_factory):
    """Pools by size, started when first asked for."""
    pools = {}

    def get(size):
        if size not in pools:
            pools[size] = RankPool(size, tmp_path_factory.mktemp(f"pool{size}"))
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture
def fresh_pool(tmp_path):
    """Makes a pool that a test may break."""
    pools = []

    def make(size):
        pools.append(RankPool(size, tmp_path))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(autouse=True)
def _no_world_from_outside(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SAGELLM_COMM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
