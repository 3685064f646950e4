"""Ranks for tests: a gloo world over the kit's pool of long-lived processes."""

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from sagellm.comm.collective_ops._shm.engines import ENGINES, available_engines
from sagellm.core.protocols.testing.rank_pool import RankPool

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

    key = engine, size
    if key not in _state:
        _state[key] = ShmBackend.over_store(
            dist.FileStore(store, size), rank, size, timeout_s=20, options={"engine": engine}
        )
    return fn(_state[key], *args)


def on_hier(rank, size, store, hosts, fn, *args):
    """In a worker: `fn(backend, *args)` with a backend over pretended hosts."""
    from sagellm.comm.collective_ops import HierBackend

    def make(backend):
        key = str(hosts)
        if key not in _state:
            _state[key] = HierBackend(timeout_s=20, options={"hosts": hosts})
        return fn(_state[key], *args)

    return on_backend(rank, size, store, make)


class Ranks:
    """Rank processes that worlds of their size and below share, and the stores that these meet at.

    After a failure all is made anew: a rank that was killed would be replaced, but the others
    would still have their old groups, and the stores their keys.
    """

    def __init__(self, size):
        self.size = size
        self._pool = None
        self._stores = {}

    @property
    def pool(self):
        if self._pool is None:
            self._pool = RankPool(self.size)
        return self._pool

    def store(self, kind):
        if kind not in self._stores:
            self._stores[kind] = self.pool.store_path()
        return self._stores[kind]

    def run(self, size, fn, *args, timeout_s):
        try:
            return self.pool.submit(fn, *args, ranks=size).wait(timeout_s)
        except BaseException:  # pytest's own time limit, too
            self.close()
            raise

    def close(self):
        if self._pool is not None:
            self._pool.close()
        self._pool, self._stores = None, {}


class Part:
    """The first so many of shared ranks, for tests that make their own groups."""

    def __init__(self, ranks, size):
        self._ranks, self._size = ranks, size

    def run(self, fn, *args, timeout_s=30.0):
        return self._ranks.run(self._size, fn, *args, timeout_s=timeout_s)

    def store_path(self):
        return self._ranks.pool.store_path()


class World:
    """Ranks that have met in a group, which later jobs find again."""

    kind = "gloo"

    def __init__(self, size, ranks=None):
        self._size = size
        self._ranks = ranks or Ranks(size)

    @property
    def _pool(self):
        return self._ranks.pool

    @property
    def _store(self):
        return self._ranks.store(self.kind)

    def _call(self, on, *args, timeout_s):
        return self._ranks.run(self._size, on, self._store, *args, timeout_s=timeout_s)

    def close(self):
        self._ranks.close()


class HierWorld(World):
    """`run` calls a test file's function in every rank as `fn(backend, *args)`."""

    def __init__(self, hosts, ranks):
        self._hosts = hosts
        super().__init__(ranks.size, ranks)

    def run(self, fn, *args, timeout_s=60.0):
        return self._call(on_hier, self._hosts, fn, *args, timeout_s=timeout_s)


class ShmWorld(World):
    """`run` calls a test file's function in every rank as `fn(backend, *args)`."""

    def __init__(self, size, engine, ranks):
        self._engine = engine
        self.kind = f"{engine} {size}"
        super().__init__(size, ranks)

    def run(self, fn, *args, timeout_s=60.0):
        return self._call(on_shm, self._engine, fn, *args, timeout_s=timeout_s)


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

    kind = "c10d"

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
def gloo_ranks(loopback):
    """Ranks by size whose default group is gloo's, started when first asked for."""
    found = {}

    def get(size):
        return found.setdefault(size, Ranks(size))

    yield get
    for ranks in found.values():
        ranks.close()


@pytest.fixture(scope="session")
def rank_pools(loopback):
    """Ranks without any group: those of a smaller world are the first ones of the largest."""
    ranks = Ranks(4)
    yield lambda size: Part(ranks, size)
    ranks.close()


@pytest.fixture(params=ENGINES)
def meet(pool, request):
    """Where the ranks of a file's `pool` meet for one test, with one of the engines."""
    if request.param not in available_engines():
        pytest.skip(f"engine {request.param} does not work here")
    return f"{pool.store_path()}.{request.param}"


@pytest.fixture(scope="session")
def gloo_pools(gloo_ranks):
    """Worlds by size, started when first asked for."""
    return lambda size: GlooWorld(size, gloo_ranks(size))


@pytest.fixture(scope="session")
def shm_pools(rank_pools):
    """Worlds by size and engine."""
    return lambda size, engine="auto": ShmWorld(size, engine, rank_pools(size)._ranks)


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
def hier_pools(gloo_ranks):
    """Worlds over pretended hosts, in the ranks of `gloo_pools`."""
    return lambda hosts: HierWorld(hosts, gloo_ranks(sum(len(host) for host in hosts)))


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
