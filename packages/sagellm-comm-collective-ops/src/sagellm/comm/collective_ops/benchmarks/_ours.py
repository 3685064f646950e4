"""Our shared-memory backends as contenders: each engine, each way to call it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sagellm.core.protocols import BackendUnavailableError, CommBackendProtocol
from sagellm.core.protocols.selection import backend_registry

from ._contenders import TIMEOUT_S, Contender, Prepared, buffers

ENGINES = ("native", "python")
WAYS = {
    "registered": False,
    "plain": True,
    "symmetric": False,
    "plain, no statistics": False,
}
"""Ways to call, and whether the backend keeps statistics then."""
ARENA_BYTES = 256 << 20


def variants(*ways: str) -> list[str]:
    """`shm-native registered`, …: every engine called in these ways."""
    return [f"shm-{engine} {way}" for engine in ENGINES for way in ways]


def backend(engine: str, *, statistics: bool, arena_bytes: int = 0) -> CommBackendProtocol:
    from sagellm.comm.collective_ops import create_comm_backend

    options: dict[str, Any] = {"engine": engine, "statistics": statistics}
    if arena_bytes:
        options["arena_bytes"] = arena_bytes
    if "shm" not in backend_registry().names():
        raise BackendUnavailableError("no backend named shm")
    return create_comm_backend("shm", device="cpu", timeout_s=TIMEOUT_S, options=options)


def meet(rank: int, world: int, store: Path) -> None:
    """A default group, whose store our backends meet through; it carries nothing else."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )


def register_c10d(engine: str) -> None:
    """Make `sagellm` a backend that `init_process_group` knows."""
    from sagellm.comm.collective_ops import register_c10d_backend

    register_c10d_backend("sagellm", backend="shm", options={"engine": engine})


class Shm(Contender):
    """One backend per engine and setting, made when first asked for."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world = rank, world
        meet(rank, world, folder / "store")
        self._backends: dict[tuple[str, bool], CommBackendProtocol | str] = {}
        self._release: list[Callable[[], None]] = []

    def _backend(self, engine: str, statistics: bool) -> CommBackendProtocol | str:
        key = engine, statistics
        if key not in self._backends:
            try:
                self._backends[key] = backend(
                    engine, statistics=statistics, arena_bytes=ARENA_BYTES
                )
            except BackendUnavailableError as e:
                self._backends[key] = str(e)
        return self._backends[key]

    def prepare(self, variant: str, case: dict[str, Any]) -> Prepared | str:
        name, _, way = variant.partition(" ")
        made = self._backend(name.removeprefix("shm-"), WAYS[way])
        if isinstance(made, str):
            return made
        empty = made.empty if way == "symmetric" else None
        found = buffers(case, self.rank, self.world, empty)
        if way == "registered":
            for x, out in found.pairs:
                for tensor in {id(t): t for t in (x, out)}.values():
                    self._release.append(made.register(tensor).release)
        if case["op"] == "all_reduce":
            return found.prepared([partial(made.all_reduce, x) for x, _ in found.pairs])
        call = made.all_gather_into_tensor
        if case["op"] == "reduce_scatter":
            call = made.reduce_scatter_tensor
        return found.prepared([partial(call, out, x) for x, out in found.pairs])

    def forget(self) -> None:
        for release in self._release:
            release()
        self._release.clear()

    def close(self) -> None:
        for made in self._backends.values():
            if not isinstance(made, str):
                made.close()
        dist.destroy_process_group()
