"""Every call of `torch.distributed` on a group of ours gives what it gives on gloo."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist

OURS = ("sagellm", "sagellm_gloo")
HOSTS = [[0, 2], [1, 3]]


def mine(n=6, dtype=torch.float32, salt=0):
    """Small integers that differ on every rank, so that sums are exact."""
    return ((torch.arange(n) * 3 + 5 * dist.get_rank() + salt) % 11).to(dtype)


def case_all_reduce(g):
    found = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        x = mine()
        assert dist.all_reduce(x, op, group=g) is None
        found.append(x)
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        x = mine(dtype=torch.int64)
        dist.all_reduce(x, op, group=g)
        found.append(x)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8):
        x = mine(dtype=dtype)
        dist.all_reduce(x, group=g)
        found.append(x)
    return found


def case_all_reduce_async(g):
    x = mine()
    work = dist.all_reduce(x, group=g, async_op=True)
    work.wait()
    assert work.is_completed()
    y = mine(salt=1)
    future = dist.all_reduce(y, group=g, async_op=True).get_future()
    value = future.wait()
    assert value[0] is y or torch.equal(value[0], y)
    return [x, y]


def case_all_reduce_of_odd_tensors(g):
    x, empty, scalar = torch.zeros(4, 6), torch.zeros(0), torch.tensor(float(dist.get_rank()))
    view = x[:, ::2]
    view.copy_(mine(12).view(4, 3))
    dense = view.contiguous() if dist.get_backend(g) == "gloo" else view
    dist.all_reduce(dense, group=g)
    view.copy_(dense)
    dist.all_reduce(empty, group=g)
    dist.all_reduce(scalar, group=g)
    z = torch.complex(mine(), mine(salt=2))
    dist.all_reduce(z, group=g)
    return [x, empty, scalar, z]


def case_all_reduce_coalesced(g):
    xs = [mine(5), mine(7, salt=3)]
    dist.all_reduce_coalesced(xs, group=g)
    ys = [mine(5), mine(7, salt=3)]
    with dist._coalescing_manager(group=g):
        for y in ys:
            dist.all_reduce(y, group=g)
    zs = [mine(3)]
    with dist._coalescing_manager(group=g, async_ops=True) as manager:
        dist.all_reduce(zs[0], group=g)
    manager.wait()
    return xs + ys + zs


def case_all_gather(g):
    size = dist.get_world_size(g)
    outs = [torch.zeros(2, 3) for _ in range(size)]
    dist.all_gather(outs, mine().view(2, 3), group=g)
    flat, rows = torch.zeros(6 * size), torch.zeros(size, 6)
    dist.all_gather_into_tensor(flat, mine(), group=g)
    # Gloo takes no stacked output.
    target = rows.view(-1) if dist.get_backend(g) == "gloo" else rows
    dist.all_gather_into_tensor(target, mine(), group=g, async_op=True).wait()
    return [*outs, flat, rows]


def case_all_gather_coalesced(g):
    size = dist.get_world_size(g)
    outs = [torch.zeros(6 * size), torch.zeros(4 * size)]
    with dist._coalescing_manager(group=g):
        dist.all_gather_into_tensor(outs[0], mine(), group=g)
        dist.all_gather_into_tensor(outs[1], mine(4), group=g)
    return outs


def case_reduce_scatter(g):
    size, out, flat = dist.get_world_size(g), torch.zeros(6), torch.zeros(6)
    if dist.get_backend(g) != "gloo" or hasattr(dist.ProcessGroup, "reduce_scatter_single"):
        dist.reduce_scatter(out, [mine(salt=i) for i in range(size)], group=g)
        dist.reduce_scatter_tensor(flat, mine(6 * size), group=g)
    return [out, flat]


def case_reduce_scatter_coalesced(g):
    size = dist.get_world_size(g)
    outs = [torch.zeros(6), torch.zeros(4)]
    with dist._coalescing_manager(group=g):
        dist.reduce_scatter_tensor(outs[0], mine(6 * size), group=g)
        dist.reduce_scatter_tensor(outs[1], mine(4 * size), group=g)
    return outs


def case_all_to_all(g):
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    even = torch.zeros(2 * size)
    dist.all_to_all_single(even, mine(2 * size), group=g)
    ours, theirs = [rank + to for to in range(size)], [rank + src for src in range(size)]
    uneven = torch.zeros(sum(theirs), 2)
    dist.all_to_all_single(uneven, mine(2 * sum(ours)).view(-1, 2), theirs, ours, group=g)
    outs = [torch.zeros(1 + rank, src + 1) for src in range(size)]
    ins = [mine((to + 1) * (rank + 1)).view(to + 1, rank + 1) for to in range(size)]
    if dist.get_backend(g) == "gloo":  # which has no all_to_all of lists in older releases
        wide = torch.zeros(sum(o.numel() for o in outs))
        counts = [o.numel() for o in outs]
        x = torch.cat([i.reshape(-1) for i in ins])
        dist.all_to_all_single(wide, x, counts, [i.numel() for i in ins], group=g)
        outs = [part.view_as(o) for part, o in zip(wide.split(counts), outs, strict=True)]
    else:
        dist.all_to_all(outs, ins, group=g)
    return [even, uneven, *outs]


def case_rooted(g):
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    found = []
    for root in range(size):
        where = dist.get_global_rank(g, root)
        x, y = mine(), mine(salt=root)
        dist.broadcast(x, where, group=g)
        dist.reduce(y, where, group=g)
        outs = [torch.zeros(6) for _ in range(size)] if rank == root else None
        dist.gather(mine(), outs, where, group=g)
        z = torch.zeros(6)
        ins = [mine(salt=i) for i in range(size)] if rank == root else None
        dist.scatter(z, ins, where, group=g)
        found += [x, z, *(outs or []), *([y] if rank == root else [])]
    return found


def case_send_and_recv(g):
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    right = dist.get_global_rank(g, (rank + 1) % size)
    left = dist.get_global_rank(g, (rank - 1) % size)
    x, big = torch.zeros(6), torch.zeros(200_000)
    ops = [
        dist.P2POp(dist.isend, mine(), right, g),
        dist.P2POp(dist.irecv, x, left, g),
        dist.P2POp(dist.isend, mine(200_000), right, g, tag=3),
        dist.P2POp(dist.irecv, big, left, g, tag=3),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    y = torch.zeros(6)
    if rank == 0:
        dist.send(mine(), right, group=g, tag=7)
        dist.recv(y, left, group=g, tag=7)
    else:
        assert dist.recv(y, left, group=g, tag=7) == left
        dist.send(y, right, group=g, tag=7)
    return [x, big, y]


def case_recv_from_any_source(g):
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    if rank:
        dist.send(mine(), dist.get_global_rank(g, 0), group=g, tag=rank)
        return []
    found = {}
    for tag in range(size - 1, 0, -1):
        x = torch.zeros(6)
        found[dist.recv(x, group=g, tag=tag)] = x
    return [found[src] for src in sorted(found)]


def case_objects(g):
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    everyone, first = [None] * size, [{"rank": rank}, "text"]
    dist.all_gather_object(everyone, {"rank": rank, "many": list(range(rank * 10))}, group=g)
    dist.broadcast_object_list(first, dist.get_global_rank(g, 0), group=g)
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(rank, gathered, dist.get_global_rank(g, 0), group=g)
    taken = [None]
    dist.scatter_object_list(taken, [*range(size)], dist.get_global_rank(g, 0), group=g)
    assert everyone[-1] == {"rank": size - 1, "many": list(range((size - 1) * 10))}
    assert first == [{"rank": 0}, "text"]
    assert taken == [rank]
    assert gathered in (None, [*range(size)])
    return []


def case_barrier(g):
    dist.barrier(group=g)
    dist.barrier(group=g, async_op=True).wait()
    return []


CASES = {name: fn for name, fn in globals().items() if name.startswith("case_")}


def compare(groups, ours, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wanted = CASES[name](groups[ours]), CASES[name](groups["gloo"])
    assert len(found) == len(wanted)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_a_call_gives_what_gloo_gives(c10d_worlds, size, name, ours):
    c10d_worlds(size).run(compare, ours, name)


@pytest.mark.parametrize("name", CASES)
def test_a_call_gives_what_gloo_gives_on_several_hosts(c10d_worlds, name):
    c10d_worlds(4, HOSTS).run(compare, "sagellm", name)


# -- what gloo lacks ------------------------------------------------------------------------


def beyond_gloo(groups, ours):
    g = groups[ours]
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    x = torch.full((4,), float(rank))
    dist.all_reduce(x, dist.ReduceOp.AVG, group=g)
    assert x.tolist() == [(size - 1) / 2] * 4
    outs = [torch.zeros(i + 1) for i in range(size)]
    dist.all_gather(outs, torch.full((rank + 1,), float(rank)), group=g)
    assert [o.tolist() for o in outs] == [[float(i)] * (i + 1) for i in range(size)]
    out = torch.zeros(rank + 1)
    dist.reduce_scatter(out, [torch.full((i + 1,), 2.0 + rank) for i in range(size)], group=g)
    assert out.tolist() == [2.0 * size + sum(range(size))] * (rank + 1)
    for dtype in (torch.bool, torch.int16, torch.complex64, torch.float8_e4m3fn):
        y = torch.tensor([1, 0, 1]).to(torch.float32).to(dtype)
        z = y if rank == 0 else torch.zeros(3).to(dtype)
        dist.broadcast(z, dist.get_global_rank(g, 0), group=g)
        assert torch.equal(z.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("ours", OURS)
def test_calls_that_gloo_refuses_work_too(c10d_worlds, ours):
    c10d_worlds(3).run(beyond_gloo, ours)


def results_are_there(groups, ours):
    """Once a work is completed, and once a future is set, whoever asked and in whichever mode."""
    g, size = groups[ours], 2
    wanted = [[float(r)] * 3 for r in range(size)]
    outs = [torch.zeros(3) for _ in range(size)]
    work = dist.all_gather(outs, torch.full((3,), float(dist.get_rank(g))), g, async_op=True)
    end = time.monotonic() + 20
    while not work.is_completed():
        assert time.monotonic() < end
    assert [o.tolist() for o in outs] == wanted
    with torch.inference_mode():
        outs = [torch.zeros(3) for _ in range(size)]
        x = torch.full((3,), float(dist.get_rank(g)))
        dist.all_gather(outs, x, g, async_op=True).get_future().wait()
    assert [o.tolist() for o in outs] == wanted


@pytest.mark.parametrize("ours", OURS)
def test_results_are_there_when_a_work_says_so(c10d_worlds, ours):
    c10d_worlds(2).run(results_are_there, ours)


def under_both_names(groups):
    from torch._C import _distributed_c10d as c10d

    g, size = groups["sagellm"], 2
    for name in ("all_gather_single", "_allgather_base"):
        out = torch.zeros(6 * size)
        getattr(g, name)(out, mine(), c10d.AllgatherOptions()).wait()
        assert out[:6].tolist() == [(3 * i) % 11 for i in range(6)]
    for name in ("reduce_scatter_single", "_reduce_scatter_base"):
        out = torch.zeros(3)
        getattr(g, name)(out, torch.ones(6), c10d.ReduceScatterOptions()).wait()
        assert out.tolist() == [2.0] * 3
    for name in ("all_to_all_single", "alltoall_base"):
        out = torch.zeros(2)
        getattr(g, name)(out, torch.full((2,), float(g.rank())), [], []).wait()
        assert out.tolist() == [0.0, 1.0]
    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
        out = torch.zeros(6 * size)
        getattr(g, name)([out], [mine()]).wait()
        assert out[:6].tolist() == [(3 * i) % 11 for i in range(6)]
    rows = [[torch.zeros(2), torch.zeros(3)] for _ in range(size)]
    g.allgather_coalesced(rows, [torch.full((2,), 1.0 + g.rank()), torch.ones(3)]).wait()
    assert [row[0][0].item() for row in rows] == [1.0, 2.0]
    whole = torch.zeros(2 * size) if g.rank() == 0 else torch.zeros(0)
    g.gather_single(whole, torch.full((2,), float(g.rank())), c10d.GatherOptions()).wait()
    assert whole.tolist() in ([0.0, 0.0, 1.0, 1.0], [])
    g.monitored_barrier()


def test_a_group_answers_to_the_names_of_every_torch_release(c10d_worlds):
    c10d_worlds(2).run(under_both_names)


def refuses(groups, ours):
    g, messages = groups[ours], []
    for call in (
        lambda: dist.all_reduce(torch.ones(2), dist._make_nccl_premul_sum(2.0), group=g),
        lambda: g.allreduce([torch.ones(2), torch.ones(2)]),
        lambda: dist.all_gather([torch.zeros(2)], torch.ones(2), group=g),
        lambda: dist.all_reduce(torch.ones(2).to_sparse(), group=g),
        lambda: g._get_backend(torch.device("meta")),
    ):
        try:
            call()
        except Exception as e:
            messages.append(f"{type(e).__name__}: {e}")
    return messages


@pytest.mark.parametrize("ours", OURS)
def test_what_cannot_work_is_refused_by_name(c10d_worlds, ours):
    for premul, several, short, sparse, meta in c10d_worlds(2).run(refuses, ours):
        assert premul.startswith("UnsupportedOperationError: premul_sum")
        assert several == "ConfigError: all_reduce takes one tensor per rank, got 2"
        assert short == "ConfigError: all_gather needs 2 outputs, got 1"
        assert "torch.sparse_coo" in sparse
        assert "meta" in meta


# -- groups ---------------------------------------------------------------------------------


def sub_groups(groups):
    rank = dist.get_rank()
    found = {}
    for members in ([0, 2], [1, 2], [1]):
        g = dist.new_group(members)
        if rank in members:
            x = torch.full((2,), 10.0**rank)
            dist.all_reduce(x, group=g)
            y = torch.full((1,), float(rank))
            dist.broadcast(y, members[-1], group=g)
            found[tuple(members)] = (x[0].item(), y.item(), type(g).__name__)
            dist.destroy_process_group(g)
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == 3.0
    return found


def test_sub_groups_are_groups_of_ours_over_their_ranks(c10d_worlds):
    found = c10d_worlds(3).run(sub_groups)
    assert found == [
        {(0, 2): (101.0, 2.0, "CpuGroup")},
        {(1, 2): (110.0, 2.0, "CpuGroup"), (1,): (10.0, 1.0, "CpuGroup")},
        {(0, 2): (101.0, 2.0, "CpuGroup"), (1, 2): (110.0, 2.0, "CpuGroup")},
    ]


def which_backend(groups):
    return {name: getattr(groups[name], "backend", None) and groups[name].backend.name
            for name in groups}  # fmt: skip


def test_ranks_of_one_host_share_memory(c10d_worlds):
    for found in c10d_worlds(2).run(which_backend):
        assert found == {"gloo": None, "sagellm": "shm", "sagellm_gloo": "gloo"}


def test_the_backend_of_a_group_is_the_registered_name(c10d_worlds):
    assert c10d_worlds(2).run(its_backend) == ["sagellm"] * 2


def its_backend(groups):
    return dist.get_backend(groups["sagellm"])


def device_and_library(groups):
    g = dist.new_group(backend="cpu:sagellm,meta:sagellm")
    x = torch.ones(3)
    dist.all_reduce(x, group=g)
    found = x[0].item(), type(g).__name__
    dist.destroy_process_group(g)
    return found


def test_a_backend_string_per_device_gives_one_group_of_ours(c10d_worlds):
    assert c10d_worlds(2).run(device_and_library) == [(2.0, "CpuGroup")] * 2
