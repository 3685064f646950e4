"""The Python engine on a bare segment: mismatches, deadlines, lost peers, poison, closing."""

import select
import threading
import time
from functools import partial

import pytest
import torch
from shm_harness import LONG_S, engine_of

from sagellm.comm.collective_ops._shm.engine import EngineFailure
from sagellm.comm.collective_ops._shm.layout import CAUSES, H_POISON, REASON
from sagellm.core.protocols.process_group import RawCall


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


def make_different_calls(backend, folder, kind, prepared):
    with engine_of(backend, folder) as engine:
        engine.run(RawCall("barrier"))
        x = torch.zeros(8)
        run = partial(engine.run, differing(kind, backend.rank))
        if prepared and backend.rank != 1:
            run = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        with pytest.raises(EngineFailure) as failed:
            run()
        assert failed.value.cause == "mismatch"
        assert failed.value.rank != backend.rank
        with pytest.raises(EngineFailure, match="mismatch"):
            engine.run(RawCall("barrier"))
        with pytest.raises(EngineFailure, match="mismatch"):
            engine.prepare("all_reduce", x, x, "sum", LONG_S)()


@pytest.mark.parametrize("kind", ["op", "dtype", "size", "reduction", "root", "splits"])
def test_every_rank_learns_of_a_mismatch(gloo_pools, folder, kind):
    gloo_pools(3).run(make_different_calls, folder(), kind, False)


@pytest.mark.parametrize("kind", ["op", "size", "reduction"])
def test_a_prepared_call_learns_of_a_mismatch(gloo_pools, folder, kind):
    gloo_pools(3).run(make_different_calls, folder(), kind, True)


def poison_word(engine):
    return int.from_bytes(engine.meeting.memory[H_POISON : H_POISON + 8], "little")


def until_poisoned(engine):
    end = time.monotonic() + LONG_S
    while not poison_word(engine):
        assert time.monotonic() < end
        time.sleep(0.001)


def be_late(backend, folder, prepared):
    x = torch.zeros(4)
    with engine_of(backend, folder) as engine:
        engine.run(RawCall("barrier"))
        if backend.rank == 2:
            until_poisoned(engine)
        run = partial(engine.run, RawCall("all_reduce", [], [x], reduce_op="sum", timeout_s=0.2))
        if prepared:
            run = engine.prepare("all_reduce", x, x, "sum", 0.2)
        started = time.monotonic()
        with pytest.raises(EngineFailure) as failed:
            run()
        assert failed.value.cause == "timeout"
        return failed.value.rank, failed.value.step, time.monotonic() - started


@pytest.mark.parametrize("prepared", [False, True])
def test_a_deadline_names_the_late_rank_to_all(gloo_pools, folder, prepared):
    first, second, late = gloo_pools(3).run(be_late, folder(), prepared)

    assert 2 in (first[0], second[0])
    assert (first[1], second[1]) == (2, 2)
    assert late[0] in (0, 1)  # who gave up
    assert max(first[2], second[2]) < 5


def abort_from_a_thread(backend, folder):
    with engine_of(backend, folder) as engine:
        if backend.rank == 0:
            reason = "no more of this: \N{SNOWMAN}" + 200 * "x"
            thread = threading.Thread(target=engine.poison, args=("aborted", reason))
            thread.start()
            thread.join()
            engine.poison("error", "too late to count")
        with pytest.raises(EngineFailure) as failed:
            engine.run(RawCall("barrier", timeout_s=LONG_S))
        told = engine.meeting.memory[engine.meeting.layout.control(0) + REASON :][:128]
        assert told.split(b"\0")[0].decode().startswith("no more of this: \N{SNOWMAN}xx")
        assert poison_word(engine) == CAUSES.index("aborted") << 32 | 1
        return failed.value.cause, failed.value.rank


def test_poison_fails_running_and_later_calls_of_every_rank(gloo_pools, folder):
    assert gloo_pools(2).run(abort_from_a_thread, folder()) == [("aborted", 0)] * 2


def leave(backend, folder, after_its_part):
    with engine_of(backend, folder) as engine:
        sockets = engine.meeting.sockets
        if backend.rank == 1:
            if after_its_part:
                x = torch.ones(3)
                # its part of a broadcast is done once all have entered
                engine.run(RawCall("broadcast", [], [x], peer=0, timeout_s=LONG_S))
            for peer in sockets.values():
                peer.shutdown(2)
            return None
        if after_its_part:
            engine.run(RawCall("broadcast", [], [torch.ones(3)], peer=0, timeout_s=LONG_S))
        poller = select.poll()
        poller.register(sockets[1].fileno(), select.POLLRDHUP)
        assert poller.poll(LONG_S * 1000)
        started = time.monotonic()
        with pytest.raises(EngineFailure) as failed:
            engine.run(RawCall("barrier", timeout_s=LONG_S))
        assert time.monotonic() - started < 2
        return failed.value.cause, failed.value.rank


@pytest.mark.parametrize("after_its_part", [False, True])
def test_a_lost_peer_is_named_long_before_the_deadline(gloo_pools, folder, after_its_part):
    found = gloo_pools(3).run(leave, folder(), after_its_part)

    assert {found[0][0], found[2][0]} == {"lost"}
    assert 1 in (found[0][1], found[2][1])


def come_last(backend, folder):
    """Every rank but 0 takes its last step and leaves; rank 0 comes when they have left."""
    with engine_of(backend, folder) as engine:
        flags = engine._flags
        if backend.rank:
            flags.open(0, 0, LONG_S)
            flags.begin()
            flags.publish()
            for peer in engine.meeting.sockets.values():
                peer.shutdown(2)
            return
        for peer in engine.meeting.sockets.values():
            poller = select.poll()
            poller.register(peer.fileno(), select.POLLRDHUP)
            assert poller.poll(LONG_S * 1000)
        engine.run(RawCall("barrier", timeout_s=LONG_S))


def test_a_peer_that_left_after_its_last_step_is_not_lost(gloo_pools, folder):
    gloo_pools(3).run(come_last, folder())


def fail_inside(backend, folder):
    with engine_of(backend, folder) as engine:
        x = torch.zeros(4)
        if backend.rank == 0:
            with pytest.raises(KeyError):
                engine.run(RawCall("all_reduce", [], [x], reduce_op="no such"))
        with pytest.raises(EngineFailure) as failed:
            engine.run(RawCall("all_reduce", [], [x], reduce_op="sum", timeout_s=LONG_S))
        return failed.value.cause, failed.value.rank


def test_an_error_in_a_call_reaches_the_peers(gloo_pools, folder):
    assert gloo_pools(2).run(fail_inside, folder()) == [("error", 0)] * 2


def use_closed(backend, folder):
    with engine_of(backend, folder) as engine:
        x = torch.zeros(4)
        prepared = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        prepared()
        backend.barrier()
        engine.close()
        engine.poison("aborted", "nobody hears it")
        for call in (prepared, lambda: engine.run(RawCall("barrier"))):
            with pytest.raises(EngineFailure, match="closed"):
                call()


def test_a_closed_engine_says_so(gloo_pools, folder):
    gloo_pools(2).run(use_closed, folder())
