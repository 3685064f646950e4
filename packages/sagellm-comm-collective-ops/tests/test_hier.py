"""Groups over several hosts: right for any numbering and any sizes, and failing as one."""

import os
import time

import pytest
import torch
from test_calibrate import with_time_to_measure
from test_choice import in_order, model, watched

from sagellm.comm.collective_ops import HierBackend, create_comm_backend, error_bound
from sagellm.comm.collective_ops._hier.partition import HostMap
from sagellm.core.protocols import CollectiveMismatchError, CommError, ConfigError
from sagellm.core.protocols.netns import ShapedHosts, enter_namespace, why_not

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


def every_operation(b, hosts, algorithm, **more):
    h = made(b, hosts, algorithm=algorithm, chunk_bytes=4096, **more)
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


OVERRIDES = (
    "all_reduce:0-1k:flat,all_reduce:1k-2k:two_d,all_reduce:2k-4k:ring,all_reduce:4k-:native,"
    "all_gather:direct,all_to_all:pairwise"
)


def test_overrides_say_what_runs_and_explain_and_statistics_say_the_same(gloo_pools):
    first, *others = gloo_pools(4).run(overridden)
    assert others == [first] * 3
    ran, choices = first
    wanted = ["flat", "two_d", "ring", "leaders"]
    assert sorted(ran) == sorted(wanted)
    assert [c.algorithm for c in choices] == [*wanted, "direct", "leaders", "pairwise"]
    assert "option algorithms has all_reduce:1k-2k:two_d" in choices[1].reason
    assert choices[1].rejected["flat"] == "option algorithms has all_reduce:1k-2k:two_d"
    assert {"leaders", "two_d", "flat", "tree"} <= {*choices[2].rejected}
    assert "leaves all_reduce:4k-:native" in choices[3].reason
    assert choices[5].rejected.keys() >= {"flat", "ring"}


def overridden(b):
    h = made(b, LAYOUTS[0], algorithms=OVERRIDES, chunk_bytes=4096)
    h.reset_stats()
    for nbytes in (512, 1024, 2048, 8192):
        x = torch.full((nbytes // 4,), h.rank + 1.0)
        assert h.all_reduce(x).unique().tolist() == [10.0]
        works = [h.all_reduce(torch.full((nbytes // 4,), float(i)), async_op=True) for i in (1, 2)]
        assert [w.wait()[-1].item() for w in works] == [4.0, 8.0]
    assert torch.cat(h.all_gather(torch.full((2,), h.rank))).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    ran = sorted({d.algorithm for d in h.get_stats().details if d.op == "all_reduce"})
    calls = [("all_reduce", n) for n in (512, 1024, 2048, 8192)]
    calls += [("all_gather_into_tensor", 8), ("broadcast", 8), ("all_to_all_single", 8)]
    # gloo's own algorithm has no name there but native
    return ["flat" if a == "native" else a for a in ran], [h.explain(*c) for c in calls]


def by_size(b, text):
    return made(b, [[0], [1]], algorithms=text)


def test_calls_by_hosts_and_over_all_ranks_keep_their_order(gloo_pools):
    texts = [f"all_reduce:{sizes}:{name}" for sizes in ("0-4k", "4k-") for name in ("flat", "ring")]
    assert gloo_pools(2).run(in_order, by_size, texts) == [{(3.0, 3.0)}] * 2


@pytest.mark.parametrize("between", ["ring", "all_reduce:direct,broadcast:tree,reduce:tree"])
def test_schedules_run_between_hosts(gloo_pools, between):
    found = gloo_pools(4).run(with_schedules, between)
    name = "ring" if between == "ring" else "direct"
    assert [stages for stages, _ in found] == [{name}, {name}, None, {name}]
    assert f"between hosts all_reduce:0-:{name}" in found[0][1]


def with_schedules(b, between):
    hosts = [[0, 2], [1], [3]]
    every_operation(b, hosts, "leaders", between=between)
    h = made(b, hosts, algorithm="leaders", chunk_bytes=4096, between=between)
    leads = h.rank != 2
    told = h._hier.stages.groups[-1].get_stats().details if leads else ()
    ran = {d.algorithm for d in told if d.op == "all_reduce"}
    return ran if leads else None, h.explain("all_reduce", 64).reason


def test_a_flat_ring_passes_hosts_one_after_another(gloo_pools):
    assert sum(gloo_pools(4).run(flat_ring)) == 2 * 6


def flat_ring(b):
    h = made(b, LAYOUTS[0], algorithms="all_reduce:ring")
    peers = watched(h._hier.stages.flat)
    assert h.all_reduce(torch.full((8,), h.rank + 1.0)).tolist() == [10.0] * 8
    return sum((p - h.rank) % 2 for p in peers)


def test_rank_0s_cost_model_chooses_on_all_ranks(gloo_pools):
    first, *others = gloo_pools(4).run(modelled)
    assert others == [first] * 3
    algorithms, reason, estimate, rejected = first
    assert algorithms == ["flat", "leaders", "two_d"]
    assert "cost model seen has all_reduce:0-" in reason
    assert estimate == 20.0 + 256 * 0.05
    assert f"expected to take {100 + 256 * 0.01:.1f} us" in rejected["leaders"]


def modelled(b):
    """The crossings lie near 2 and 90 KB; models on other ranks say otherwise."""
    lines = {"leaders": (100.0, 0.01), "flat": (20.0, 0.05), "two_d": (500.0, 0.005)}
    if b.rank:
        lines = {"leaders": (1.0, 0.0)}
    h = HierBackend(
        None,
        b.process_group,
        timeout_s=15,
        cost_model=model(lines.items(), size=4),
        options={"hosts": LAYOUTS[0]},
    )
    with h:
        for n in (64, 4096, 1 << 18):
            assert h.all_reduce(torch.full((n,), h.rank + 1.0))[-1].item() == 10
        small, *more = [h.explain("all_reduce", n) for n in (256, 1 << 14, 1 << 20)]
        names = [c.algorithm for c in (small, *more)]
        return names, small.reason, small.estimate_us, dict(small.rejected)


def test_what_hier_measured_is_everybodys_and_is_kept(gloo_pools, tmp_path):
    first, *others = gloo_pools(4).run(calibrated, str(tmp_path))
    assert others == [first] * 3
    curves, choice = first
    assert {"leaders", "flat", "two_d"} <= {name for op, name, _ in curves if op == "all_reduce"}
    assert choice.estimate_us > 0
    assert len(list((tmp_path / "sagellm-comm").iterdir())) == 1


def calibrated(b, folder):
    with_time_to_measure(folder)
    try:
        options = {"hosts": LAYOUTS[0], "calibrate": True}
        made_ = [HierBackend(None, b.process_group, options=options) for _ in range(2)]
    finally:
        del os.environ["XDG_CACHE_HOME"]
    assert made_[0]._chooser.tables == made_[1]._chooser.tables
    assert made_[0].get_stats().ops == {}
    assert made_[0].all_reduce(torch.ones(3)).tolist() == [4.0] * 3
    chooser, choice = made_[1]._chooser, made_[1].explain("all_reduce", 1 << 15)
    for h in made_:
        h.close()
    return sorted(chooser.costs.curves), choice


def test_two_d_that_cannot_run_is_said(gloo_pools):
    first = gloo_pools(4).run(without_rails)[0]
    assert first.algorithm == "leaders"
    assert "needs several hosts with several ranks each" in first.rejected["two_d"]


def without_rails(b):
    return made(b, LAYOUTS[3], algorithm="two_d", chunk_bytes=4096).explain("all_reduce", 64)


def test_options_that_differ_are_told_before_anything_is_sent(gloo_pools):
    for hosts, chunks in gloo_pools(2).run(different_options):
        assert hosts == {0: "hosts ((0,), (1,))", 1: "hosts ((0, 1),)"}
        assert chunks == {r: f"hosts ((0, 1),); chunk_bytes {4096 * (r + 1)}" for r in range(2)}


def different_options(b):
    told = []
    hosts = [[0, 1]] if b.rank else [[0], [1]]
    for options in ({"hosts": hosts}, {"hosts": [[1, 0]], "chunk_bytes": 4096 * (b.rank + 1)}):
        with pytest.raises(CollectiveMismatchError, match="options differ") as caught:
            HierBackend(None, b.process_group, timeout_s=15, options=options)
        told.append(caught.value.calls)
    return told


def test_a_rank_that_was_asked_nothing_is_told_too(gloo_pools):
    for calls in gloo_pools(2).run(options_of_one_rank):
        assert calls == {0: "none", 1: "chunk_bytes 4096"}


def options_of_one_rank(b):
    options = {"chunk_bytes": 4096} if b.rank else {}
    with pytest.raises(CollectiveMismatchError, match="options differ") as caught:
        HierBackend(None, b.process_group, timeout_s=15, options=options)
    return caught.value.calls


def test_what_is_kept_of_calls_is_an_option(gloo_pools, tmp_path):
    assert gloo_pools(2).run(observed, str(tmp_path)) == [({}, 2)] * 2
    assert len(list(tmp_path.iterdir())) == 2


def observed(b, folder):
    options = {"statistics": False, "flight_entries": 2, "flight_folder": folder}
    group = b.split([0, 1]).process_group  # its own: `abort` ends it
    h = HierBackend(None, group, options={"hosts": [[0, 1]], **options})
    for _ in range(3):
        h.all_reduce(torch.ones(2))
    h.barrier()
    entries = h.flight_record()["entries"]
    part = h.split([0, 1])
    assert part.all_reduce(torch.ones(1)).item() == 2
    counted = {**h.get_stats().ops, **part.get_stats().ops}
    part.close()
    h.abort("enough")
    return counted, len(entries)


def test_a_part_of_a_group_is_not_split(gloo_pools):
    assert gloo_pools(4).run(split_of_a_part) == [True, True, None, None]


def split_of_a_part(b):
    h = made(b, LAYOUTS[0], algorithm="leaders", chunk_bytes=4096)
    if h.rank > 1:
        return None
    with pytest.raises(ConfigError, match="split the whole"):
        h._hier.stages.groups[-1]._wrap(h._hier)
    return True


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
    with pytest.raises(ConfigError, match="between: no schedule 'star'; there are direct"):
        HierBackend(options={"between": "star"})
    with pytest.raises(ConfigError, match=r"'one_two' in .* is not one of native, leaders"):
        HierBackend(options={"algorithms": "all_reduce:one_two"})
    with pytest.raises(ConfigError, match=r"hier serves cpu, not cuda; .*'auto', device="):
        HierBackend(device="cuda")
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
