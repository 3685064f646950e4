"""The adapter to torch process groups: gloo ranks as threads, each with real sockets."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sagellm.core.protocols import (  # noqa: E402
    BackendSpec,
    Capabilities,
    CollectiveMismatchError,
    CommTimeoutError,
    CompletedWork,
    ConfigError,
    CostModelProtocol,
    CostTable,
    DistributedRuntimeError,
    Estimate,
    IntegrityError,
    KVBlock,
    Lowering,
    PeerLostError,
    Probe,
    ResourceError,
    UnsupportedOperationError,
)
from sagellm.core.protocols._process_group.failure import FailureBoard, classify  # noqa: E402
from sagellm.core.protocols._process_group.kv import _PREFIX, KV_TAG, encode  # noqa: E402
from sagellm.core.protocols._process_group.lowering import CALL_RULES  # noqa: E402
from sagellm.core.protocols._process_group.stats import busbw_factor  # noqa: E402
from sagellm.core.protocols._process_group.torch_work import DeviceWork  # noqa: E402
from sagellm.core.protocols._process_group.watchdog import Watchdog  # noqa: E402
from sagellm.core.protocols.process_group import (  # noqa: E402
    ProcessGroupBackend,
    RawCall,
    RawWork,
    TensorBackend,
    Transport,
    completed_future,
    fingerprint,
    table_by_store,
)

OPS = frozenset(
    "all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single barrier broadcast "
    "gather recv reduce reduce_scatter reduce_scatter_tensor scatter send".split()
)
SPEC = BackendSpec(
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
    load=lambda: ProcessGroupBackend,
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

    def __init__(self, size):
        self.size = size
        self.pool = ThreadPoolExecutor(size)
        self.store = dist.HashStore()
        self.turn = 0

    def groups(self):
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

    def backends(self, spec=SPEC, **arguments):
        return [ProcessGroupBackend(spec, g, timeout_s=5, **arguments) for g in self.groups()]

    def run(self, fn, backends=None, **arguments):
        backends = self.backends(**arguments) if backends is None else backends
        return [f.result(30) for f in [self.pool.submit(fn, b) for b in backends]]


@pytest.fixture(scope="module")
def ranks():
    made = {}

    def get(size):
        return made.setdefault(size, Ranks(size))

    yield get
    for found in made.values():
        found.pool.shutdown()


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# -- lowering -----------------------------------------------------------------------------


def test_reductions_the_library_lacks_are_lowered_and_counted(ranks):
    def body(b):
        same(b.all_reduce(torch.full((3,), b.rank + 1.0), "avg"), torch.full((3,), 1.5))
        flags = torch.tensor([b.rank == 0, False, True])
        same(b.all_reduce(flags), torch.tensor([True, False, True]))
        same(b.reduce_scatter([torch.full((2,), 200, dtype=torch.uint8)] * 2)[0].item(), 144)
        half = b.all_reduce(torch.ones(2, dtype=torch.bfloat16), "avg", async_op=True).wait()
        assert half.dtype == torch.bfloat16
        stats = b.get_stats().ops
        return stats["all_reduce"].lowered, stats["reduce_scatter"].lowered

    assert ranks(2).run(body) == [(4, 1)] * 2


def test_what_no_rule_covers_is_refused_by_name_before_sending(ranks):
    def body(b):
        with pytest.raises(UnsupportedOperationError, match="gloo has no band: the library says"):
            b.all_reduce(torch.ones(2, dtype=torch.int32), "band")
        with pytest.raises(UnsupportedOperationError, match="gloo has no bor"):
            b.all_reduce(torch.ones(2, dtype=torch.int32), "bor")
        with pytest.raises(UnsupportedOperationError, match="gloo has no int8"):
            b.all_reduce(torch.ones(2, dtype=torch.int8))
        with pytest.raises(UnsupportedOperationError, match="gloo has no float64"):
            b.broadcast(torch.ones(2, dtype=torch.float64), 0)
        return b.all_reduce(torch.ones(1)).item()

    assert ranks(2).run(body) == [2.0, 2.0]


LOWERED_OPS = {
    "all_gather": "list_all_gather_by_broadcast",
    "all_to_all_single": "all_to_all_by_all_gather",
    "barrier": "barrier_by_all_reduce",
    "gather": "gather_by_all_gather",
    "reduce": "reduce_by_all_reduce",
    "reduce_scatter": "reduce_scatter_by_all_reduce",
    "scatter": "scatter_by_broadcast",
}


def test_whole_operations_are_lowered(ranks):
    assert set(LOWERED_OPS.values()) == set(CALL_RULES)
    poor = replace(
        SPEC,
        capabilities=replace(SPEC.capabilities, ops=OPS - set(LOWERED_OPS)),
        lowering=tuple(Lowering(op, rule, "a test") for op, rule in LOWERED_OPS.items()),
    )

    def body(b):
        x = torch.arange(2.0) + 10 * b.rank
        everyone = [torch.arange(2.0) + 10 * r for r in range(3)]
        for got, wanted in zip(b.all_gather(x), everyone, strict=True):
            same(got, wanted)
        out = torch.empty(3)
        same(
            b.all_to_all_single(out, torch.arange(3.0) + 10 * b.rank),
            torch.tensor([0.0, 10.0, 20.0]) + b.rank,
        )
        assert b.barrier() is None
        got = b.gather(x, 2)
        assert (got is None) == (b.rank != 2)
        if got:
            same(torch.stack(got), torch.stack(everyone))
        same(b.scatter(torch.empty(2), everyone if b.rank == 1 else None, 1), x)
        y = x.clone()
        b.reduce(y, 0)
        same(y, sum(everyone) if b.rank == 0 else x)
        same(b.reduce_scatter([x, x, x]), sum(everyone))
        with pytest.raises(UnsupportedOperationError, match="needs even splits"):
            b.all_to_all_single(torch.empty(3), torch.ones(3), [1, 1, 1], [1, 1, 1])
        assert b.explain("gather", 8).algorithm == "gather_by_all_gather"
        return b.get_stats().ops["gather"].lowered

    assert ranks(3).run(body, spec=poor) == [1] * 3


def test_unknown_rule_is_refused(ranks):
    odd = replace(
        SPEC,
        capabilities=replace(SPEC.capabilities, ops=OPS - {"gather"}),
        lowering=(Lowering("gather", "by_magic", "a test"),),
    )
    with pytest.raises(UnsupportedOperationError, match="'by_magic', which is not one of"):
        ranks(2).run(lambda b: b.gather(torch.ones(1), 0), spec=odd)


# -- failure ------------------------------------------------------------------------------


def test_deadline_names_op_sequence_group_ranks_bytes_and_who_is_missing(ranks):
    backends = ranks(2).backends()
    backends[0].timeout_s = 0.3
    with pytest.raises(CommTimeoutError) as caught:
        backends[0].all_reduce(torch.ones(4))
    text = str(caught.value)
    for part in (
        "all_reduce sum #0 of group",
        "rank 0 of 2, 16 bytes float32",
        "rank 1 (global 1)",
    ):
        assert part in text
    with pytest.raises(PeerLostError, match="rank 0 left the group: comm_timeout") as lost:
        backends[1].all_reduce(torch.ones(4))
    assert lost.value.rank == 0
    with pytest.raises(PeerLostError, match="the group is dead since"):
        backends[1].barrier()
    assert backends[1].get_stats().ops["all_reduce"].errors == 1


def test_abort_frees_a_thread_that_waits_and_its_peer(ranks):
    backends = ranks(2).backends()
    works = [b.recv(torch.ones(2), 1 - b.rank, async_op=True) for b in backends]
    waiters = [ranks(2).pool.submit(work.exception) for work in works]
    assert [w.result(10) for w in waiters] == [None, None]
    waiting = ranks(2).pool.submit(works[1].wait)

    backends[0].abort("enough")

    with pytest.raises(PeerLostError, match="aborted: enough"):
        waiting.result(10)
    with pytest.raises(DistributedRuntimeError, match="enough"):
        works[0].wait()
    with pytest.raises(DistributedRuntimeError, match="enough"):
        backends[0].barrier()


def test_hook_error_reaches_the_caller_and_aborts(ranks):
    backends = ranks(2).backends()

    def after(call, seconds, error):
        raise ZeroDivisionError("a bug")

    backends[0].add_hook(after=after)

    def body(b):
        try:
            b.all_reduce(torch.ones(1))
            b.all_reduce(torch.ones(1))
        except (ZeroDivisionError, PeerLostError) as e:
            return type(e)
        return None

    assert ranks(2).run(body, backends) == [ZeroDivisionError, PeerLostError]


def test_take_over_stands_for_the_call(ranks):
    (backend,) = [ProcessGroupBackend(SPEC, None)]
    x, y = torch.ones(1), torch.zeros(1)
    remove = backend.add_hook(take_over=lambda call: CompletedWork(y))
    backend.all_reduce(x)
    remove()
    assert backend.get_stats().ops["all_reduce"].calls == 1


def test_checked_calls_name_both(ranks):
    def body(b):
        try:
            b.broadcast(torch.ones(1), 1) if b.rank else b.barrier()
        except CollectiveMismatchError as e:
            return e.calls
        return None

    calls = {0: "#0 barrier", 1: "#0 broadcast float32 4 bytes root 1"}
    assert ranks(2).run(body, options={"check_calls": True}) == [calls, calls]


def test_fingerprint_ignores_what_may_differ():
    x = torch.ones(4)
    even = RawCall("all_to_all", [x], [x])
    assert fingerprint(even) == "all_to_all float32 16 bytes"
    assert "uneven" in fingerprint(RawCall("all_to_all", [x], [x], in_splits=[4], out_splits=[4]))
    root = RawCall("scatter", [x, x], [x], peer=0)
    assert fingerprint(root) == fingerprint(RawCall("scatter", [], [x], peer=0))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Connection closed by peer [127.0.0.1]:9", "peer_lost"),
        ("Broken pipe", "peer_lost"),
        ("Application timeout caused pair closure", "peer_lost"),
        ("Timed out waiting 1ms for recv operation to complete", "comm_timeout"),
        ("Invalid scalar type", "distributed_runtime_error"),
    ],
)
def test_library_texts_are_told_apart(text, code):
    assert classify(RuntimeError(text)) == code


def test_board_without_store_still_names_the_kind():
    board = FailureBoard(None, 0, (0, 1))
    board.post("peer_lost", "x")
    error = board.verdict("barrier", "peer_lost", RuntimeError("Broken pipe"))
    assert isinstance(error, PeerLostError)
    assert error.rank is None


def test_board_whose_store_is_gone_does_not_hang():
    class Gone:
        def set(self, *_):
            raise RuntimeError("connection was reset")

        check = set

    board = FailureBoard(Gone(), 0, (4, 5))
    board.post("comm_timeout", "x")
    error = board.verdict("barrier", "comm_timeout", RuntimeError("Timed out"))
    assert isinstance(error, CommTimeoutError)


# -- KV blocks ----------------------------------------------------------------------------


def test_kv_header_is_bounded(monkeypatch):
    from sagellm.core.protocols._process_group import kv

    monkeypatch.setattr(kv, "_MAX_BLOCKS", 1)
    with pytest.raises(ResourceError, match="2 blocks in one call, at most 1"):
        encode([KVBlock(torch.ones(1))] * 2)
    monkeypatch.setattr(kv, "MAX_KV_BYTES", 2)
    with pytest.raises(ResourceError, match="4 bytes of KV in one call, at most 2"):
        encode([KVBlock(torch.ones(1))])


def kv_message(header, nbytes=0):
    return [_PREFIX.pack(b"sgKV", 1, 0, len(header), nbytes), header]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([_PREFIX.pack(b"oops", 1, 0, 4, 0)], "not KV blocks of version 1"),
        ([_PREFIX.pack(b"sgKV", 9, 0, 4, 0)], "version 9"),
        ([_PREFIX.pack(b"sgKV", 1, 0, 1 << 40, 0)], "are beyond"),
        (kv_message(b"\xc1\xc1\xc1"), "header cannot be read"),
        (kv_message(b"\x91\x91\x94\x91\x02\xa6system\x00\x00"), "'system' is no dtype"),
        (kv_message(b"\x91\x91\x94\x91\xff\xa7float32\x00\x00"), "is not possible"),
        (kv_message(b"\x91\x91\x94\x91\x02\xa7float32\x00\x00", 3), "announced 3"),
    ],
)
def test_kv_receiver_refuses_rubbish(ranks, messages, text):
    backends = ranks(2).backends()

    def body(b):
        if b.rank == 0:
            for message in messages:
                data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
                b.process_group.send([data], 1, KV_TAG).wait()
            return None
        with pytest.raises(IntegrityError, match=text):
            b.recv_kv_blocks(0)
        with pytest.raises(IntegrityError, match="the group is dead"):
            b.barrier()
        return None

    ranks(2).run(body, backends)


# -- deadlines on devices, without a device -----------------------------------------------


def test_watchdog_reports_the_late_once_and_forgets_the_done():
    late = threading.Event()
    seen = []

    def expired():
        seen.append("late")
        late.set()

    dog = Watchdog("test", poll_s=0.005)
    dog.watch(lambda: True, 0.0, lambda: seen.append("never"))
    dog.watch(lambda: 1 / 0, 0.0, lambda: seen.append("never"))
    dog.watch(lambda: False, 0.01, expired)
    assert late.wait(5)
    dog.close()
    dog.watch(lambda: False, 0.0, expired)
    assert seen == ["late"]


def test_device_work_orders_the_stream_and_blocks_only_when_asked():
    class Raw:
        waits = 0
        over = False

        def wait(self):
            self.waits += 1

        def is_completed(self):
            return self.over

    raw = Raw()
    work = DeviceWork(raw, torch.device("meta"))
    assert work.wait(0)
    assert not work.synchronize(0.001)
    assert not work.done()
    raw.over = True
    assert work.synchronize(1)
    assert raw.waits == 2
    work.captured = True
    with pytest.raises(ConfigError, match="captured"):
        work.synchronize(1)


# -- polling, element types, sizes from peers ---------------------------------------------


def polled(work):
    """Ask `done()` and nothing else until it says yes."""
    end = time.monotonic() + 10
    while not work.done():
        assert time.monotonic() < end, "done() never turned True"
        time.sleep(0.001)
    return work


POLLED = {
    "all_gather": lambda b, x: b.all_gather(x, async_op=True),
    "all_gather_into_tensor": lambda b, x: b.all_gather_into_tensor(
        torch.empty(8), x, async_op=True
    ),
    "all_reduce": lambda b, x: b.all_reduce(x, async_op=True),
    "all_reduce avg": lambda b, x: b.all_reduce(x, "avg", async_op=True),
    "all_to_all": lambda b, x: b.all_to_all([x, x], async_op=True),
    "all_to_all_single": lambda b, x: b.all_to_all_single(torch.empty(4), x, async_op=True),
    "barrier": lambda b, x: b.barrier(async_op=True),
    "broadcast": lambda b, x: b.broadcast(x, 0, async_op=True),
    "gather": lambda b, x: b.gather(x, 0, async_op=True),
    "reduce": lambda b, x: b.reduce(x, 0, async_op=True),
    "reduce_scatter": lambda b, x: b.reduce_scatter([x, x], async_op=True),
    "reduce_scatter_tensor": lambda b, x: b.reduce_scatter_tensor(torch.empty(2), x, async_op=True),
    "scatter": lambda b, x: b.scatter(
        torch.empty(4), [x, x] if b.rank == 0 else None, 0, async_op=True
    ),
    "send, recv": lambda b, x: (
        b.recv(x, 0, async_op=True) if b.rank else b.send(x, 1, async_op=True)
    ),
    "kv": lambda b, x: (
        b.recv_kv_blocks(0, async_op=True) if b.rank else b.send_kv_blocks([x], 1, async_op=True)
    ),
}


@pytest.mark.parametrize("op", POLLED)
def test_done_turns_true_without_anybody_waiting(ranks, op):
    ranks(2).run(lambda b: polled(POLLED[op](b, torch.ones(4))).result())


def test_reduce_scatter_is_right_and_keeps_short_waits_and_deadlines(ranks):
    def body(b):
        out = torch.empty(2, 2)
        b.reduce_scatter_tensor(out, torch.arange(8.0), async_op=True).wait()
        same(out, (torch.arange(4.0) + 4 * b.rank).view(2, 2) * 2)

    ranks(2).run(body)
    backends = ranks(2).backends()
    work = backends[0].reduce_scatter([torch.ones(2)] * 2, async_op=True)
    start = time.monotonic()
    with pytest.raises(CommTimeoutError, match="still in flight"):
        work.wait(0.02)
    backends[0].timeout_s = 0.3
    with pytest.raises(CommTimeoutError, match="rank 1"):
        backends[0].reduce_scatter([torch.ones(2)] * 2)
    assert time.monotonic() - start < 3


ODD = [torch.int16, torch.uint16, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", ODD, ids=str)
def test_element_types_gloo_does_not_know_travel_as_bytes(ranks, dtype):
    anything = replace(SPEC, capabilities=replace(SPEC.capabilities, move_dtypes=frozenset()))
    width = torch.empty(0, dtype=dtype).itemsize

    def body(b):
        everyone = [
            (torch.arange(4 * width, dtype=torch.uint8) + 64 * r).view(dtype) for r in range(2)
        ]
        x = everyone[b.rank]

        def equal(got, *wanted):
            same(torch.cat(list(got)).view(torch.uint8), torch.cat(wanted).view(torch.uint8))

        equal(b.all_gather(x), *everyone)
        equal([b.broadcast(x.clone(), 1)], everyone[1])
        equal(b.gather(x, 0) or everyone, *everyone)
        equal([b.scatter(x.clone(), everyone if b.rank == 0 else None, 0)], x)
        out = torch.empty_like(x)
        equal([b.all_to_all_single(out, x)], *(e[2 * b.rank : 2 * b.rank + 2] for e in everyone))
        parts = [x[:1], x[1:]]
        equal(
            b.all_to_all(parts),
            *([e[:1] for e in everyone] if b.rank == 0 else [e[1:] for e in everyone]),
        )

    uneven = replace(anything, capabilities=replace(anything.capabilities, uneven=True))
    ranks(2).run(body, spec=uneven)


class Liar(Transport):
    """Rank 0 of two, whose peer announces whatever a test wants in every all-to-all."""

    rank, size, global_ranks, group_name = 0, 2, (0, 1), "liar"
    device = torch.device("cpu")

    def __init__(self, row):
        self.row = row
        self.aborted = ""

    def issue(self, call):
        assert call.op == "all_to_all", "nothing else may be sent on such an answer"
        out = call.outputs[0]
        out[0] = call.inputs[0][0]
        out[1] = torch.tensor(self.row)
        return Done()

    def issue_batch(self, calls):
        return [self.issue(call) for call in calls]

    def explain_failure(self, describe, error):
        self.abort(describe)
        return error

    def abort(self, reason):
        self.aborted = reason

    def close(self):
        pass

    def split(self, ranks, name, timeout_s):
        return None


class Done(RawWork):
    def wait(self, timeout_s):
        return True

    synchronize = wait

    def done(self):
        return True


class OverAnything(TensorBackend):
    def _wrap(self, transport):
        return OverAnything(self.spec, transport)

    @property
    def process_group(self):
        return None


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([4, 1, -1] + [0] * 7, "is no shape"),
        ([4, 9, 1] + [0] * 7, "announces 9 dimensions"),
        ([4, -1, 1] + [0] * 7, "announces -1 dimensions"),
        ([4, 1, 1, 7] + [0] * 6, "is no shape"),
        ([4, 1, 1 << 62] + [0] * 7, "is no shape"),
        ([4, 2, 1 << 20, 1 << 20] + [0] * 6, "more than 68719476736"),
        ([8, 1, 3] + [0] * 7, "elements of 8 bytes, this rank has 4"),
    ],
)
def test_sizes_that_a_peer_announces_are_bounded(row, text):
    uneven = replace(SPEC, capabilities=replace(SPEC.capabilities, uneven=True))
    transport = Liar(row)
    backend = OverAnything(uneven, transport)
    with pytest.raises(IntegrityError, match=text):
        backend.all_to_all([torch.ones(2), torch.ones(3)])
    assert "all_to_all" in transport.aborted
    with pytest.raises(IntegrityError, match="the group is dead"):
        backend.barrier()


# -- the rest -----------------------------------------------------------------------------


def test_busbw_factors_are_those_of_nccl_tests():
    factors = {op: busbw_factor(op, 8) for op in ("all_reduce", "reduce_scatter", "broadcast")}
    assert factors == {"all_reduce": 1.75, "reduce_scatter": 0.875, "broadcast": 1.0}


def test_completed_future_holds_result_or_error():
    assert completed_future(3).wait() == 3
    with pytest.raises(ConfigError):
        completed_future(None, ConfigError("x")).wait()


def test_options_device_and_deadline_are_checked():
    with pytest.raises(
        ConfigError, match="gloo has no option nonsense; known: check_calls, flight_entries"
    ):
        ProcessGroupBackend(SPEC, None, options={"nonsense": 1})
    with pytest.raises(ConfigError, match="gloo serves cpu, not meta"):
        ProcessGroupBackend(SPEC, None, device="meta")
    with pytest.raises(ConfigError, match="above 0"):
        ProcessGroupBackend(SPEC, None, timeout_s=0)


def cost_model(name, algorithm, time_us):
    """A model whose table is its own, and which reads whatever table it is given."""
    from unittest.mock import Mock

    model = Mock(spec=CostModelProtocol)
    curve = {("all_reduce", algorithm, 2): ((1, time_us), (1024, time_us / 3))}
    model.freeze.return_value = CostTable(name, 1, curve)

    def select(table, op, nbytes, group):
        ((_, found, _), points), *_ = table.curves.items()
        return found, Estimate(points[-1][1], 0.0, 1e9, None, "calibrated")

    model.select.side_effect = select
    return model


def test_explain_is_rank_0s_on_every_rank(ranks):
    groups = ranks(2).groups()
    models = [cost_model("ring-host", "ring", 0.1), cost_model("tree-host", "tree", 9.0)]

    def one(rank):
        with ProcessGroupBackend(SPEC, groups[rank], timeout_s=5, cost_model=models[rank]) as b:
            same(b.all_reduce(torch.ones(2)), torch.full((2,), 2.0))
            return b.explain("all_reduce", 1024)

    first, second = ranks(2).pool.map(one, range(2))
    assert first == second
    assert first.algorithm == "ring"
    assert first.estimate_us == 0.1 / 3
    assert "ring-host" in first.reason


def test_rank_that_hands_in_no_model_is_waited_for_no_longer_than_the_deadline(ranks):
    groups = ranks(2).groups()
    model = cost_model("x", "ring", 1.0)
    with pytest.raises(CommTimeoutError, match="on all ranks or on none"):
        ProcessGroupBackend(SPEC, groups[1], timeout_s=0.3, cost_model=model)


def test_table_by_store_is_rank_0s_and_bounded():
    store = dist.HashStore()
    ours, theirs = (cost_model(n, "ring", 2.0).freeze() for n in ("first", "second"))
    assert table_by_store(store, 0, ours, 1) == ours
    assert table_by_store(store, 1, theirs, 1) == ours
    with pytest.raises(CommTimeoutError, match="rank 0 gave no cost table"):
        table_by_store(store, 1, theirs, 0.05)
    store.set("sagellm/cost_table/3", b"rubbish")
    with pytest.raises(IntegrityError, match="cannot be read"):
        table_by_store(store, 1, theirs, 1)


def test_group_outside_the_default_world_cannot_be_split(ranks):
    with pytest.raises(UnsupportedOperationError, match="init_process_group first"):
        ranks(2).backends()[0].split([0])


def test_explain_follows_the_cost_model():
    from unittest.mock import Mock

    model = Mock(spec=CostModelProtocol)
    model.freeze.return_value = CostTable("here", 1, {})
    model.select.return_value = ("tree", Estimate(7.0, 6.0, 8.0, None, "measured"))
    choice = ProcessGroupBackend(SPEC, None, cost_model=model).explain("all_reduce", 1024)
    assert (choice.algorithm, choice.estimate_us) == ("tree", 7.0)
    assert "cost model here" in choice.reason
    with pytest.raises(UnsupportedOperationError):
        ProcessGroupBackend(SPEC, None).explain("teleport", 1)
