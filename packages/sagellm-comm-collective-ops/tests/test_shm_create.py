"""Making an shm backend: over a store, over a torch group, alone; and when `auto` takes it."""

import os

import pytest
import torch
import torch.distributed as dist
from shm_ranks import join, same

from sagellm.comm.collective_ops import ShmBackend, _specs, create_comm_backend, factory
from sagellm.comm.collective_ops._groups import GroupSource
from sagellm.comm.collective_ops._shm.hosts import Hosts
from sagellm.core.protocols import ResourceError
from sagellm.core.protocols.selection import Selection

SIZE = 4


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def test_world_of_one():
    with ShmBackend(options={"engine": "python"}) as b:
        assert (b.name, b.size, b.engine) == ("shm", 1, "none")
        x = torch.ones(3)
        assert b.all_reduce(x) is x
        assert b.empty((2,), torch.int8).shape == (2,)
        b.register(x).release()
        assert b.get_stats().ops["all_reduce"].calls == 1
        assert b.explain("all_reduce", 8).backend == "shm"
        b.barrier()


def over_a_torch_group(b):
    """`b` is gloo here, whose ranks and store are taken."""
    with create_comm_backend("shm", group=b.process_group, timeout_s=20) as shm:
        same(shm.all_reduce(torch.ones(2)), torch.full((2,), float(b.size)))
        half = dist.new_group([0, 1])
        if b.rank < 2:
            with create_comm_backend("shm", group=half) as pair:
                same(pair.all_reduce(torch.ones(2)), torch.full((2,), 2.0))
        shm.barrier()
        return shm.name, shm.global_ranks, shm.explain("all_reduce", 1 << 20).algorithm


def test_ranks_of_a_torch_group(gloo_pools):
    for name, ranks, algorithm in gloo_pools(3).run(over_a_torch_group):
        assert (name, ranks) == ("shm", (0, 1, 2))
        assert algorithm == "two_shot"


def options_at_work(rank, size, meet):
    options = {"algorithms": "all_reduce:0-1m:two_shot", "slot_bytes": 8192, "statistics": False}
    with join(rank, size, meet, arena_bytes=0, **options) as b:
        same(b.all_reduce(torch.ones(9000)), torch.full((9000,), 4.0))
        with pytest.raises(ResourceError, match="arena of 0 bytes"):
            b.empty((1,), torch.int8)
        b.barrier()
        return b.explain("all_reduce", 100).algorithm, b.engine, b.get_stats().ops


def test_options_are_obeyed(pool, meet):
    for algorithm, engine, ops in pool.run(options_at_work, meet):
        assert (algorithm, engine) == ("two_shot", meet.rpartition(".")[2])
        assert ops == {}


@pytest.mark.parametrize(
    ("hosts", "installed", "name"),
    [
        (Hosts(((0, 1, 2),)), ("gloo", "hier", "shm"), "shm"),
        (Hosts(((0, 1), (2,))), ("gloo", "hier", "shm"), "hier"),
        (Hosts(((0, 1), (2,))), ("gloo", "shm"), "gloo"),
        (Hosts(((0,), (1,), (2,)), {2: "it is shy"}), ("gloo", "hier", "shm"), "gloo"),
    ],
)
def test_auto_goes_by_the_hosts_that_were_proven(monkeypatch, hosts, installed, name):
    class Installed:
        def names(self):
            return installed

        def load(self, name):
            return {"gloo": _specs.GLOO, "hier": _specs.GLOO, "shm": _specs.SHM}[name]

    loaded = []
    monkeypatch.setattr(Installed, "load", lambda self, n: loaded.append(n) or _specs.GLOO)
    monkeypatch.setattr(factory, "backend_registry", Installed)
    monkeypatch.setattr(factory, "prove_hosts", lambda *_, **__: hosts)
    source = GroupSource(None, object(), 0, 3, "a test", global_ranks=(0, 1, 2))

    chosen = factory._by_hosts(Selection(_specs.SHM, "the fastest"), source, 1.0)

    if name == "shm":
        assert (chosen.spec.name, loaded) == ("shm", [])
        assert "all 3 ranks proved to share a host" in chosen.reason
    else:
        assert loaded == [name]
        assert "host 1: ranks [" in chosen.rejected["shm"]


def test_going_without_shm_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(factory, "_told", False)
    refused = Selection(_specs.GLOO, "the fastest", {"shm": "riscv64 needs the compiled engine"})
    source = GroupSource(None, None, 0, 1, "a test")

    for _ in range(2):
        factory._by_hosts(refused, source, 1.0)

    (record,) = caplog.records
    assert "riscv64 needs the compiled engine" in record.getMessage()


def test_probe_says_what_is_missing(monkeypatch):
    assert _specs.SHM.probe().available
    with monkeypatch.context() as patch:
        patch.setattr(
            "sagellm.comm.collective_ops._shm.engines.library", lambda: "it was not built"
        )
        assert "; without native: it was not built" in _specs.SHM.probe().reason
        assert ShmBackend.engines()["native"] == "it was not built"
    monkeypatch.setattr("sagellm.comm.collective_ops._shm.engines.available_engines", dict)
    assert "needs the compiled engine" in _specs.SHM.probe().reason
    monkeypatch.delattr(os, "memfd_create")
    assert "use gloo" in _specs.SHM.probe().reason
