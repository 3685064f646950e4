"""What survivors learn when a rank is late, leaves, dies, or calls something else."""

import os
import signal
import time

import pytest
import torch
from shm_ranks import SLACK_S

from sagellm.comm.collective_ops import GlooBackend, MockWorld
from sagellm.core.protocols import (
    CollectiveMismatchError,
    CommError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    PeerLostError,
)


def outcome(call):
    """Seconds, error class and text of a call that should fail."""
    start = time.monotonic()
    try:
        call()
    except CommError as e:
        return time.monotonic() - start, type(e).__name__, str(e), getattr(e, "rank", None)
    return time.monotonic() - start, None, "", None


def shares(b, timeout_s):
    """A group over all ranks that a test may break."""
    group = b.split(range(b.size))
    group.timeout_s = timeout_s
    b.barrier()  # a rank that breaks it at once would leave the others still connecting
    return group


# -- gloo: functions run in the pool ------------------------------------------------------


def last_rank_never_comes(b):
    group = shares(b, 0.5)
    if b.rank == b.size - 1:
        seen = None
    else:
        seen = outcome(lambda: group.all_reduce(torch.ones(4)))
        assert outcome(lambda: group.barrier())[1] == seen[1]
    b.barrier()
    late = outcome(lambda: group.all_reduce(torch.ones(4))) if seen is None else None
    group.close()
    return seen or late


def second_rank_is_killed(b):
    if b.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    seen = outcome(lambda: b.all_reduce(torch.ones(1 << 16)))
    again = outcome(lambda: b.barrier())
    survivors = b.split([r for r in range(b.size) if r != 1])
    total = survivors.all_reduce(torch.ones(1)).item()
    return (*seen, again[1], total)


def second_rank_is_killed_while_receiving(b):
    if b.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if b.rank == 0:
        return outcome(lambda: b.recv_kv_blocks(1))
    return outcome(lambda: b.recv(torch.ones(1), 0))


def first_rank_calls_another(b):
    group = GlooBackend(
        process_group=b.split(range(b.size)).process_group,
        timeout_s=5,
        options={"check_calls": True},
    )
    assert group.all_reduce(torch.ones(1)).item() == b.size
    try:
        if b.rank == 0:
            group.broadcast(torch.ones(2), 0)
        else:
            group.all_reduce(torch.ones(4), "max")
    except CollectiveMismatchError as e:
        return str(e), e.calls
    raise AssertionError("nobody noticed")


def first_rank_aborts(b):
    group = shares(b, 10)
    if b.rank == 0:
        group.abort("out of memory")
        seen = outcome(lambda: group.barrier())
    else:
        seen = outcome(lambda: group.all_reduce(torch.ones(4)))
    b.barrier()
    group.close()
    return seen


def a_hook_raises_on_the_first_rank(b):
    group = shares(b, 10)

    def refuse(call):
        raise ZeroDivisionError("a bug in a hook")

    if b.rank == 0:
        group.add_hook(before=refuse)
        with pytest.raises(ZeroDivisionError):
            group.all_reduce(torch.ones(4))
        seen = outcome(lambda: group.all_reduce(torch.ones(4)))
    else:
        seen = outcome(lambda: group.all_reduce(torch.ones(4)))
    b.barrier()
    return seen


def a_short_wait_leaves_the_work_going(b):
    if b.rank == 0:
        works = [
            b.recv(torch.empty(4), 1, async_op=True),
            b.all_reduce(torch.ones(2), async_op=True),
        ]
        seen = []
        for work in works:
            assert not work.done()
            assert work.exception() is None
            seen.append(outcome(lambda work=work: work.wait(0.02))[1])
        b.split([0])
    b_started = b.split(range(b.size))
    if b.rank == 0:
        b_started.barrier()
        return seen, [w.wait().sum().item() for w in works]
    b_started.barrier()
    if b.rank == 1:
        b.send(torch.ones(4), 0)
    b.all_reduce(torch.ones(2))
    return None


def closed_group_is_refused(b):
    group = b.split(range(b.size))
    group.close()
    group.close()
    with pytest.raises(ConfigError, match="which is closed"):
        group.barrier()
    with pytest.raises(ConfigError, match="which is closed"):
        group.split([0])


def test_deadline_names_the_rank_that_never_came(gloo_pools):
    first, second, late = gloo_pools(3).run(last_rank_never_comes)
    for seconds, kind, text, _ in (first, second):
        assert (kind, seconds < 0.5 + SLACK_S) == ("CommTimeoutError", True), text
        assert "rank 2 (global 2)" in text
        assert "all_reduce sum" in text
        assert "16 bytes float32" in text
    assert late[1] == "PeerLostError"
    assert "left the group: comm_timeout" in late[2]


def test_killed_rank_is_named_to_every_survivor_within_two_seconds(fresh_pool):
    first, dead, last = fresh_pool(3).outcomes(second_rank_is_killed)
    assert "SIGKILL" in dead.error
    assert not first.error + last.error
    for seconds, kind, text, rank, again, total in (first.result, last.result):
        assert (kind, rank, seconds < SLACK_S) == ("PeerLostError", 1, True), text
        assert "lost rank 1" in text
        assert again == "PeerLostError"
        assert total == 2


def test_killed_sender_fails_receivers_of_blocks_and_those_behind_them(fresh_pool):
    first, dead, last = fresh_pool(3).outcomes(second_rank_is_killed_while_receiving)
    assert "SIGKILL" in dead.error
    assert not first.error + last.error
    for seconds, kind, text, _ in (first.result, last.result):
        assert (kind, seconds < SLACK_S) == ("PeerLostError", True), text


def test_checked_calls_name_both_sides_of_a_mismatch_on_every_rank(gloo_pools):
    for text, calls in gloo_pools(3).run(first_rank_calls_another):
        assert calls[0] == "#1 broadcast float32 8 bytes root 0"
        assert calls[1] == calls[2] == "#1 all_reduce float32 16 bytes max"
        assert "rank 0: #1 broadcast" in text
        assert "rank 2: #1 all_reduce" in text


def test_abort_reaches_the_peers_with_its_reason(gloo_pools):
    first, second = gloo_pools(2).run(first_rank_aborts)
    assert first[1] == "DistributedRuntimeError"
    assert "out of memory" in first[2]
    assert second[1] == "PeerLostError"
    assert second[3] == 0
    assert "aborted: out of memory" in second[2]
    assert second[0] < SLACK_S


def test_error_in_a_hook_does_not_leave_the_peer_hanging(gloo_pools):
    first, second = gloo_pools(2).run(a_hook_raises_on_the_first_rank)
    assert "ZeroDivisionError" in first[2] or "bug in a hook" in first[2]
    assert second[1] == "PeerLostError"
    assert "a bug in a hook" in second[2]
    assert second[0] < SLACK_S


def test_short_wait_raises_and_the_work_goes_on(gloo_pools):
    (seen, sums), _ = gloo_pools(2).run(a_short_wait_leaves_the_work_going)
    assert seen == ["CommTimeoutError"] * 2
    assert sums == [4.0, 4.0]


def test_closed_group_is_refused(gloo_pools):
    gloo_pools(2).run(closed_group_is_refused)


# -- mock ---------------------------------------------------------------------------------


def test_mock_deadline_names_the_missing_rank():
    world = MockWorld(3, timeout_s=0.3)

    def late(b):
        return None if b.rank == 2 else outcome(lambda: b.all_reduce(torch.ones(4)))

    seen = world.run(late)[:2]
    assert {kind for _, kind, _, _ in seen} <= {"CommTimeoutError", "PeerLostError"}
    timed_out = [text for _, kind, text, _ in seen if kind == "CommTimeoutError"]
    assert timed_out
    assert "no sign of rank 2 (global 2)" in timed_out[0]


def test_mock_mismatch_names_both_calls_on_every_rank():
    world = MockWorld(3)

    def body(b):
        try:
            b.barrier() if b.rank == 1 else b.all_reduce(torch.ones(2))
        except CollectiveMismatchError as e:
            return set(e.calls.values())
        return None

    wanted = {"#0 barrier", "#0 all_reduce float32 8 bytes sum"}
    assert world.run(body) == [wanted] * 3


def test_mock_mismatch_of_a_message():
    world = MockWorld(2)

    def body(b):
        if b.rank == 0:
            return b.send(torch.ones(2), 1)
        with pytest.raises(CollectiveMismatchError, match="send 8 bytes"):
            b.recv(torch.ones(3), 0)
        return None

    world.run(body)


def test_mock_dropped_rank_is_lost_to_peers_in_flight_and_later():
    world = MockWorld(3)
    works = [world.backend(r).all_reduce(torch.ones(2), async_op=True) for r in (0, 2)]
    message = world.backend(2).recv(torch.ones(2), 1, async_op=True)

    world.drop(1)

    for work in (*works, message):
        with pytest.raises(PeerLostError) as caught:
            work.wait()
        assert caught.value.rank == 1
    with pytest.raises(PeerLostError):
        world.backend(0).barrier()


def test_mock_survivors_split_and_go_on():
    world = MockWorld(3)
    world.drop(2)

    def body(b):
        if b.rank == 2:
            return None
        with pytest.raises(PeerLostError):
            b.barrier()
        return b.split([0, 1]).all_reduce(torch.ones(1)).item()

    assert world.run(body)[:2] == [2.0, 2.0]


def test_mock_delay_holds_the_others_back():
    world = MockWorld(2)
    world.delay(1, 0.05)
    work = world.backend(0).all_reduce(torch.ones(1), async_op=True)
    world.backend(1).all_reduce(torch.ones(1), async_op=True)
    with pytest.raises(CommTimeoutError, match="still in flight"):
        work.wait(0)
    assert work.wait().item() == 2


def test_mock_corruption_reaches_the_result_until_healed():
    world = MockWorld(2)
    world.corrupt(1, "all_reduce")
    spoiled = world.run(lambda b: b.all_reduce(torch.ones(2)).tolist())
    assert spoiled[0] == spoiled[1] != [2.0, 2.0]
    assert world.run(lambda b: b.all_gather(torch.ones(1))[1].item()) == [1.0, 1.0]
    world.heal(1)
    assert world.run(lambda b: b.all_reduce(torch.ones(2)).tolist()) == [[2.0, 2.0]] * 2


def test_mock_counts_what_a_ring_would_send():
    world = MockWorld(4)
    world.run(lambda b: b.all_reduce(torch.ones(256)))
    assert [world.sent_bytes(r) for r in range(4)] == [1536] * 4
    assert world.ledger[0].steps == 6


def test_mock_error_in_one_rank_frees_the_others():
    world = MockWorld(2)

    def body(b):
        if b.rank == 0:
            raise ZeroDivisionError("mine")
        return b.barrier()

    with pytest.raises(ZeroDivisionError, match="mine"):
        world.run(body, timeout_s=5)


def test_mock_run_names_ranks_that_do_not_return():
    world = MockWorld(2, timeout_s=5)
    with pytest.raises(CommTimeoutError, match=r"ranks \[1\] of 2"):
        world.run(lambda b: b.recv(torch.ones(1), 0) if b.rank else None, timeout_s=0.2)
    world.backend(1).abort("the test is over")


def test_mock_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="at least one rank"):
        MockWorld(0)
    with pytest.raises(ConfigError, match="rank 2 is not in"):
        MockWorld(2).backend(2)


def test_second_abort_keeps_the_first_reason():
    backend = MockWorld(1).backend(0)
    backend.abort("first")
    backend.abort("second")
    with pytest.raises(DistributedRuntimeError, match="first"):
        backend.barrier()
