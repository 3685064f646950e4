"""Groups over several hosts: right for any numbering and any sizes, and failing as one."""

import os
import time

import pytest
import torch

from sagellm.comm.collective_ops import HierBackend, create_comm_backend, error_bound
from sagellm.comm.collective_ops._hier.partition import HostMap
from sagellm.comm.collective_ops.benchmarks._netns import ShapedHosts, enter_namespace, why_not
from sagellm.core.protocols import CommError, ConfigError

LAYOUTS = [
    [[0, 2], [1, 3]],
    [[0, 1], [2, 3]],
    [[0, 3, 1], [2]],
    [[0], [1, 2], [3]],
    [[0], [1], [2], [3]],
    [[0, 1, 2, 3]],
]
_made = {}


def made(backend, hosts, **options):
    key = f"{hosts}{options}"
    if key not in _made:
        _made[key] = HierBackend(
            None, backend.process_group, timeout_s=15, options={"hosts": hosts, **options}
        )
    return _made[key]


def inputs(size, n, dtype):
    return [(torch.arange(n) % 23 + 3 * r - 4).to(dtype) for r in range(size)]


@pytest.mark.parametrize("algorithm", ["leaders", "two_d"])
@pytest.mark.parametrize("hosts", LAYOUTS, ids=str)
def test_every_operation_is_right_for_every_layout(gloo_pools, hosts, algorithm):
    gloo_pools(4).run(every_operation, hosts, algorithm)


def every_operation(b, hosts, algorithm):
    h = made(b, hosts, algorithm=algorithm, chunk_bytes=4096)
    size, rank = h.size, h.rank
    assert h.hosts == HostMap.of(hosts, 0).hosts
    for n, dtype in ((1, torch.float32), (7, torch.int64), (5003, torch.float32), (64, torch.bool)):
        xs = inputs(size, n, dtype)
        x = xs[rank].clone()
        h.all_reduce(x)
        assert torch.equal(x, torch.stack(xs).sum(0).to(dtype))
        h.all_reduce(x.copy_(xs[rank]), "max")
        assert torch.equal(x, torch.stack(xs).amax(0))
        for root in range(size):
            x = xs[rank].clone()
            h.broadcast(x, root)
            assert torch.equal(x, xs[root])
            h.reduce(x.copy_(xs[rank]), root)
            assert rank != root or torch.equal(x, torch.stack(xs).sum(0).to(dtype))
        out = torch.empty(size * n, dtype=dtype)
        h.all_gather_into_tensor(out, xs[rank])
        assert torch.equal(out, torch.cat(xs))
        for op in ("sum", "min"):
            rows = torch.stack([x.roll(rank) for x in xs])
            kept = rows.clone()
            everyones = torch.stack([torch.stack([x.roll(r) for x in xs]) for r in range(size)])
            part = torch.empty(n, dtype=dtype)
            h.reduce_scatter_tensor(part, rows, op)
            wanted = everyones.sum(0) if op == "sum" else everyones.amin(0)
            assert torch.equal(part, wanted[rank].to(dtype))
            assert torch.equal(rows, kept)
    h.barrier()
    work = h.all_reduce(torch.full((3,), float(rank)), async_op=True)
    late = h.broadcast(torch.full((2,), float(rank)), 1)
    assert late.tolist() == [1.0, 1.0]
    assert work.wait().tolist() == [6.0] * 3
    average = h.all_reduce(torch.full((9,), float(rank), dtype=torch.bfloat16), "avg")
    assert average.tolist() == [1.5] * 9
    assert h.get_stats().in_flight == 0


@pytest.mark.parametrize("hosts", [LAYOUTS[0], LAYOUTS[3]], ids=str)
@pytest.mark.parametrize("wire", ["bf16", "int8"])
@pytest.mark.parametrize("algorithm", ["leaders", "two_d"])
def test_fewer_bits_between_hosts_stay_within_the_bound_and_equal_on_all_ranks(
    gloo_pools, hosts, wire, algorithm
):
    found = gloo_pools(4).run(rounded, hosts, wire, algorithm)
    for x in found[1:]:
        assert torch.equal(x, found[0])
    exact = sum(random(r) for r in range(4)).double()
    bound = error_bound(wire, [3.0 * len(host) for host in hosts])
    missed = (found[0].double() - exact).abs().max()
    assert 0 < missed <= bound


def random(rank):
    return (torch.rand(5000, generator=torch.Generator().manual_seed(rank)) - 0.5) * 6


def rounded(b, hosts, wire, algorithm):
    h = made(b, hosts, wire=wire, allow_lossy=True, algorithm=algorithm, chunk_bytes=4096)
    exact = h.all_reduce(torch.full((3,), 2**-20 + h.rank), "max")
    assert exact.tolist() == [3 + 2**-20] * 3
    return h.all_reduce(random(h.rank))


def test_sub_groups_keep_their_hosts(gloo_pools):
    assert gloo_pools(4).run(sub_groups)[1:] == [((0, 2), (1,))] * 3


def sub_groups(b):
    h = made(b, LAYOUTS[0], algorithm="leaders", chunk_bytes=4096)
    part = h.split([1, 2, 3])
    if part is None:
        return None
    with part:
        assert part.all_reduce(torch.tensor([float(h.rank)])).item() == 6
        return part.hosts


def test_explain_names_hosts_and_ways(gloo_pools):
    text, ways = gloo_pools(4).run(explained)[0]
    assert "host 0: ranks [0, 2]; host 1: ranks [1, 3]" in text
    assert ways == ["leaders", "leaders", "flat"]


def explained(b):
    h = made(b, LAYOUTS[0], algorithm="leaders", chunk_bytes=4096)
    choices = [h.explain(op, 1 << 20) for op in ("all_reduce", "broadcast", "all_to_all")]
    return choices[0].reason, [c.algorithm for c in choices]


def test_a_group_of_ones_own_making_serves_inside_hosts(gloo_pools):
    assert gloo_pools(4).run(own_intra) == [10.0] * 4


def own_intra(b):
    made_groups = []

    def make(map, flat):
        group = b.split(list(map.mine))
        made_groups.append(group)
        return group

    h = HierBackend(None, b.process_group, options={"hosts": [[0, 1], [2, 3]], "intra": make})
    assert len(made_groups) == 1
    found = h.all_reduce(torch.tensor([h.rank + 1.0])).item()
    h.close()
    return found


def test_bad_options_are_refused_by_name():
    with pytest.raises(ConfigError, match="hier has no option speed; known: algorithm"):
        HierBackend(options={"speed": 3})
    with pytest.raises(ConfigError, match="algorithm 'ring' is not one of auto, leaders, two_d"):
        HierBackend(options={"algorithm": "ring"})
    with pytest.raises(ConfigError, match="chunk_bytes must be an integer above 0, got 0"):
        HierBackend(options={"chunk_bytes": 0})
    with pytest.raises(ConfigError, match=r"no partition of ranks"):
        HostMap.of([[0, 1], [1, 2]], 0)
    with pytest.raises(ConfigError, match="wire 'int4' is not one of"):
        HierBackend(options={"wire": "int4"})
    with pytest.raises(ConfigError, match="allow_lossy=True allows it"):
        HierBackend(options={"wire": "bf16"})
    assert create_comm_backend("hier").size == 1


# -- failure --------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [1, 3])
def test_a_dead_rank_is_named_on_every_host(fresh_pool, victim):
    """Rank 1 leads its host, rank 3 follows it."""
    outcomes = fresh_pool(4).outcomes(until_one_dies, victim)
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            kind, who, seconds, text = outcome.result
            assert (kind, who) == ("PeerLostError", victim), text
            assert seconds < 5


def until_one_dies(b, victim):
    h = made(b, [[0, 2], [1, 3]])
    h.all_reduce(torch.ones(4))
    if h.rank == victim:
        os._exit(0)
    start = time.monotonic()
    try:
        for _ in range(1000):
            h.all_reduce(torch.ones(1 << 16))
    except CommError as e:
        return type(e).__name__, getattr(e, "rank", None), time.monotonic() - start, str(e)
    return None


@pytest.mark.timeout(120)
def test_a_cut_link_is_reported_by_every_rank_within_its_deadline(loopback, fresh_pool, tmp_path):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with ShapedHosts("200mbit") as hosts:
        pool = fresh_pool(4)._pool
        job = pool.submit(over_cut_link, str(tmp_path / "store"), hosts.pids, str(tmp_path))
        wait_for(tmp_path, "started", 4)
        hosts.cut()
        (tmp_path / "cut").touch()
        outcomes = job.outcomes(60)
    for rank, outcome in enumerate(outcomes):
        kind, seconds, text = outcome.result
        assert kind in ("CommTimeoutError", "PeerLostError"), text
        assert seconds < 3 + 2.5, (rank, seconds, text)
        others = "1" if rank in (0, 2) else "0"
        assert others in text


def wait_for(folder, name, count):
    end = time.monotonic() + 60
    while len(list(folder.glob(f"{name}*"))) < count:
        assert time.monotonic() < end, f"{name} did not come"
        time.sleep(0.01)


def over_cut_link(rank, size, store, pids, folder):
    """Rank 0's host keeps the store, which the other host cannot reach once the link is cut."""
    from datetime import timedelta
    from pathlib import Path

    import torch.distributed as dist

    host = rank % 2
    enter_namespace(pids[host])
    os.environ["GLOO_SOCKET_IFNAME"] = ShapedHosts.interfaces[host]
    address = f"tcp://{ShapedHosts.addresses[0]}:29771"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    h = HierBackend(timeout_s=20)
    assert h.hosts == ((0, 2), (1, 3))
    h.all_reduce(torch.ones(4))
    h.close()
    h = HierBackend(timeout_s=3)
    h.all_reduce(torch.ones(4))
    Path(folder, f"started{rank}").touch()
    x = torch.ones(4 << 20)
    start = time.monotonic()
    try:
        while True:
            if not Path(folder, "cut").exists():
                start = time.monotonic()
            h.all_reduce(x)
    except CommError as e:
        return type(e).__name__, time.monotonic() - start, str(e)
