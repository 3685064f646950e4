"""Deadlines, aborts and hooks of groups; what survivors learn; clocks for devices."""

import threading

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sagellm.core.protocols import (  # noqa: E402
    CollectiveMismatchError,
    CommTimeoutError,
    CompletedWork,
    ConfigError,
    DistributedRuntimeError,
    PeerLostError,
)
from sagellm.core.protocols._process_group.failure import FailureBoard, classify  # noqa: E402
from sagellm.core.protocols._process_group.torch_work import DeviceWork  # noqa: E402
from sagellm.core.protocols._process_group.transport import Position  # noqa: E402
from sagellm.core.protocols._process_group.watchdog import Watchdog  # noqa: E402
from sagellm.core.protocols.process_group import (  # noqa: E402
    ProcessGroupBackend,
    RawCall,
    fingerprint,
)


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


def test_take_over_stands_for_the_call(ranks, spec):
    (backend,) = [ProcessGroupBackend(spec, None)]
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


def test_survivors_say_who_is_at_which_call():
    store = dist.HashStore()
    boards = [FailureBoard(store, rank, (4, 5, 6)) for rank in range(3)]
    for board, at in zip(boards, (42, 42, 41), strict=True):
        op = "all_reduce" if at == 41 else "barrier"
        board.position = lambda at=at, op=op: Position(at, op, "started")
    boards[1].post("comm_timeout", "late")
    boards[2].post("peer_lost", "closed")
    error = boards[0].verdict("barrier #41", "comm_timeout", TimeoutError("timed out"))
    assert isinstance(error, CommTimeoutError)
    assert str(error).endswith("rank 2 is at collective #41 all_reduce, ranks 0, 1 at #42 barrier")
    assert boards[0].positions == {
        1: Position(42, "barrier", "started"),
        2: Position(41, "all_reduce", "started"),
    }


def test_posts_that_are_not_positions_are_ignored():
    store = dist.HashStore()
    store.set("sagellm/failed/1", '{"code": "peer_lost", "text": "x", "collective": "y", "op": 3}')
    board = FailureBoard(store, 0, (0, 1))
    error = board.verdict("barrier", "comm_timeout", TimeoutError("timed out"))
    assert board.positions == {1: None}
    assert "collective" not in str(error)
