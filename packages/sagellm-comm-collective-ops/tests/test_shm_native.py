"""The compiled engine on a bare segment: results, failures, resuming, and what it remembers."""

import contextlib
import itertools
import random
import select
import signal
import threading
import time

import numpy as np
import pytest
import torch
from shm_harness import TYPES, Meeting, in_order, reductions, values
from test_shm_python_failure import differing, poison_word

from sagellm.comm.collective_ops._shm import native_engine
from sagellm.comm.collective_ops._shm.choice import SYMMETRIC_BYTES, choose
from sagellm.comm.collective_ops._shm.engine import EngineFailure
from sagellm.comm.collective_ops._shm.engines import available_engines, engine_factory
from sagellm.comm.collective_ops._shm.layout import CAUSES, OPS, REASON, Layout
from sagellm.core.protocols.process_group import RawCall

SLOT = 4096
ARENA = 1 << 20
SIZES = (3, 1100, 5003)  # elements: within a slot, above one for most types, several
LONG_S = 20.0
RING = 512

pytestmark = pytest.mark.skipif(
    "native" not in available_engines(), reason="the compiled engine was not built"
)


@contextlib.contextmanager
def engine_of(backend, folder, name="native", hold_ns=native_engine.HOLD_NS, **options):
    """An engine on its own segment; the others' sockets stay open until all are done."""
    before, native_engine.HOLD_NS = native_engine.HOLD_NS, hold_ns
    try:
        with Meeting(f"{folder}{name}", backend.rank, Layout(backend.size, SLOT, ARENA)) as meeting:
            engine = meeting.engine(engine_factory(name), **options)
            engine.meeting = meeting
            yield engine
            backend.barrier()
            engine.close()
    finally:
        native_engine.HOLD_NS = before


@pytest.fixture
def folder(tmp_path):
    numbers = itertools.count()
    return lambda: str(tmp_path / f"m{next(numbers)}")


def fails(run):
    with pytest.raises(EngineFailure) as failed:
        run()
    return failed.value.cause, failed.value.rank


BARRIER = RawCall("barrier", timeout_s=LONG_S)


# -- results --------------------------------------------------------------------------------


def reduce_everything(backend, folder, algorithm, hold_ns):
    rank, size = backend.rank, backend.size
    overrides = algorithm and [("all_reduce", 0, 1 << 40, algorithm)]
    with engine_of(backend, folder, hold_ns=hold_ns, algorithms=overrides) as engine:
        for dtype, n in itertools.product(TYPES, SIZES):
            for op in reductions(dtype):
                xs = [values(r, n * size, dtype, n) for r in range(size)]
                want = in_order(xs, op)

                x = xs[rank].clone()
                engine.run(RawCall("all_reduce", [], [x], reduce_op=op))
                assert torch.equal(x, want), (dtype, op, n)

                x, root = xs[rank].clone(), n % size
                engine.run(RawCall("reduce", [], [x], reduce_op=op, peer=root))
                assert torch.equal(x, want if rank == root else xs[rank]), (dtype, op, n)

                out = torch.empty(n, dtype=dtype)
                engine.run(RawCall("reduce_scatter", [xs[rank]], [out], reduce_op=op))
                assert torch.equal(out, want[rank * n : rank * n + n]), (dtype, op, n)


@pytest.mark.parametrize(("algorithm", "hold_ns"), [(None, 1), ("two_shot", 200_000)])
@pytest.mark.parametrize("size", [2, 3])
def test_reductions_equal_those_in_rank_order(gloo_pools, folder, size, algorithm, hold_ns):
    gloo_pools(size).run(reduce_everything, folder(), algorithm, hold_ns)


def specials(rank, dtype):
    """All 16-bit patterns, and as many of wider types, shifted so that different ones meet."""
    bits = torch.arange(1 << 16, dtype=torch.int32).roll(1237 * rank)
    if dtype.itemsize == 2:
        return bits.to(torch.int16).view(dtype)
    wide = bits.to(torch.int64) << (8 * dtype.itemsize - 16) | rank
    return wide.to(torch.int32 if dtype.itemsize == 4 else torch.int64).view(dtype)


def same_bits(a, b):
    nan = a.isnan()
    assert torch.equal(nan, b.isnan())
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    assert torch.equal(a.view(kind)[~nan], b.view(kind)[~nan])


def reduce_specials(backend, folder):
    with (
        engine_of(backend, folder) as native,
        engine_of(backend, folder, "python") as python,
    ):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for op in reductions(dtype):
                one = specials(backend.rank, dtype)
                other = one.clone()
                native.run(RawCall("all_reduce", [], [one], reduce_op=op))
                python.run(RawCall("all_reduce", [], [other], reduce_op=op))
                if op not in ("min", "max"):  # of 0 and -0 either is the smaller
                    same_bits(one, other)
                assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), (dtype, op)


@pytest.mark.parametrize("size", [2, 3])
def test_both_engines_give_the_same_bits(gloo_pools, folder, size):
    if "python" not in available_engines():
        pytest.skip("no Python engine on this machine")
    gloo_pools(size).run(reduce_specials, folder())


def move_everything(backend, folder, hold_ns):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, hold_ns=hold_ns) as engine:
        for dtype, n in itertools.product((torch.uint8, torch.int64, torch.complex128), SIZES):
            kind = torch.float64 if dtype.is_complex else dtype
            xs = [values(r, n, kind, n).to(dtype) for r in range(size)]
            wide = [values(r, n * size, kind, n).to(dtype) for r in range(size)]
            root = n % size

            out = torch.empty(n * size, dtype=dtype)
            engine.run(RawCall("all_gather", [xs[rank]], [out]))
            assert torch.equal(out, torch.cat(xs))

            x = xs[rank].clone()
            engine.run(RawCall("broadcast", [], [x], peer=root))
            assert torch.equal(x, xs[root])

            outs = [torch.empty(n, dtype=dtype) for _ in xs] if rank == root else []
            engine.run(RawCall("gather", [xs[rank]], outs, peer=root))
            assert all(map(torch.equal, outs, xs if rank == root else []))

            out = torch.empty(n, dtype=dtype)
            engine.run(RawCall("scatter", xs if rank == root else [], [out], peer=root))
            assert torch.equal(out, xs[rank])

            out = torch.empty(n * size, dtype=dtype)
            engine.run(RawCall("all_to_all", [wide[rank]], [out]))
            assert torch.equal(out, torch.cat([w.chunk(size)[rank] for w in wide]))

            gives = [[(n + a + 2 * b) % (n + 2) for b in range(size)] for a in range(size)]
            sent = [values(r, sum(gives[r]), kind, n).to(dtype) for r in range(size)]
            takes = [gives[r][rank] for r in range(size)]
            out = torch.empty(sum(takes), dtype=dtype)
            call = RawCall(
                "all_to_all", [sent[rank]], [out], in_splits=gives[rank], out_splits=takes
            )
            engine.run(call)
            split = [s.split(g)[rank] for s, g in zip(sent, gives, strict=True)]
            assert torch.equal(out, torch.cat(split))

            engine.run(BARRIER)


@pytest.mark.parametrize("hold_ns", [1, native_engine.HOLD_NS])
@pytest.mark.parametrize("size", [2, 3])
def test_moves_carry_any_type_of_any_length(gloo_pools, folder, size, hold_ns):
    gloo_pools(size).run(move_everything, folder(), hold_ns)


def reduce_in_arenas(backend, folder):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder) as engine:
        for n, dtype in itertools.product((20000, 70001), (torch.float32, torch.bfloat16)):
            xs = [values(r, n, dtype, n) for r in range(size)]
            at = engine.meeting.layout.arena(rank) + 64 * rank
            arena = torch.frombuffer(engine.meeting.memory, dtype=dtype, count=n, offset=at)
            for elsewhere in (None, 0, size - 1):
                x = torch.empty(n, dtype=dtype) if rank == elsewhere else arena
                x.copy_(xs[rank])
                engine.run(RawCall("all_reduce", [], [x], reduce_op="sum"))
                assert torch.equal(x, in_order(xs, "sum")), (n, dtype, elsewhere)
                used = engine.records()[-1].algorithm
                assert (used == "symmetric") == (elsewhere is None and x.nbytes > SYMMETRIC_BYTES)


@pytest.mark.parametrize("size", [2, 3])
def test_symmetric_tensors_are_reduced_in_place_if_all_ranks_have_one(gloo_pools, folder, size):
    gloo_pools(size).run(reduce_in_arenas, folder())


def prepared_again_and_again(backend, folder, hold_ns):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, hold_ns=hold_ns) as engine:
        for n, dtype in itertools.product((5, 5003), (torch.float32, torch.bfloat16)):
            xs = [values(r, n * size, dtype, n) for r in range(size)]
            want = in_order(xs, "sum")
            x, out, whole = xs[rank].clone(), torch.empty(n, dtype=dtype), torch.empty_like(xs[0])
            part = torch.empty(n, dtype=dtype)
            reduce = engine.prepare("all_reduce", x, x, "sum", LONG_S)
            scatter = engine.prepare("reduce_scatter", xs[rank], out, "sum", LONG_S)
            gather = engine.prepare("all_gather", part, whole, "none", LONG_S)
            for turn in range(3):
                x.copy_(xs[rank])
                reduce()
                assert torch.equal(x, want)
                scatter()
                assert torch.equal(out, want[rank * n : rank * n + n])
                part.copy_(xs[rank][turn : turn + n])
                gather()
                assert torch.equal(whole, torch.cat([y[turn : turn + n] for y in xs]))
                engine.run(RawCall("broadcast", [], [part], peer=turn % size))


@pytest.mark.parametrize("hold_ns", [1, native_engine.HOLD_NS])
def test_prepared_calls_see_the_contents_of_the_moment(gloo_pools, folder, hold_ns):
    gloo_pools(3).run(prepared_again_and_again, folder(), hold_ns)


# -- waiting --------------------------------------------------------------------------------


def look_while_it_runs(backend, folder, prepared):
    """Python of this process runs while a call waits: it was given up to be resumed."""
    with engine_of(backend, folder) as engine:
        x = torch.full((3,), float(backend.rank + 1))
        run = lambda: engine.run(RawCall("all_reduce", [], [x], reduce_op="sum"))  # noqa: E731
        if prepared:
            run = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        if backend.rank == 1:
            backend.barrier()  # until rank 0 has seen its own call run
            run()
        else:
            thread = threading.Thread(target=run)
            thread.start()
            end = time.monotonic() + LONG_S
            while not engine.records():
                assert time.monotonic() < end
            (running,) = engine.records()
            assert (running.number, running.ended_ns) == (0, 0)
            assert running.started_ns > 0
            backend.barrier()
            thread.join(LONG_S)
        assert x.tolist() == [3.0] * 3
        assert engine.records()[0].ended_ns > 0


@pytest.mark.parametrize("prepared", [False, True])
def test_other_threads_run_while_a_call_waits(gloo_pools, folder, prepared):
    gloo_pools(2).run(look_while_it_runs, folder(), prepared)


class _RangError(Exception):
    pass


def be_interrupted(backend, folder):
    def ring(*_):
        raise _RangError

    with engine_of(backend, folder) as engine:
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


# -- failures -------------------------------------------------------------------------------


def make_different_calls(backend, folder):
    for kind in ("op", "dtype", "size", "reduction", "root", "splits"):
        with engine_of(backend, f"{folder}{kind}") as engine:
            engine.run(BARRIER)
            x = torch.zeros(8)
            prepared = engine.prepare("all_reduce", x, x, "sum", LONG_S)
            call = differing(kind, backend.rank)
            cause, rank = fails(lambda engine=engine, call=call: engine.run(call))
            assert cause == "mismatch"
            assert rank != backend.rank
            assert fails(lambda engine=engine: engine.run(BARRIER))[0] == "mismatch"
            assert fails(prepared)[0] == "mismatch"


def test_every_rank_learns_of_a_mismatch(gloo_pools, folder):
    gloo_pools(3).run(make_different_calls, folder())


def be_late(backend, folder, prepared):
    x = torch.zeros(4)
    with engine_of(backend, folder) as engine:
        engine.run(BARRIER)
        end = time.monotonic() + LONG_S
        while backend.rank == 2 and not poison_word(engine):
            assert time.monotonic() < end
            time.sleep(0.001)
        started = time.monotonic()
        if prepared:
            found = fails(engine.prepare("all_reduce", x, x, "sum", 0.2))
        else:
            call = RawCall("all_reduce", [], [x], reduce_op="sum", timeout_s=0.2)
            found = fails(lambda: engine.run(call))
        return *found, time.monotonic() - started


@pytest.mark.parametrize("prepared", [False, True])
def test_a_deadline_names_the_late_rank_to_all(gloo_pools, folder, prepared):
    first, second, late = gloo_pools(3).run(be_late, folder(), prepared)

    assert {first[0], second[0], late[0]} == {"timeout"}
    assert 2 in (first[1], second[1])
    assert late[1] in (0, 1)  # who gave up
    assert max(first[2], second[2]) < 5


def abort_from_a_thread(backend, folder):
    with engine_of(backend, folder) as engine:
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


def test_poison_fails_running_and_later_calls_of_every_rank(gloo_pools, folder):
    assert gloo_pools(2).run(abort_from_a_thread, folder()) == [("aborted", 0)] * 2


def leave(backend, folder, after_its_part):
    with engine_of(backend, folder) as engine:
        sockets = engine.meeting.sockets
        if after_its_part:
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
        assert time.monotonic() - started < 2
        return found


@pytest.mark.parametrize("after_its_part", [False, True])
def test_a_lost_peer_is_named_long_before_the_deadline(gloo_pools, folder, after_its_part):
    found = gloo_pools(3).run(leave, folder(), after_its_part)

    assert {found[0][0], found[2][0]} == {"lost"}
    assert 1 in (found[0][1], found[2][1])


def use_closed(backend, folder):
    with engine_of(backend, folder) as engine:
        x = torch.zeros(4)
        prepared = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        prepared()
        backend.barrier()
        engine.close()
        engine.close()
        engine.meeting.memory.close()  # no view of it is left: the pages are gone
        engine.poison("aborted", "nobody hears it")
        engine.reset_totals()
        assert not engine.totals()
        assert not engine.records()
        closed = ("closed", backend.rank)
        later = engine.prepare("all_reduce", x, x, "sum", LONG_S)
        for call in (prepared, later, lambda: engine.run(BARRIER)):
            assert fails(call) == closed


def test_a_closed_engine_says_so(gloo_pools, folder):
    gloo_pools(2).run(use_closed, folder())


def close_while_it_waits(backend, folder):
    with engine_of(backend, folder) as engine:
        if backend.rank == 1:
            return
        found = []
        thread = threading.Thread(
            target=lambda: found.append(fails(lambda: engine.run(BARRIER))), daemon=True
        )
        thread.start()
        end = time.monotonic() + LONG_S
        while not engine.records():
            assert time.monotonic() < end
        engine.close()
        engine.meeting.memory.close()
        thread.join(LONG_S)
        assert found == [("closed", 0)]


def test_a_call_that_waits_ends_before_the_memory_goes(gloo_pools, folder):
    gloo_pools(2).run(close_while_it_waits, folder())


def close_own_sockets(backend, folder):
    with engine_of(backend, folder) as engine:
        if backend.rank == 1:
            return
        for peer in engine.meeting.sockets.values():
            peer.close()
        assert fails(lambda: engine.run(BARRIER)) == ("closed", 0)


def test_a_rank_without_its_sockets_is_closed_itself(gloo_pools, folder):
    gloo_pools(2).run(close_own_sockets, folder())


# -- what it keeps --------------------------------------------------------------------------


def count_calls(backend, folder):
    with engine_of(backend, folder) as engine:
        x = torch.ones(100)
        prepared = engine.prepare("all_reduce", x, x, "max", LONG_S)
        for _ in range(RING):
            prepared()
        for _ in range(10):
            engine.run(RawCall("all_reduce", [], [x], reduce_op="max"))
        engine.run(BARRIER)

        reduced, waited = sorted(engine.totals(), key=lambda t: t.bucket, reverse=True)
        assert (reduced.op, reduced.algorithm, reduced.bucket) == ("all_reduce", "one_shot", 8)
        assert (reduced.calls, reduced.nbytes) == (RING + 10, 400 * (RING + 10))
        assert sum(reduced.histogram) == reduced.calls
        assert 0 <= reduced.wait_ns <= reduced.total_ns
        middle = np.repeat(np.arange(len(reduced.histogram)), reduced.histogram)
        assert 0.5 < (2 ** (middle / 8) * 10).sum() / reduced.total_ns < 1.05
        assert (waited.op, waited.bucket, waited.calls) == ("barrier", -1, 1)

        records = engine.records()
        assert [r.number for r in records] == list(range(11, RING + 11))
        assert (records[-1].packed, records[-2].nbytes) == (0, 400)
        assert all(r.started_ns <= r.ended_ns for r in records)
        assert all(a.ended_ns <= b.started_ns for a, b in itertools.pairwise(records))

        engine.reset_totals()
        assert not engine.totals()
        engine.run(BARRIER)
        assert [t.calls for t in engine.totals()] == [1]


def test_calls_are_counted_and_the_last_ones_remembered(gloo_pools, folder):
    gloo_pools(2).run(count_calls, folder())


def without_statistics(backend, folder):
    with engine_of(backend, folder, statistics=False) as engine:
        engine.run(BARRIER)
        return len(engine.totals()) + len(engine.records())


def test_statistics_can_be_left_out(gloo_pools, folder):
    assert gloo_pools(2).run(without_statistics, folder()) == [0, 0]


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
