"""The comm-backend suite passes a sound backend, and catches each seeded bug."""

import threading
import time
from collections import defaultdict

import pytest
import torch

from sagellm.core.protocols import (
    BackendSpec,
    Capabilities,
    Choice,
    CommTimeoutError,
    ConfigError,
    PeerLostError,
    Probe,
    UnsupportedOperationError,
)
from sagellm.core.protocols.process_group import (
    RawWork,
    TensorBackend,
    Transport,
)
from sagellm.core.protocols.testing import ThreadRanks, check_backend
from sagellm.core.protocols.testing.comm_suite import comm_backend_checks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OPS = frozenset(
    "all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single barrier broadcast "
    "gather recv reduce reduce_scatter reduce_scatter_tensor scatter send".split()
)
DTYPES = frozenset("float32 float64 float16 bfloat16 int8 uint8 int16 int32 int64 bool".split())
SPEC = BackendSpec(
    name="threads",
    device_types=("cpu",),
    c10d_name=None,
    priority=0,
    capabilities=Capabilities(
        ops=OPS,
        reduce_ops=frozenset("sum avg min max product band bor bxor".split()),
        dtypes=DTYPES,
        uneven=True,
    ),
    probe=lambda: Probe(True, "threads"),
    load=lambda: World,
)

REDUCE = {
    "sum": lambda x: x.any(0) if x.dtype == torch.bool else x.sum(0, dtype=x.dtype),
    "avg": lambda x: x.mean(0),
    "min": lambda x: x.amin(0),
    "max": lambda x: x.amax(0),
    "product": lambda x: x.all(0) if x.dtype == torch.bool else x.prod(0, dtype=x.dtype),
    "band": lambda x: fold(torch.bitwise_and, x),
    "bor": lambda x: fold(torch.bitwise_or, x),
    "bxor": lambda x: fold(torch.bitwise_xor, x),
}


def fold(fn, rows):
    out = rows[0]
    for row in rows[1:]:
        out = fn(out, row)
    return out


class Group:
    """What the ranks of one group share: rounds of collectives, and messages."""

    def __init__(self, ranks):
        self.ranks = tuple(ranks)
        self.changed = threading.Condition()
        self.rounds = defaultdict(dict)
        self.turns = [0] * len(self.ranks)
        self.mail = defaultdict(list)
        self.groups = {}
        self.splits = [0] * len(self.ranks)
        self.left = None


class Part(RawWork):
    """One rank's call: done once `ready()` says so, and then `land()` fills its outputs."""

    def __init__(self, group, ready, land):
        self.group, self.ready, self.land, self.landed = group, ready, land, False

    def wait(self, timeout_s):
        with self.group.changed:
            self.group.changed.wait_for(lambda: self.group.left or self._over(), timeout_s)
            if not self._over() and self.group.left:
                raise PeerLostError(self.group.left)
            return self.landed

    def _over(self):
        if not self.landed and self.ready():
            self.land()
            self.landed = True
        return self.landed

    synchronize = wait

    def done(self):
        with self.group.changed:
            return bool(self._over() or self.group.left)


class Board(Transport):
    def __init__(self, group, rank):
        self.group, self._rank = group, rank

    rank = property(lambda self: self._rank)
    size = property(lambda self: len(self.group.ranks))
    global_ranks = property(lambda self: self.group.ranks)
    device = property(lambda self: torch.device("cpu"))
    group_name = property(lambda self: "board")

    def issue(self, call):
        g = self.group
        with g.changed:
            if call.op == "send":
                g.mail[self.rank, call.peer, call.tag].append(call.inputs[0].clone())
                g.changed.notify_all()
                return Part(g, lambda: True, lambda: None)
            if call.op == "recv":
                box = g.mail[call.peer, self.rank, call.tag]
                out = call.outputs[0]
                return Part(g, lambda: bool(box), lambda: out.copy_(box.pop(0).view(out.shape)))
            in_place = call.op in ("all_reduce", "reduce", "broadcast")
            turn = g.turns[self.rank]
            g.turns[self.rank] += 1
            given = call.outputs if in_place else call.inputs
            g.rounds[turn][self.rank] = ([x.clone() for x in given], call)
            g.changed.notify_all()
            everybody = g.rounds[turn]
            return Part(g, lambda: len(everybody) == self.size, lambda: self.land(call, everybody))

    def issue_batch(self, calls):
        return [self.issue(c) for c in calls]

    def land(self, call, everybody):
        inputs = [everybody[r][0] for r in range(self.size)]
        out, op = call.outputs, call.op
        if op in ("all_reduce", "reduce"):
            out[0].copy_(REDUCE[str(call.reduce_op)](torch.stack([x[0] for x in inputs])))
        elif op == "all_gather":
            out[0].copy_(torch.cat([x[0].view(-1) for x in inputs]).view(out[0].shape))
        elif op == "reduce_scatter":
            whole = REDUCE[str(call.reduce_op)](torch.stack([x[0].view(-1) for x in inputs]))
            out[0].copy_(whole.chunk(self.size)[self.rank].view(out[0].shape))
        elif op == "all_to_all":
            parts = []
            for r in range(self.size):
                x, theirs = inputs[r][0], everybody[r][1]
                splits = theirs.in_splits or [x.shape[0] // self.size] * self.size
                parts.append(torch.split(x, list(splits))[self.rank])
            out[0].copy_(torch.cat(parts).view(out[0].shape))
        elif op == "broadcast":
            out[0].copy_(inputs[call.peer][0])
        elif op == "gather":
            for target, x in zip(out, inputs, strict=False):
                target.copy_(x[0])
        elif op == "scatter":
            out[0].copy_(inputs[call.peer][self.rank])

    def explain_failure(self, describe, error):
        with self.group.changed:
            here = {r for members in self.group.rounds.values() for r in members}
            missing = [r for r in range(self.size) if r not in here]
        kind = CommTimeoutError if isinstance(error, CommTimeoutError) else PeerLostError
        self.abort(str(error))
        return kind(f"{describe}: rank {missing or '?'} is missing: {error}")

    def abort(self, reason):
        with self.group.changed:
            self.group.left = self.group.left or f"rank {self.rank} left: {reason}"
            self.group.changed.notify_all()

    def close(self):
        pass

    def split(self, ranks, name, timeout_s):
        with self.group.changed:
            key = (self.group.splits[self.rank], tuple(ranks))
            self.group.splits[self.rank] += 1
            if self.rank not in ranks:
                return None
            members = [self.group.ranks[r] for r in ranks]
            child = self.group.groups.setdefault(key, Group(members))
        return Board(child, list(ranks).index(self.rank))


class Backend(TensorBackend):
    """A sound backend over a board."""

    def _wrap(self, transport):
        return type(self)(self.spec, transport, timeout_s=self.timeout_s)


class World:
    """Ranks that are threads."""

    backend_class = Backend
    spec = SPEC

    def __init__(self, size, *, timeout_s):
        self.group, self.timeout_s = Group(range(size)), timeout_s

    def backend(self, rank):
        return self.backend_class(self.spec, Board(self.group, rank), timeout_s=self.timeout_s)


def world(bug):
    return type(f"{bug.__name__}World", (World,), {"backend_class": bug})


# -- seeded bugs --------------------------------------------------------------------------


class WrongSumOnOneRank(Backend):
    def all_reduce(self, x, op="sum", *, async_op=False):
        result = super().all_reduce(x, op, async_op=async_op)
        if self.rank == 1 and not async_op and x.numel() > 1:
            x.view(-1)[-1] += 1
        return result


class SwappedBlocks(Backend):
    def recv_kv_blocks(self, src, *, async_op=False):
        result = super().recv_kv_blocks(src, async_op=async_op)
        return result if async_op else list(result)[::-1]


class OpNotDone(Backend):
    def broadcast(self, x, src, *, async_op=False):
        return x if not async_op else super().broadcast(x, src, async_op=True)


class SwappedRanks(Backend):
    def all_gather(self, x, *, async_op=False):
        result = super().all_gather(x, async_op=async_op)
        return result if async_op else result[::-1]


class ChangesInputs(Backend):
    def all_to_all(self, xs, *, async_op=False):
        result = super().all_to_all(xs, async_op=async_op)
        xs[0].zero_()
        return result


class NotAWork(Backend):
    def reduce(self, x, dst, op="sum", *, async_op=False):
        return super().reduce(x, dst, op)


class NotTheTensor(Backend):
    def all_reduce(self, x, op="sum", *, async_op=False):
        result = super().all_reduce(x, op, async_op=async_op)
        return result if async_op else result.clone()


class BarrierThatDoesNot(Backend):
    def barrier(self, timeout_s=None, *, async_op=False):
        return super().barrier(timeout_s, async_op=True) if async_op else None


class SplitInWrongOrder(Backend):
    def split(self, ranks, name=None):
        return super().split(sorted(ranks), name)


class NoDeadline(Backend):
    def all_reduce(self, x, op="sum", *, async_op=False):
        work = super().all_reduce(x, op, async_op=True)
        return work if async_op else work.wait(3600)


class DeafToAbort(Backend):
    def abort(self, reason):
        self._closed = True


class LatePeersWait(Backend):
    def _die(self, text, error):
        self._dead = error


class Uncounted(Backend):
    def all_reduce(self, x, op="sum", *, async_op=False):
        counters, self._counters = self._counters, type(self._counters)()
        try:
            return super().all_reduce(x, op, async_op=async_op)
        finally:
            self._counters = counters


class HooksForgotten(Backend):
    def add_hook(self, **hooks):
        hooks.pop("after", None)
        hooks.pop("take_over", None)
        return super().add_hook(**hooks)


class BrokenPromise(Backend):
    def gather(self, x, dst, *, async_op=False):
        raise UnsupportedOperationError("threads has no gather")


class AnythingGoes(Backend):
    def all_reduce(self, x, op="sum", *, async_op=False):
        return super().all_reduce(x, "sum" if op == "mean" else op, async_op=async_op)


class Moody(Backend):
    def explain(self, op, nbytes):
        self.asked = getattr(self, "asked", 0) + 1
        return Choice(self.name, "ring", f"because of question {self.asked}")


class Garbled(Backend):
    def batch_p2p(self, ops):
        works = super().batch_p2p(ops)
        return works[:-1]


BUGS = {
    WrongSumOnOneRank: "all_reduce[sum-float32]",
    SwappedBlocks: "kv blocks",
    OpNotDone: "broadcast[float32]",
    SwappedRanks: "all_gather",
    ChangesInputs: "all_to_all",
    NotAWork: "reduce",
    NotTheTensor: "all_reduce[min-int32]",
    BarrierThatDoesNot: "barrier",
    SplitInWrongOrder: "sub-groups by split",
    NoDeadline: "a peer that never comes",
    DeafToAbort: "abort wakes waiters",
    LatePeersWait: "an exception in a hook",
    Uncounted: "statistics are counted",
    HooksForgotten: "hooks see every call",
    BrokenPromise: "gather",
    AnythingGoes: "bad arguments*",
    Moody: "explain",
    Garbled: "batch_p2p in*",
}


def test_a_sound_backend_passes_everything():
    report = check_backend(World, timeout_s=20)

    assert report.ok(reference=True), report.text()
    assert len(report.of("run")) == len(comm_backend_checks())
    assert report.world_size == 2


@pytest.mark.parametrize(("bug", "name"), BUGS.items(), ids=[b.__name__ for b in BUGS])
def test_a_seeded_bug_is_caught(bug, name):
    report = check_backend(world(bug), only=[name], timeout_s=3)

    assert report.of("failed"), report.text()


class LazyBoard(Board):
    lazy_op, lazy_rank = "", 0

    def land(self, call, everybody):
        if (call.op, self.rank) != (self.lazy_op, self.lazy_rank):
            super().land(call, everybody)


@pytest.mark.parametrize("lazy_rank", [0, 1])
@pytest.mark.parametrize(
    "op",
    ["all_gather", "all_reduce", "all_to_all", "broadcast", "gather", "reduce", "reduce_scatter",
     "scatter"],
)  # fmt: skip
def test_any_operation_silently_not_done_on_one_rank_is_caught(op, lazy_rank):
    board = type("Lazy", (LazyBoard,), {"lazy_op": op, "lazy_rank": lazy_rank})

    class LazyWorld(World):
        def backend(self, rank):
            return Backend(self.spec, board(self.group, rank), timeout_s=self.timeout_s)

    report = check_backend(LazyWorld, only=[f"{op}*"], timeout_s=3)

    assert report.of("failed"), report.text()


def test_a_wait_that_never_ends_is_reported_with_its_stack():
    report = check_backend(world(NoDeadline), only=["a peer that never comes"], timeout_s=3)

    (entry,) = report.of("failed")
    assert "still running" in entry.detail
    assert "all_reduce" in entry.detail


def test_what_capabilities_do_not_list_is_refused_by_name():
    poor = Capabilities(ops=OPS - {"gather"}, reduce_ops=frozenset({"sum"}), dtypes=DTYPES)
    spec = BackendSpec("poor", ("cpu",), None, 0, poor, SPEC.probe, SPEC.load)
    poor_world = type("Poor", (World,), {"spec": spec})

    report = check_backend(
        poor_world, only=["gather", "all_reduce[max-int32]", "all_to_all_single*"]
    )

    assert [e.check for e in report.of("refused")] == ["all_reduce[max-int32]", "gather"]
    assert "has no gather" in report.of("refused")[1].detail
    assert [e.check for e in report.of("skipped")] == ["all_to_all_single[uneven]"]
    assert report.ok()
    assert not report.ok(reference=True)


class VagueRefusal(Backend):
    def gather(self, x, dst, *, async_op=False):
        raise UnsupportedOperationError("no")


def test_a_refusal_that_names_nothing_fails():
    poor = Capabilities(ops=OPS - {"gather"}, reduce_ops=frozenset({"sum"}), dtypes=DTYPES)
    spec = BackendSpec("poor", ("cpu",), None, 0, poor, SPEC.probe, SPEC.load)
    vague = type("Vague", (World,), {"spec": spec, "backend_class": VagueRefusal})

    report = check_backend(vague, only=["gather"])

    assert "names none of them" in report.of("failed")[0].detail


class RefusesOnOneRank(Backend):
    def gather(self, x, dst, *, async_op=False):
        if self.rank == 0:
            raise UnsupportedOperationError("poor has no gather")
        return super().gather(x, self.rank, async_op=async_op) if self.size == 1 else None


def test_ranks_that_refuse_differently_fail():
    poor = Capabilities(ops=OPS - {"gather"}, reduce_ops=frozenset({"sum"}), dtypes=DTYPES)
    spec = BackendSpec("poor", ("cpu",), None, 0, poor, SPEC.probe, SPEC.load)
    parted = type("Parted", (World,), {"spec": spec, "backend_class": RefusesOnOneRank})

    assert not check_backend(parted, only=["gather"], timeout_s=4).ok()


def test_no_check_breaks_a_group_that_a_rank_has_not_joined_yet():
    made, seen = [], []

    class Watched(Backend):
        def abort(self, reason):
            seen.append(sorted(made))
            super().abort(reason)

    class Late(World):
        backend_class = Watched

        def backend(self, rank):
            time.sleep(0.3 * rank)
            made.append(rank)
            return super().backend(rank)

    assert check_backend(Late, only=["abort wakes waiters"]).ok()

    assert seen[0] == [0, 1]


def test_three_ranks_and_one():
    three = check_backend(World, world_size=3, only=["sub-groups*", "batch_p2p*", "explain"])
    with ThreadRanks(1) as ranks:
        one = check_backend(World, ranks=ranks, only=["all_reduce*", "kv blocks", "barrier"])

    assert three.ok(reference=True), three.text()
    assert one.ok(), one.text()
    assert [e.check for e in one.of("skipped")] == ["kv blocks"]


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="no check matches"):
        check_backend(World, only=["nothing"])
