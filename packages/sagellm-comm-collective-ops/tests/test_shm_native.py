"""What only the compiled engine has: waits that are resumed, memory that must not go early."""

import itertools
import random
import signal
import threading

import pytest
import torch
from shm_harness import ARENA, BARRIER, ENGINES, LONG_S, engine_of, fails, until

from sagellm.comm.collective_ops._shm import native_engine
from sagellm.comm.collective_ops._shm.choice import SYMMETRIC_BYTES, choose
from sagellm.comm.collective_ops._shm.layout import OPS, Layout

pytestmark = pytest.mark.skipif("native" not in ENGINES, reason="the compiled engine was not built")


class _RangError(Exception):
    pass


def be_interrupted(backend, folder):
    def ring(*_):
        raise _RangError

    with engine_of(backend, folder, "native") as engine:
        if backend.rank == 1 or threading.current_thread() is not threading.main_thread():
            return
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(_RangError):
                engine.run(BARRIER)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_signal_handlers_run_while_a_call_waits(gloo_pools, folder):
    gloo_pools(2).run(be_interrupted, folder())


def let_go_of_the_memory(backend, folder):
    with engine_of(backend, folder, "native") as engine:
        x = torch.zeros(4)
        prepared = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        prepared()
        backend.barrier()
        engine.close()
        engine.meeting.memory.close()  # no view of it is left: the pages are gone
        engine.poison("aborted", "nobody hears it")
        engine.reset_totals()
        assert not engine.totals()
        assert not engine.records()
        later = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        for call in (prepared, later, lambda: engine.run(BARRIER)):
            assert fails(call) == ("closed", backend.rank)


def test_a_closed_engine_never_touches_its_memory_again(gloo_pools, folder):
    gloo_pools(2).run(let_go_of_the_memory, folder())


def close_while_it_waits(backend, folder):
    with engine_of(backend, folder, "native") as engine:
        if backend.rank == 1:
            return
        found = []
        thread = threading.Thread(
            target=lambda: found.append(fails(lambda: engine.run(BARRIER))), daemon=True
        )
        thread.start()
        until(engine.records)
        engine.close()
        engine.meeting.memory.close()
        thread.join(LONG_S)
        assert found == [("closed", 0)]


def test_a_call_that_waits_ends_before_the_memory_goes(gloo_pools, folder):
    gloo_pools(2).run(close_while_it_waits, folder())


def close_own_sockets(backend, folder):
    with engine_of(backend, folder, "native") as engine:
        if backend.rank == 1:
            return
        for peer in engine.meeting.sockets.values():
            peer.close()
        assert fails(lambda: engine.run(BARRIER)) == ("closed", 0)


def test_a_rank_without_its_sockets_is_closed_itself(gloo_pools, folder):
    gloo_pools(2).run(close_own_sockets, folder())


def test_the_choice_is_that_of_the_python_engine():
    random.seed(5)
    names = ["direct", "one_shot", "two_shot", "symmetric"]
    for _ in range(60):
        world, slot = random.randint(2, 9), 4096 * random.choice([1, 8, 64])
        edges = [0, 1, 4096, 32 << 10, SYMMETRIC_BYTES, slot, 1 << 30, random.randint(0, 1 << 20)]
        overrides = [
            ("all_reduce", *sorted(random.sample(edges, 2)), random.choice(names[1:]))
            for _ in range(random.randint(0, 4))
        ]
        layout = Layout(world, slot, ARENA)
        memory = bytearray(layout.total_bytes)
        engine = native_engine.NativeEngine(memory, layout, 0, {}, polls=1, algorithms=overrides)
        for op, symmetric in itertools.product(OPS, (False, True)):
            for nbytes in {max(0, edge + random.randint(-1, 1)) for edge in edges}:
                want = choose(op, nbytes, world, slot, symmetric=symmetric, overrides=overrides)
                assert engine.algorithm(op, nbytes, symmetric=symmetric) == want
        engine.close()
