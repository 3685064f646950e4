"""What only the shm backend has: messages in rings, symmetric tensors, a short way, processes."""

import gc
import multiprocessing
import os
import threading

import pytest
import torch
import torch.distributed as dist
from shm_ranks import await_mark, ended, engines, failure, forked, join, leftovers, mark

from sagellm.comm.collective_ops import ShmBackend, _specs, create_comm_backend, factory
from sagellm.comm.collective_ops._groups import GroupSource
from sagellm.comm.collective_ops._shm.hosts import Hosts
from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    P2POp,
    ResourceError,
)
from sagellm.core.protocols.selection import Selection
from sagellm.core.protocols.testing.rank_pool import RankPool

SIZE = 4


@pytest.fixture(scope="module")
def pool():
    with RankPool(SIZE) as made:
        yield made


@pytest.fixture(params=engines())
def meet(pool, request):
    """Where the ranks of one test meet, with one of the engines."""
    return f"{pool.store_path()}.{request.param}"


def same(got, wanted):
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted), (got, wanted)


def on_group(rank, size, meet, name):
    """Run one function of this file on a group of all ranks."""
    with join(rank, size, meet) as b:
        result = globals()[name](b)
        b.barrier()
    return result


# -- messages -------------------------------------------------------------------------------


def every_order_of_tags(b):
    generator = torch.Generator().manual_seed(7)
    sizes = [1, 3000, 70_000, 300_000, 2_000_000, 5]
    if b.rank == 0:
        works = [
            b.send(torch.full((n,), float(tag)), 1, tag, async_op=True)
            for tag, n in enumerate(sizes)
        ]
        for work in works:
            work.wait()
    elif b.rank == 1:
        for tag in torch.randperm(len(sizes), generator=generator).tolist():
            same(b.recv(torch.empty(sizes[tag]), 0, tag), torch.full((sizes[tag],), float(tag)))


def messages_of_one_tag_keep_their_order(b):
    count = 300
    if b.rank == 0:
        works = [
            b.send(torch.full((i % 40 + 1,), float(i)), 2, 5, async_op=True) for i in range(count)
        ]
        assert all(w.wait() is not None for w in works)
    elif b.rank == 2:
        for i in range(count):
            same(b.recv(torch.empty(i % 40 + 1), 0, 5), torch.full((i % 40 + 1,), float(i)))


def everyone_sends_to_everyone_at_once(b):
    others = [r for r in range(b.size) if r != b.rank]
    out = {r: torch.empty(400_000) for r in others}
    ops = [P2POp("send", torch.full((400_000,), float(b.rank)), r) for r in others]
    ops += [P2POp("recv", out[r], r) for r in others]
    for work in b.batch_p2p(ops):
        work.wait()
    for r in others:
        same(out[r], torch.full((400_000,), float(r)))


def a_message_overtakes_collectives(b):
    x = torch.ones(1_500_000)
    work = None
    if b.rank == 0:
        work = b.send(x, 3, async_op=True)
    elif b.rank == 3:
        work = b.recv(x.mul_(0), 0, async_op=True)
    for _ in range(3):
        b.all_reduce(torch.ones(10))
    if work is not None:
        same(work.wait(), torch.ones(1_500_000))


def unexpected_messages_are_bounded(b):
    if b.rank == 0:
        works = [b.send(torch.full((4096,), float(i)), 1, i, async_op=True) for i in range(300)]
        b.barrier()
        for work in works:
            work.wait()
        return None
    b.barrier()
    if b.rank != 1:
        return None
    same(b.recv(torch.empty(4096), 0, 299), torch.full((4096,), 299.0))
    held = sum(
        a.payload.nbytes
        for kept in b._shm._messages._peers[0].arrived.values()
        for a in kept
        if a.payload is not None
    )
    for i in reversed(range(299)):
        same(b.recv(torch.empty(4096), 0, i), torch.full((4096,), float(i)))
    return held


def inference_tensors_travel(b):
    with torch.inference_mode():
        x, big = torch.full((3,), float(b.rank)), torch.full((500_000,), float(b.rank))
        if b.rank < 2:
            works = [b.send(x, 1 - b.rank, async_op=True), b.send(big, 1 - b.rank, async_op=True)]
            got = torch.empty(500_000)
            same(b.recv(torch.empty(3), 1 - b.rank), torch.full((3,), 1.0 - b.rank))
            b.recv(got, 1 - b.rank)
            same(got, torch.full((500_000,), 1.0 - b.rank))
            for work in works:
                work.wait()
        work = b.all_reduce(big, async_op=True)
    same(work.wait(), torch.full((500_000,), 6.0))


MESSAGES = [
    every_order_of_tags,
    messages_of_one_tag_keep_their_order,
    everyone_sends_to_everyone_at_once,
    a_message_overtakes_collectives,
    inference_tensors_travel,
]


@pytest.mark.parametrize("case", MESSAGES, ids=lambda f: f.__name__)
def test_messages(pool, meet, case):
    pool.run(on_group, meet, case.__name__)


def test_unexpected_messages_hold_little_memory_at_the_receiver(pool, meet):
    held = pool.run(on_group, meet, "unexpected_messages_are_bounded")[1]

    assert 0 < held <= 1 << 20


# -- memory ---------------------------------------------------------------------------------


def symmetric_tensors(b):
    plain = [torch.full((300_000,), b.rank + 1.5), torch.full((77,), b.rank + 1.5)]
    for x in plain:
        s = b.empty(x.shape, x.dtype)
        s.copy_(x)
        same(b.all_reduce(s), b.all_reduce(x.clone()))
        view = s[16:]
        view.copy_(x[16:])
        same(b.all_reduce(view), b.all_reduce(x[16:].clone()))
        if b.rank:  # not symmetric on every rank: staged on all
            s = x.clone()
        else:
            s.copy_(x)
        same(b.all_reduce(s), b.all_reduce(x.clone()))
    del s, view
    gc.collect()
    used = b._shm.arena.used_bytes
    with pytest.raises(ResourceError, match="larger arena_bytes"):
        b.empty((1 << 40,), torch.uint8)
    return used


def test_symmetric_tensors_give_the_same_bits_and_go_with_their_last_view(pool, meet):
    assert pool.run(on_group, meet, "symmetric_tensors") == [0] * SIZE


# -- the short way --------------------------------------------------------------------------


def both_ways_agree(b):
    remove = None
    results = []
    for _ in range(2):
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool):
            x = ((torch.arange(1000) * (b.rank + 3)) % 7).to(dtype)
            ops = ["sum", "max"] + ["avg"] * dtype.is_floating_point
            found += [b.all_reduce(x.clone(), op) for op in ops]
            found.append(b.all_gather_into_tensor(torch.empty(4000, dtype=dtype), x))
            found.append(b.reduce_scatter_tensor(torch.empty(250, dtype=dtype), x))
            found.append(b.broadcast(x.clone(), 2))
        results.append(found)
        remove = b.add_hook(before=lambda call: None)  # the general way from here on
    remove()
    for short, general in zip(*results, strict=True):
        same(short, general)
    calls = b.get_stats().ops
    assert calls["all_reduce"].calls == 2 * 13
    assert calls["all_gather_into_tensor"].calls == 10
    assert calls["all_gather_into_tensor"].bytes == 2 * 1000 * (4 + 2 + 2 + 4 + 1)
    assert b.get_bandwidth_stats().busbw_bytes_per_s["reduce_scatter_tensor"] > 0
    b.reset_stats()
    b.barrier()
    assert {op: s.calls for op, s in b.get_stats().ops.items() if s.calls} == {"barrier": 1}


def registered_tensors(b):
    x, out, part = torch.full((512,), 1.0), torch.empty(512 * b.size), torch.empty(512)
    handles = [b.register(t) for t in (x, out, part, x)]
    for step in range(3):
        same(b.all_reduce(x.fill_(b.rank + step)), torch.full((512,), 6.0 + 4 * step))
        x.fill_(b.rank)
        b.all_gather_into_tensor(out, x)
        same(out, torch.arange(4.0).repeat_interleave(512))
        same(b.reduce_scatter_tensor(part, out), torch.full((512,), 4.0 * b.rank))
        work = b.all_reduce(x.fill_(1), async_op=True)
        b.all_reduce(out.fill_(1))  # behind the queue
        same(work.wait(), torch.full((512,), 4.0))
        same(out[:4], torch.full((4,), 4.0))
    assert b.get_stats().ops["all_reduce"].calls == 9
    for handle in (*handles, handles[0]):
        handle.release()
    assert not b._hot._kept
    assert not b._hot._prepared
    with pytest.raises(ConfigError, match="contiguous"):
        b.register(torch.ones(4, 4).t())


def moved_storage_is_refused_and_harms_nobody(b):
    x = torch.ones(512)
    handle = b.register(x)
    if b.engine == "native":  # the Python engine keeps the memory that it was given
        x.data = torch.ones(512)
        with pytest.raises(ConfigError, match="has changed"):
            b.all_reduce(x)
    handle.release()
    same(b.all_reduce(x), torch.full((512,), 4.0))


def odd_tensors_take_the_general_way(b):
    x = torch.tensor([1 + 2j]).conj().imag  # its minus sign is a flag, not bits
    same(b.all_reduce(x.clone()), torch.tensor([-8.0]))
    flagged = torch.tensor([complex(1, b.rank + 1)]).conj()
    out = torch.empty(b.size, dtype=flagged.dtype)
    b.all_gather_into_tensor(out, flagged)
    same(out, torch.tensor([complex(1, -r - 1) for r in range(b.size)]))
    same(b.all_reduce(flagged.imag, "max"), torch.tensor([-1.0]))
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        same(b.all_reduce(parameter).data, torch.full((3,), 4.0))
    grad = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        b.all_reduce(grad)
    same(grad.detach(), torch.full((3,), 4.0))
    with b.coalesce():
        b.all_reduce(y := torch.ones(2))
        b.all_reduce(z := torch.ones(2, 3).t())
    same(y, torch.full((2,), 4.0))
    same(z, torch.full((3, 2), 4.0))


@pytest.mark.parametrize(
    "case",
    [
        both_ways_agree,
        registered_tensors,
        moved_storage_is_refused_and_harms_nobody,
        odd_tensors_take_the_general_way,
    ],
    ids=lambda f: f.__name__,
)
def test_the_short_way(pool, meet, case):
    pool.run(on_group, meet, case.__name__)


def late_peers(rank, size, meet, kind):
    with join(rank, size, meet) as b:
        x = torch.ones(4)
        handle = b.register(x)
        b.all_reduce(x)
        b.timeout_s = 0.3
        calls = {
            "barrier": b.barrier,
            "plain": lambda: b.all_reduce(torch.ones(4)),
            "registered": lambda: b.all_reduce(x),
        }
        never_sent = torch.empty(1)
        call = calls[kind] if rank == 0 else lambda: b.recv(never_sent, 0)
        with pytest.raises(CommError) as failed:
            call()
        handle.release()
        return type(failed.value) is CommTimeoutError


@pytest.mark.parametrize("kind", ["barrier", "plain", "registered"])
def test_a_new_deadline_counts_for_every_way(pool, meet, kind):
    assert pool.run(late_peers, meet, kind, timeout_s=15)[0]


def async_calls_run_in_order(b):
    xs = [torch.full((1000 * (i + 1),), float(b.rank)) for i in range(10)]
    works = [b.all_reduce(x, async_op=True) for x in xs]
    b.barrier()
    assert all(w.done() for w in works)
    for x in xs:
        same(x, torch.full_like(x, 6.0))
    threads = [t.name for t in threading.enumerate() if t.name.startswith("sagellm-comm-shm")]
    assert len(threads) == 1


def test_async_calls_keep_their_order_and_sync_ones_go_behind_them(pool, meet):
    pool.run(on_group, meet, "async_calls_run_in_order")


# -- groups and processes -------------------------------------------------------------------


def groups_side_by_side(rank, size, meet):
    first, second = join(rank, size, meet, name="first"), join(rank, size, meet, name="second")
    pair = first.split([rank // 2 * 2, rank // 2 * 2 + 1])
    mirror = second.split(list(reversed(range(size))), name="mirror")
    for step in range(20):
        works = [b.all_reduce(torch.ones(50_000), async_op=True) for b in (first, second)]
        same(pair.all_reduce(torch.full((3,), float(rank))), torch.full((3,), rank // 2 * 4 + 1.0))
        same(
            mirror.broadcast(torch.full((2,), float(rank + step)), 0), torch.full((2,), 3.0 + step)
        )
        for work in works:
            same(work.wait(), torch.full((50_000,), 4.0))
    assert mirror.global_ranks == (3, 2, 1, 0)
    deeper = mirror.split([0, 2])
    if rank in (1, 3):
        assert deeper.global_ranks == (3, 1)
        same(deeper.all_gather(torch.tensor(rank))[1], torch.tensor(1))
        deeper.close()
    alone = pair.split([pair.rank])
    assert alone.global_ranks == (rank,)
    for b in (pair, mirror, first, second):
        b.close()
    return leftovers()


def test_groups_side_by_side_leave_nothing_behind(pool, meet):
    before = pool.run(leftovers_of)
    for (fds, maps, threads), (old, _, _) in zip(
        pool.run(groups_side_by_side, meet), before, strict=True
    ):
        assert (maps, threads) == ([], [])
        assert fds == old


def leftovers_of(rank, size):
    gc.collect()
    return leftovers()


def two_ranks_in_each_process(rank, size, meet):
    """Eight ranks on however few cores there are: each process forks another rank."""

    def be(r):
        with join(r, 2 * size, meet, timeout_s=60.0) as b:
            for n in (1, 1000, 200_000):
                same(b.all_reduce(torch.full((n,), float(r))), torch.full((n,), 28.0))
            same(torch.stack(b.all_gather(torch.tensor(r))), torch.arange(8))
            b.send(torch.tensor([r]), (r + 1) % 8)
            assert b.recv(torch.tensor([0]), (r - 1) % 8).item() == (r - 1) % 8
            b.barrier()

    pid = forked(lambda: be(size + rank))
    be(rank)
    return ended(pid, 60.0)


def test_more_ranks_than_cores(pool, meet):
    assert pool.run(two_ranks_in_each_process, meet) == [0] * SIZE


def forks_of_a_rank(rank, size, meet):
    b = join(rank, size, meet)
    x = b.empty((100,), torch.float32).fill_(1)
    b.all_reduce(torch.ones(1), async_op=True).wait()
    handle = b.register(torch.ones(4))

    def child():
        for call in (
            lambda: b.all_reduce(torch.ones(1)),
            lambda: b.recv(torch.ones(1), (rank + 1) % size),
            lambda: b.empty((1,), torch.float32),
            lambda: b.split([0, 1, 2, 3]),
        ):
            assert "forked child" in failure(call)[2]
        b.abort("nobody hears this")
        b.close()
        fds, maps, _ = leftovers()
        assert not maps
        assert not [f for f in fds if "memfd" in f]
        if rank == 1:
            mark(meet, "child")
            await_mark(meet, "done")

    pid = forked(child)
    if rank != 1:
        assert ended(pid) == 0
    same(b.all_reduce(x), torch.full((100,), 4.0))
    handle.release()
    if rank == 1:  # leaves, while its child lives on
        await_mark(meet, "child")
        b.close()
        del b, x
        found = ("PeerLostError",)
    else:
        found = failure(lambda: (b.barrier(), b.barrier()))[1:2]
        b.close()
    if rank == 0:
        mark(meet, "done")
    if rank == 1:
        assert ended(pid) == 0
    return found[0]


def test_forked_child_may_not_use_the_group_and_does_not_keep_it_alive(pool, meet):
    assert pool.run(forks_of_a_rank, meet) == ["PeerLostError"] * SIZE


def new_group_in_the_child(rank, size, meet):
    with join(rank, size, meet) as b:

        def child():
            with join(rank, size, f"{meet}-child") as own:
                same(own.all_reduce(torch.ones(3)), torch.full((3,), 4.0))
                own.barrier()

        pid = forked(child)
        same(b.all_reduce(torch.ones(3)), torch.full((3,), 4.0))
        return ended(pid)


def test_forked_children_make_groups_of_their_own(pool):
    assert pool.run(new_group_in_the_child, pool.store_path()) == [0] * SIZE


def in_spawned_process(rank, size, meet, queue):
    with join(rank, size, meet) as b:
        queue.put(b.all_reduce(torch.ones(2)).tolist())


def test_spawned_processes_may_be_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=in_spawned_process, args=(r, 2, str(tmp_path / "meet"), queue))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
    assert found == [[2.0, 2.0]] * 2


# -- making one -------------------------------------------------------------------------------


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
        assert "; without native: not built" in _specs.SHM.probe().reason
        assert ShmBackend.engines()["native"] == "not built"
    monkeypatch.setattr("sagellm.comm.collective_ops._shm.engines.available_engines", dict)
    assert "needs the compiled engine" in _specs.SHM.probe().reason
    monkeypatch.delattr(os, "memfd_create")
    assert "use gloo" in _specs.SHM.probe().reason
