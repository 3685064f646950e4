"""What the door takes for ranks on several hosts, and that programs run there as anywhere."""

import gc
import logging
import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sagellm.comm.collective_ops import register_c10d_backend
from sagellm.comm.collective_ops._c10d import making
from sagellm.comm.collective_ops._c10d.libraries import GroupPlan
from sagellm.comm.collective_ops._hier import build
from sagellm.core.protocols import CollectiveMismatchError, CommError, ConfigError
from sagellm.core.protocols.netns import ShapedHosts, enter_namespace, why_not
from sagellm.core.protocols.testing.rank_pool import ThreadRanks

HOSTS = [[0, 2], [1, 3]]


# -- the choice -----------------------------------------------------------------------------


def chosen(rank, size, store, hosts):
    plan = GroupPlan(store, rank, size, tuple(range(size)), 20.0, "g")
    name, why, partition = making._choose(plan, hosts)
    return name, why, [list(host) for host in partition]


@pytest.fixture
def choice(monkeypatch, caplog):
    """Every rank's choice, with ranks that lack the engines of shm; and what was warned."""

    def choose(hosts, lacking=()):
        without = {f"rank-{r}" for r in lacking}
        mine = lambda: {} if threading.current_thread().name in without else {"native": "1"}  # noqa: E731
        monkeypatch.setattr(making, "available_engines", mine)
        size = sum(map(len, hosts))
        caplog.clear()
        found = ThreadRanks(size).run(chosen, dist.HashStore(), hosts)
        assert all(f == found[0] for f in found)
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        return *found[0], warned

    monkeypatch.setattr(making, "_warned", set())
    return choose


@pytest.mark.parametrize(
    ("hosts", "lacking", "wanted"),
    [
        ([[0, 1, 2]], (), "shm"),
        (HOSTS, (), "hier"),
        ([[0], [1, 2]], (), "hier"),
        ([[0], [1, 2]], (0,), "hier"),
        ([[0], [1], [2]], (), "gloo"),
        ([[0], [1], [2]], (0, 1, 2), "gloo"),
    ],
    ids=str,
)
def test_hosts_decide_what_is_taken(choice, hosts, lacking, wanted):
    name, _, partition, warned = choice(hosts, lacking)

    assert (name, partition, warned) == (wanted, hosts, [])


@pytest.mark.parametrize("hosts", [[[0, 1, 2]], HOSTS], ids=str)
def test_gloo_in_place_of_shared_memory_is_said_once(choice, hosts):
    name, why, _, warned = choice(hosts, (2,))

    assert name == "gloo"
    assert "rank 2 has none" in why
    (line,) = warned
    assert "without shared memory" in line
    assert "rank 2 has none" in line
    assert choice(hosts, (2,))[-1] == []


# -- programs -------------------------------------------------------------------------------


def program():
    """An unmodified program on four ranks; what its groups run on."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for n in (5, 70_001):
        x = torch.arange(n) * (rank + 1)
        dist.all_reduce(x)
        assert torch.equal(x, torch.arange(n) * 10)
        outs = [torch.zeros(n, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(outs, torch.full((n,), rank))
        assert [o.unique().tolist() for o in outs] == [[r] for r in range(size)]
        y = torch.full((n,), float(rank))
        dist.broadcast(y, 2)
        assert y.unique().tolist() == [2.0]
    right, left = (rank + 1) % size, (rank - 1) % size
    z = torch.zeros(3)
    work = dist.irecv(z, left)
    dist.send(torch.full((3,), float(rank)), right)
    work.wait()
    assert z.tolist() == [float(left)] * 3
    dist.barrier()
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    rows = torch.randn(size, 4)
    net(rows[rank]).sum().backward()
    torch.testing.assert_close(net.module.weight.grad, rows.mean(0).expand(2, 4))
    taken = {}
    for members in ([0, 2], [0, 1], [0, 1, 2]):
        g = dist.new_group(members)
        if rank in members:
            x = torch.full((9,), 2**rank)
            dist.all_reduce(x, group=g)
            assert x.unique().tolist() == [sum(2**r for r in members)]
            taken[tuple(members)] = g.backend.name
            dist.destroy_process_group(g)
    assert "host 1: ranks [1, 3]" in dist.group.WORLD.reason
    world = dist.group.WORLD.backend
    return world.name, [list(host) for host in world.hosts], taken


def of_rank(rank):
    everything = {(0, 2): "shm", (0, 1): "gloo", (0, 1, 2): "hier"}
    return "hier", HOSTS, {k: v for k, v in everything.items() if rank in k}


def in_world(groups):
    return program()


def test_a_program_runs_by_hosts_and_its_groups_by_theirs(c10d_worlds):
    found = c10d_worlds(4, HOSTS).run(in_world)

    assert found == [of_rank(rank) for rank in range(4)]


def by_name(groups):
    options = {"hosts": HOSTS, "wire": "bf16", "allow_lossy": True}
    register_c10d_backend("sagellm_hier", backend="hier", options=options)
    found = {}
    for members in ([0, 1, 2, 3], [1, 3], [2]):
        g = dist.new_group(members, backend="sagellm_hier")
        if dist.get_rank() in members:
            x = torch.full((3,), 1 + 2**-12)
            dist.all_reduce(x, group=g)
            part = g.backend.split([0])
            found[len(members)] = g.backend.name, x[0].item(), getattr(part, "size", None)
            dist.destroy_process_group(g)
    return found


def test_hier_may_be_asked_for_by_name_with_its_options(c10d_worlds):
    found = c10d_worlds(4, HOSTS).run(by_name)

    assert found[0] == {4: ("hier", 4.0, 1)}
    assert found[1][2] == ("hier", 2 + 2**-11, 1)
    assert found[2][1] == ("hier", 1 + 2**-12, 1)
    assert found[3] == {4: ("hier", 4.0, None), 2: ("hier", 2 + 2**-11, None)}


def an_option_of_nobody(groups):
    from sagellm.core.protocols import ConfigError

    register_c10d_backend("sagellm_typo", options={"wires": "bf16"})
    with pytest.raises(ConfigError, match="no backend of auto has option wires"):
        dist.new_group(backend="sagellm_typo")


def test_an_option_that_no_backend_has_is_refused(c10d_worlds):
    c10d_worlds(4, HOSTS).run(an_option_of_nobody)


# -- real hosts, as far as a kernel can pretend ---------------------------------------------


def over_a_link(rank, size, pids):
    host = rank % 2
    enter_namespace(pids[host])
    os.environ["GLOO_SOCKET_IFNAME"] = ShapedHosts.interfaces[host]
    register_c10d_backend()
    dist.init_process_group(
        "sagellm", init_method=f"tcp://{ShapedHosts.addresses[0]}:29772", rank=rank,
        world_size=size, timeout=timedelta(seconds=20),
    )  # fmt: skip
    found = program()
    if rank == 3:
        os._exit(1)
    begun = time.monotonic()
    try:
        while True:
            dist.all_reduce(torch.ones(1 << 16))
    except CommError as e:
        return found, type(e).__name__, getattr(e, "rank", None), time.monotonic() - begun


@pytest.mark.timeout(120)
def test_hosts_are_proven_and_a_dead_rank_named_on_all_of_them(fresh_pool):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with ShapedHosts("1gbit") as hosts:
        outcomes = fresh_pool(4)._pool.submit(over_a_link, hosts.pids).outcomes(90)

    for rank, outcome in enumerate(outcomes[:3]):
        assert outcome.error == ""
        found, kind, lost, seconds = outcome.result
        assert found == of_rank(rank)
        assert (kind, lost) == ("PeerLostError", 3)
        assert seconds < 5


def test_what_cannot_be_made_leaves_nothing(rank_pools):
    pool = rank_pools(2)
    for grown in pool.run(made_in_vain, pool.store_path()):
        assert grown == (0, 0, 0)


def made_in_vain(rank, size, store):
    """How many files, threads and groups in torch's table attempts leave, failing early or late."""

    def attempt(name, **more):
        plan = GroupPlan(dist.FileStore(f"{store}{name}", size), rank, size, (0, 1), 20.0, name)
        options = {"hosts": [[0], [1]], **more}
        with pytest.raises((CollectiveMismatchError, ConfigError)):
            making.make_group(plan, "sagellm", "hier", options)

    def refuse(map, intra, leaders, *args, **more):
        leaders.group.barrier()  # a rank that is ahead would cut off one that still connects
        raise ConfigError("no plans")

    def counted():
        gc.collect()
        table = dist.distributed_c10d._world.pg_group_ranks
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(table)

    first = None
    for i in range(3):
        attempt(f"differ{i}", chunk_bytes=4096 * (rank + 1))
        attempt(f"unknown{i}", speed=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "Plans", refuse)
            attempt(f"late{i}")
        first = first or counted()
    return tuple(b - a for a, b in zip(first, counted(), strict=True))
