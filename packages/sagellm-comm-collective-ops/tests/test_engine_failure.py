"""Every engine on a bare segment: mismatches, deadlines, lost peers, poison, closing."""

import select
import threading
import time

import pytest
import torch
from shm_harness import BARRIER, ENGINES, LONG_S, engine_of, fails, poison_word, until
from shm_ranks import SLACK_S

from sagellm.comm.collective_ops._shm.layout import CAUSES, REASON, SEQUENCE
from sagellm.core.protocols.process_group import RawCall

engines = pytest.mark.parametrize("name", ENGINES)
KINDS = ("op", "dtype", "size", "reduction", "root", "splits")


def differing(kind, rank):
    x = torch.zeros(8)
    odd = rank == 1
    if kind == "op":
        return RawCall("barrier") if odd else RawCall("all_reduce", [], [x], reduce_op="sum")
    if kind == "dtype":
        return RawCall("broadcast", [], [x.to(torch.int32) if odd else x], peer=0)
    if kind == "size":
        return RawCall("all_reduce", [], [x[: 8 - odd]], reduce_op="sum")
    if kind == "reduction":
        return RawCall("all_reduce", [], [x], reduce_op="max" if odd else "sum")
    if kind == "root":
        return RawCall("broadcast", [], [x], peer=int(odd))
    gives = [2 if r == rank else 3 for r in range(3)]
    takes = [2, 2, 4] if odd else gives
    return RawCall("all_to_all", [x], [torch.zeros(8)], in_splits=gives, out_splits=takes)


def make_different_calls(backend, folder, name):
    for kind in KINDS:
        for prepared in (False, True) if kind in ("op", "size", "reduction") else (False,):
            with engine_of(backend, f"{folder}{kind}{prepared}", name) as engine:
                engine.run(BARRIER)
                x = torch.zeros(8)
                later = engine.prepare("all_reduce", x, x, "sum", LONG_S)
                call = differing(kind, backend.rank)
                run = later if prepared and backend.rank != 1 else lambda: engine.run(call)  # noqa: B023
                cause, rank = fails(run)
                assert cause == "mismatch"
                assert rank != backend.rank
                assert fails(lambda: engine.run(BARRIER))[0] == "mismatch"
                assert fails(later)[0] == "mismatch"


@engines
def test_every_rank_learns_of_a_mismatch(gloo_pools, folder, name):
    gloo_pools(3).run(make_different_calls, folder(), name)


def be_late(backend, folder, name, prepared):
    x = torch.zeros(4)
    with engine_of(backend, folder, name) as engine:
        engine.run(BARRIER)
        if backend.rank == 2:
            until(lambda: poison_word(engine))
        started = time.monotonic()
        if prepared:
            found = fails(engine.prepare("all_reduce", x, x, "sum", 0.5))
        else:
            call = RawCall("all_reduce", [], [x], reduce_op="sum", timeout_s=0.5)
            found = fails(lambda: engine.run(call))
        return *found, time.monotonic() - started


@pytest.mark.parametrize("prepared", [False, True])
@engines
def test_a_deadline_names_the_late_rank_to_all(gloo_pools, folder, name, prepared):
    first, second, late = gloo_pools(3).run(be_late, folder(), name, prepared)

    assert {first[0], second[0], late[0]} == {"timeout"}
    assert 2 in (first[1], second[1])
    assert late[1] in (0, 1)  # who gave up
    assert max(first[2], second[2]) < LONG_S


def abort_from_a_thread(backend, folder, name):
    with engine_of(backend, folder, name) as engine:
        if backend.rank == 0:
            reason = "no more of this: " + 90 * "\N{SNOWMAN}"
            thread = threading.Thread(target=engine.poison, args=("aborted", reason))
            thread.start()
            thread.join()
            engine.poison("error", "too late to count")
        found = fails(lambda: engine.run(BARRIER))
        told = engine.meeting.memory[engine.meeting.layout.control(0) + REASON :][:128]
        assert told.split(b"\0")[0].decode().startswith("no more of this: \N{SNOWMAN}")
        assert poison_word(engine) == CAUSES.index("aborted") << 32 | 1
        return found


@engines
def test_poison_fails_running_and_later_calls_of_every_rank(gloo_pools, folder, name):
    assert gloo_pools(2).run(abort_from_a_thread, folder(), name) == [("aborted", 0)] * 2


def leave(backend, folder, name, after_its_part):
    with engine_of(backend, folder, name) as engine:
        sockets = engine.meeting.sockets
        if after_its_part:  # its part of a broadcast is done once all have entered
            engine.run(RawCall("broadcast", [], [torch.ones(3)], peer=0, timeout_s=LONG_S))
        if backend.rank == 1:
            for peer in sockets.values():
                peer.shutdown(2)
            return None
        poller = select.poll()
        poller.register(sockets[1].fileno(), select.POLLRDHUP)
        assert poller.poll(LONG_S * 1000)
        started = time.monotonic()
        found = fails(lambda: engine.run(BARRIER))
        assert time.monotonic() - started < SLACK_S
        return found


@pytest.mark.parametrize("after_its_part", [False, True])
@engines
def test_a_lost_peer_is_named_long_before_the_deadline(gloo_pools, folder, name, after_its_part):
    found = gloo_pools(3).run(leave, folder(), name, after_its_part)

    assert {found[0][0], found[2][0]} == {"lost"}
    assert 1 in (found[0][1], found[2][1])


def come_late(backend, folder, name):
    """Rank 1 takes its step of a barrier and leaves; rank 0 waits on for rank 2."""
    with engine_of(backend, folder, name) as engine:
        if backend.rank == 1:
            at = engine.meeting.layout.control(1) + 8 * SEQUENCE  # the signature is all zeros
            engine.meeting.memory[at : at + 8] = (1).to_bytes(8, "little")
            for peer in engine.meeting.sockets.values():
                peer.shutdown(2)
        backend.barrier()
        ends = []
        thread = threading.Thread(target=lambda: ends.append(engine.run(BARRIER)), daemon=True)
        if backend.rank == 0:
            thread.start()
            until(engine.records)
            since = time.monotonic()
            until(lambda: time.monotonic() - since > 0.2)  # it looks at sockets by now
        backend.barrier()
        if backend.rank == 2:
            engine.run(BARRIER)
        if backend.rank == 0:
            thread.join(LONG_S)
            assert ends == [None]


@engines
def test_a_peer_that_left_after_its_last_step_is_not_lost(gloo_pools, folder, name):
    gloo_pools(3).run(come_late, folder(), name)


def use_closed(backend, folder, name):
    with engine_of(backend, folder, name) as engine:
        x = torch.zeros(4)
        prepared = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        prepared()
        backend.barrier()
        engine.close()
        engine.close()
        engine.poison("aborted", "nobody hears it")
        engine.reset_totals()
        for call in (prepared, lambda: engine.run(BARRIER)):
            assert fails(call) == ("closed", backend.rank)


@engines
def test_a_closed_engine_says_so(gloo_pools, folder, name):
    gloo_pools(2).run(use_closed, folder(), name)
