"""Ranks for tests: a gloo world over the kit's pool of long-lived processes."""

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from sagellm.core.protocols.testing.rank_pool import RankFailedError, RankPool

sys.path.append(str(Path(__file__).parent))  # helpers lie beside the tests; workers inherit it

_state = {}


def on_backend(rank, size, store, fn, *args):
    """In a worker: `fn(backend, *args)` with a backend over this process's default group."""
    import torch.distributed as dist

    from sagellm.comm.collective_ops import GlooBackend

    if "backend" not in _state:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=30),
        )
        _state["backend"] = GlooBackend(timeout_s=20)
    return fn(_state["backend"], *args)


def on_shm(rank, size, store, engine, fn, *args):
    """In a worker: `fn(backend, *args)` with a backend of one engine over shared memory."""
    import torch.distributed as dist

    from sagellm.comm.collective_ops import ShmBackend

    if engine not in _state:
        _state[engine] = ShmBackend.over_store(
            dist.FileStore(store, size), rank, size, timeout_s=20, options={"engine": engine}
        )
    return fn(_state[engine], *args)


def on_hier(rank, size, store, hosts, fn, *args):
    """In a worker: `fn(backend, *args)` with a backend over pretended hosts."""
    from sagellm.comm.collective_ops import HierBackend

    def make(backend):
        key = str(hosts)
        if key not in _state:
            _state[key] = HierBackend(timeout_s=20, options={"hosts": hosts})
        return fn(_state[key], *args)

    return on_backend(rank, size, store, make)


class World:
    """A pool of ranks that meet at one store; after a failure both are made anew.

    A rank that was killed is replaced, but the others still have the old group, and the store its
    keys: without new ones every later test of this world would fail too.
    """

    def __init__(self, size):
        self._size = size
        self._renew()

    def _renew(self):
        self._pool = RankPool(self._size)
        self._store = self._pool.store_path()

    def _call(self, on, *args, timeout_s):
        try:
            return self._pool.run(on, self._store, *args, timeout_s=timeout_s)
        except RankFailedError:
            self._pool.close()
            self._renew()
            raise

    def close(self):
        self._pool.close()


class HierWorld(World):
    """`run` calls a test file's function in every rank as `fn(backend, *args)`."""

    def __init__(self, hosts):
        self._hosts = hosts
        super().__init__(sum(len(host) for host in hosts))

    def run(self, fn, *args, timeout_s=60.0):
        return self._call(on_hier, self._hosts, fn, *args, timeout_s=timeout_s)


class ShmWorld(World):
    """`run` calls a test file's function in every rank as `fn(backend, *args)`."""

    def __init__(self, size, engine="auto"):
        self._engine = engine
        super().__init__(size)

    def run(self, fn, *args, timeout_s=60.0):
        return self._call(on_shm, self._engine, fn, *args, timeout_s=timeout_s)

    def outcomes(self, fn, *args, timeout_s=60.0):
        job = self._pool.submit(on_shm, self._store, self._engine, fn, *args)
        return job.outcomes(timeout_s)


def on_c10d(rank, size, store, hosts, fn, *args):
    """In a worker: `fn(*args)` in a process whose default group is ours."""
    import torch.distributed as dist

    from sagellm.comm.collective_ops import register_c10d_backend

    if "c10d" not in _state:
        register_c10d_backend(options={} if hosts is None else {"hosts": hosts})
        register_c10d_backend("sagellm_gloo", backend="gloo")
        dist.init_process_group(
            "sagellm",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=20),
        )
        _state["c10d"] = {
            "gloo": dist.new_group(backend="gloo"),
            "sagellm": dist.new_group(),
            "sagellm_gloo": dist.new_group(backend="sagellm_gloo"),
        }
    return fn(_state["c10d"], *args)


class C10dWorld(World):
    """`run` calls a test file's function in every rank as `fn(groups by backend name, *args)`."""

    def __init__(self, size, hosts=None):
        self._hosts = hosts
        super().__init__(size)

    def run(self, fn, *args, timeout_s=60.0):
        return self._call(on_c10d, self._hosts, fn, *args, timeout_s=timeout_s)

    def outcomes(self, fn, *args, timeout_s=60.0):
        return self._pool.submit(on_c10d, self._store, self._hosts, fn, *args).outcomes(timeout_s)


class GlooWorld(World):
    """`run` calls a test file's function in every rank as `fn(backend, *args)`."""

    def run(self, fn, *args, timeout_s=60.0):
        return self._call(on_backend, fn, *args, timeout_s=timeout_s)

    def outcomes(self, fn, *args, timeout_s=60.0):
        return self._pool.submit(on_backend, self._store, fn, *args).outcomes(timeout_s)


@pytest.fixture(scope="session")
def loopback():
    """Workers inherit the environment that their pool is started in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
        yield


@pytest.fixture(scope="session")
def gloo_pools(loopback):
    """Worlds by size, started when first asked for."""
    worlds = {}

    def get(size):
        if size not in worlds:
            worlds[size] = GlooWorld(size)
        return worlds[size]

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture(scope="session")
def shm_pools(loopback):
    """Worlds by size and engine, started when first asked for."""
    worlds = {}

    def get(size, engine="auto"):
        if (size, engine) not in worlds:
            worlds[size, engine] = ShmWorld(size, engine)
        return worlds[size, engine]

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture
def fresh_shm(loopback):
    """Makes a world over shared memory that a test may break."""
    worlds = []

    def make(size, engine="auto"):
        worlds.append(ShmWorld(size, engine))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture(scope="session")
def c10d_worlds(loopback):
    """Worlds whose default torch group is ours, by size and pretended hosts."""
    worlds = {}

    def get(size, hosts=None):
        key = size, str(hosts)
        if key not in worlds:
            worlds[key] = C10dWorld(size, hosts)
        return worlds[key]

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture
def fresh_c10d(loopback):
    """Makes a world whose default torch group is ours, and which a test may break."""
    worlds = []

    def make(size, hosts=None):
        worlds.append(C10dWorld(size, hosts))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture(scope="session")
def hier_pools(loopback):
    """Worlds over pretended hosts, started when first asked for."""
    worlds = {}

    def get(hosts):
        key = str(hosts)
        if key not in worlds:
            worlds[key] = HierWorld(hosts)
        return worlds[key]

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture
def fresh_pool(loopback):
    """Makes a world that a test may break."""
    worlds = []

    def make(size):
        worlds.append(GlooWorld(size))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def folder(tmp_path):
    """Makes names of which each is a place for one segment of `shm_harness`."""
    numbers = itertools.count()
    return lambda: str(tmp_path / f"m{next(numbers)}")


@pytest.fixture(autouse=True)
def _no_world_from_outside(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SAGELLM_COMM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
