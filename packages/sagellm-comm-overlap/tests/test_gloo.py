"""Works of a real gloo group of two processes."""

import datetime
import os

import torch
import torch.distributed as dist

from sagellm.comm.overlap import OverlapManager
from sagellm.core.protocols import BackendSpec, Capabilities, CommTimeoutError, Probe
from sagellm.core.protocols.process_group import ProcessGroupBackend
from sagellm.core.protocols.testing import torch_group

LAYERS = 4


def layers(rank):
    torch.manual_seed(rank)
    return torch.randn(16, 32), [torch.randn(32, 32) for _ in range(LAYERS)]


def serial(rank, size, store):
    x, weights = layers(rank)
    out = []
    with torch_group(rank, size, store):
        for weight in weights:
            y = x @ weight
            dist.all_reduce(y)
            out.append(y)
    return out


def overlapped(rank, size, store):
    x, weights = layers(rank)
    with torch_group(rank, size, store), OverlapManager(device="cpu", timeout_s=20) as manager:
        outs = [torch.empty(16, 32) for _ in weights]
        handle = manager.schedule(
            [(torch.matmul, (x, w)) for w in weights],
            [lambda y: dist.all_reduce(y, async_op=True)] * LAYERS,
        )
        result = handle.wait()
        serially = manager.graph()
        for weight, out in zip(weights, outs, strict=True):
            made = serially.compute(lambda w=weight, o=out: torch.matmul(x, w, out=o))
            serially.comm(lambda y: dist.all_reduce(y, async_op=True), made)
        manager.disable("to compare")
        manager.run(manager.compile(serially)).wait()
        works = all(work.is_completed() for work in result.comm)
        lanes = sorted(handle.metrics.idle)
    return list(result.compute), outs, works, lanes


def test_overlapped_and_serial_runs_are_equal_to_the_bit(rank_pool):
    want = rank_pool.run(serial, rank_pool.store_path())

    got = rank_pool.run(overlapped, rank_pool.store_path())

    for rank in range(2):
        side_by_side, disabled, works, lanes = got[rank]
        assert works
        assert lanes == ["comm", "compute"]
        for a, b, c in zip(want[rank], side_by_side, disabled, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def in_batches(rank, size, store):
    x, weights = layers(rank)

    def model(batch):
        y = batch
        for weight in weights:
            y = y @ weight
            yield dist.all_reduce(y, async_op=True)
        return y

    with torch_group(rank, size, store), OverlapManager(device="cpu", timeout_s=20) as manager:
        halves = list(x.chunk(2))
        side_by_side = manager.overlap_batches([model(half) for half in halves])
        stats = manager.get_stats()
        manager.disable("to compare")
        one_by_one = manager.overlap_batches([model(half) for half in halves])
    return side_by_side, one_by_one, stats.tasks, stats.comm_s > 0


def test_batches_in_turn_equal_batches_one_by_one(rank_pool):
    for side_by_side, one_by_one, tasks, communicated in rank_pool.run(
        in_batches, rank_pool.store_path()
    ):
        assert all(map(torch.equal, side_by_side, one_by_one))
        assert tasks == 2 * (2 * LAYERS + 1)
        assert communicated


def ring_in_batches(rank, size, store):
    """Works of point-to-point calls tell nobody when they end."""
    peer = 1 - rank
    with torch_group(rank, size, store), OverlapManager(device="cpu", timeout_s=20) as manager:

        def swap(tag):
            got = torch.empty(2)
            yield [
                dist.isend(torch.full((2,), rank + 10.0 * tag), peer, tag=tag),
                dist.irecv(got, peer, tag=tag),
            ]
            sent = dist.isend(got, peer, tag=tag + 8)
            back = torch.empty(2)
            yield dist.irecv(back, peer, tag=tag + 8)
            yield sent
            return got[0].item(), back[0].item()

        return manager.overlap_batches([swap(1), swap(2)])


def test_batches_may_send_and_receive(rank_pool):
    got = rank_pool.run(ring_in_batches, rank_pool.store_path())

    assert got == [[(11.0, 10.0), (21.0, 20.0)], [(10.0, 11.0), (20.0, 21.0)]]


def late(rank, size, store, gate):
    """Rank 1 comes only after rank 0 has seen its deadline."""
    with torch_group(rank, size, store, timeout_s=20):
        side = dist.FileStore(gate, size)
        if rank == 1:
            side.wait(["rank 0 gave up"])
            dist.all_reduce(torch.ones(4))
            return ""
        buffer = torch.ones(4)
        with OverlapManager(device="cpu", timeout_s=0.5) as manager:
            work = []

            def lonely():
                work.append(dist.all_reduce(buffer, async_op=True))
                return work[0]

            handle = manager.schedule(lambda: "computed", lonely)
            try:
                handle.wait(15)
            except CommTimeoutError as error:
                said = str(error)
            else:
                said = "no error"
        side.set("rank 0 gave up", "yes")
        work[0].wait()
        return said, buffer.tolist()


def test_a_peer_that_does_not_come_is_an_error_naming_task_and_lane(rank_pool):
    (said, buffer), _ = rank_pool.run(late, rank_pool.store_path(), rank_pool.store_path())

    assert "task 'lonely[0]' on lane 'comm'" in said
    assert buffer == [2.0] * 4  # the work outlived its deadline, and so did its buffer


def agreeing(rank, size, store, case):
    spec = BackendSpec(
        name="gloo",
        device_types=("cpu",),
        c10d_name="gloo",
        priority=0,
        capabilities=Capabilities(
            ops=frozenset({"all_gather", "broadcast"}), dtypes=frozenset({"int64"})
        ),
        probe=lambda: Probe(True, "always"),
        load=lambda: ProcessGroupBackend,
    )
    with torch_group(rank, size, store) as world, OverlapManager(device="cpu") as manager:
        group = ProcessGroupBackend(spec, world)
        graph = manager.graph()
        for cost in ((5.0, 1.0), (1.0, 5.0)):
            measured = cost if rank == 0 else cost[::-1]
            made = graph.compute(lambda: None, cost_s=measured[0])
            graph.comm(lambda _: None, made, cost_s=measured[1])
        if case == "other graph" and rank == 1:
            graph.comm(lambda: None)
        if case == "veto" and rank == 1:
            manager.disable("too hot here")
        try:
            plan = manager.compile(graph, agree=group)
        except Exception as error:
            return type(error).__name__, str(error)
        return plan.digest, dict(plan.order), plan.serial, plan.reason


def test_ranks_take_the_order_of_rank_0(rank_pool):
    first, second = rank_pool.run(agreeing, rank_pool.store_path(), "costs differ")

    assert first[:3] == second[:3]
    assert first[1] == {"compute": (2, 0), "comm": (3, 1)}
    assert not first[2]
    assert "rank 0" in second[3]


def test_one_veto_makes_all_serial(rank_pool):
    first, second = rank_pool.run(agreeing, rank_pool.store_path(), "veto")

    assert first[:3] == second[:3]
    assert first[2]
    assert "ranks [1]" in first[3]
    assert second[3] == "too hot here"


def test_different_graphs_are_a_mismatch_on_every_rank(rank_pool):
    for name, text in rank_pool.run(agreeing, rank_pool.store_path(), "other graph"):
        assert name == "CollectiveMismatchError"
        assert "rank 0" in text
        assert "rank 1" in text


def losing_a_peer(rank, size, store, gate):
    side = dist.FileStore(gate, size)
    store = dist.FileStore(store, size)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=20)
    )
    dist.barrier()
    if rank == 1:
        side.wait(["rank 0 waits"])
        os._exit(3)

    def doomed():
        work = dist.all_reduce(torch.ones(1024), async_op=True)
        side.set("rank 0 waits", "yes")
        return work

    with OverlapManager(device="cpu", timeout_s=15) as manager:
        handle = manager.schedule([lambda: 1], [doomed])
        try:
            handle.wait()
        except RuntimeError as error:
            answer = type(error).__name__, error.__notes__
        else:
            answer = "no error", []
    dist.destroy_process_group()
    return answer


def test_a_peer_that_dies_fails_the_run_at_once(rank_pool):
    stores = rank_pool.store_path(), rank_pool.store_path()

    outcomes = rank_pool.submit(losing_a_peer, *stores).outcomes(40)

    kind, notes = outcomes[0].result
    assert kind != "no error"
    assert kind != "CommTimeoutError"
    assert "'doomed[0]' (id 1) on lane 'comm'" in notes[0]
    assert "exited with code 3" in outcomes[1].error
