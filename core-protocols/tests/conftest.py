"""Fixtures of the kit, tested by using them; and gloo ranks as threads, each with real sockets."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from sagellm.core.protocols import BackendSpec, Capabilities, Lowering, Probe
from sagellm.core.protocols.testing.pytest_plugin import (
    rank_pool as rank_pool,
    rank_pools as rank_pools,
)

OPS = frozenset(
    "all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single barrier broadcast "
    "gather recv reduce reduce_scatter reduce_scatter_tensor scatter send".split()
)


@pytest.fixture(scope="session")
def spec():
    """Facts about gloo, poorer than they are, so that there is something to lower."""

    def load():
        from sagellm.core.protocols.process_group import ProcessGroupBackend

        return ProcessGroupBackend

    return BackendSpec(
        name="gloo",
        device_types=("cpu",),
        c10d_name="gloo",
        priority=1,
        capabilities=Capabilities(
            ops=OPS,
            reduce_ops=frozenset({"sum", "min", "max", "product"}),
            dtypes=frozenset({"float32", "float64", "int32", "int64"}),
            move_dtypes=frozenset({"float32", "int64", "int32", "bool", "uint8"}),
        ),
        probe=lambda: Probe(True, "a test"),
        load=load,
        lowering=(
            Lowering("avg", "avg_as_sum_div", "no avg"),
            Lowering("bool", "via_int32", "no bool"),
            Lowering("uint8", "via_int32", "no uint8"),
            Lowering("bfloat16", "via_float32", "no bfloat16"),
            Lowering("band", "refuse", "the library says: cannot use ReduceOp.BAND"),
        ),
    )


class Ranks:
    """`size` gloo groups of this process, over one store; `run` calls `fn` on all at once."""

    def __init__(self, size, spec):
        import torch.distributed as dist

        self.size = size
        self.spec = spec
        self.pool = ThreadPoolExecutor(size)
        self.store = dist.HashStore()
        self.turn = 0

    def groups(self):
        import torch
        import torch.distributed as dist

        self.turn += 1
        prefix = dist.PrefixStore(f"turn{self.turn}", self.store)

        def make(rank):
            group = dist.ProcessGroup(prefix, rank, self.size)
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
            options._timeout = timedelta(seconds=10)
            gloo = dist.ProcessGroupGloo(prefix, rank, self.size, options)
            kind = dist.ProcessGroup.BackendType.GLOO
            group._register_backend(torch.device("cpu"), kind, gloo)
            group._set_default_backend(kind)
            if not hasattr(group, "get_group_store"):  # torch 2.6 keeps stores in a table
                dist.distributed_c10d._world.pg_map[group] = ("gloo", prefix)
            return group

        return list(self.pool.map(make, range(self.size)))

    def backends(self, spec=None, **arguments):
        from sagellm.core.protocols.process_group import ProcessGroupBackend

        spec = self.spec if spec is None else spec
        return [ProcessGroupBackend(spec, g, timeout_s=5, **arguments) for g in self.groups()]

    def run(self, fn, backends=None, **arguments):
        backends = self.backends(**arguments) if backends is None else backends
        return [f.result(30) for f in [self.pool.submit(fn, b) for b in backends]]


@pytest.fixture(scope="session")
def ranks(spec):
    """Gloo worlds by size, made when first asked for."""
    made = {}

    def get(size):
        return made.setdefault(size, Ranks(size, spec))

    yield get
    for found in made.values():
        found.pool.shutdown()
