"""The Python engine on a bare segment: results, failures, waiting, and what it remembers."""

import contextlib
import itertools
import select
import threading
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from shm_harness import TYPES, Meeting, in_order, reductions, values

from sagellm.comm.collective_ops._shm.choice import ONE_SHOT_BYTES, SYMMETRIC_BYTES, choose
from sagellm.comm.collective_ops._shm.engine import EngineFailure
from sagellm.comm.collective_ops._shm.layout import CAUSES, H_POISON, REASON, Layout
from sagellm.comm.collective_ops._shm.python_engine import PythonEngine
from sagellm.comm.collective_ops._shm.python_memory import CACHED_VIEWS
from sagellm.comm.collective_ops._shm.python_records import RING
from sagellm.core.protocols.process_group import RawCall

SLOT = 4096
ARENA = 1 << 20
SIZES = (3, 1100, 5003)  # elements: within a slot, above one for most types, several
LONG_S = 20.0


@contextlib.contextmanager
def engine_of(backend, folder, slot=SLOT, **options):
    """An engine on its own segment; the others' sockets stay open until all are done."""
    rank = backend.rank
    with Meeting(folder, rank, Layout(backend.size, slot, ARENA)) as meeting:
        engine = meeting.engine(PythonEngine, **options)
        engine.meeting = meeting
        yield engine
        backend.barrier()
        engine.close()


@pytest.fixture
def folder(tmp_path):
    numbers = itertools.count()
    return lambda: str(tmp_path / f"m{next(numbers)}")


# -- results --------------------------------------------------------------------------------


def reduce_everything(backend, folder, algorithm):
    rank, size = backend.rank, backend.size
    overrides = algorithm and [("all_reduce", 0, 1 << 40, algorithm)]
    with engine_of(backend, folder, algorithms=overrides) as engine:
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


@pytest.mark.parametrize("algorithm", [None, "two_shot"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_reductions_equal_those_in_rank_order_bit_for_bit(gloo_pools, folder, size, algorithm):
    gloo_pools(size).run(reduce_everything, folder(), algorithm)


def move_everything(backend, folder):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder) as engine:
        for dtype, n in itertools.product([*TYPES, torch.complex128], (1, 1100)):
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
            assert torch.equal(
                out, torch.cat([s.split(g)[rank] for s, g in zip(sent, gives, strict=True)])
            )

            engine.run(RawCall("barrier"))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_moves_carry_any_type_of_any_length(gloo_pools, folder, size):
    gloo_pools(size).run(move_everything, folder())


def reduce_in_arenas(backend, folder):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder) as engine:
        for n, dtype in itertools.product((20000, 70001), (torch.float32, torch.bfloat16)):
            xs = [values(r, n, dtype, n) for r in range(size)]
            arena = torch.frombuffer(
                engine.meeting.memory,
                dtype=dtype,
                count=n,
                offset=engine.meeting.layout.arena(rank) + 64 * rank,
            )
            for elsewhere in (None, 0, size - 1):
                x = torch.empty(n, dtype=dtype) if rank == elsewhere else arena
                x.copy_(xs[rank])
                engine.run(RawCall("all_reduce", [], [x], reduce_op="sum"))
                assert torch.equal(x, in_order(xs, "sum")), (n, dtype, elsewhere)
                used = engine.records()[-1].algorithm
                assert (used == "symmetric") == (elsewhere is None and x.nbytes > SYMMETRIC_BYTES)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_symmetric_tensors_are_reduced_in_place_if_all_ranks_have_one(gloo_pools, folder, size):
    gloo_pools(size).run(reduce_in_arenas, folder())


def prepared_again_and_again(backend, folder, statistics):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, statistics=statistics) as engine:
        for n, dtype in itertools.product((5, 300, 5003), (torch.float32, torch.bfloat16)):
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


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("statistics", [True, False])
def test_prepared_calls_see_the_contents_of_the_moment(gloo_pools, folder, size, statistics):
    gloo_pools(size).run(prepared_again_and_again, folder(), statistics)


def overflow_quietly(backend, folder):
    with engine_of(backend, folder) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        with np.errstate(all="raise"):
            x = torch.full((8,), 3e38)
            engine.run(RawCall("all_reduce", [], [x], reduce_op="sum"))
            prepared = engine.prepare("all_reduce", x, x, "max", LONG_S)
            prepared()
        assert x.isinf().all()


def test_overflow_is_infinity_whatever_numpy_is_told_to_do_of_it(gloo_pools, folder):
    gloo_pools(2).run(overflow_quietly, folder())


# -- failures -------------------------------------------------------------------------------


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


# -- what it keeps --------------------------------------------------------------------------


def use_many_sizes(backend, folder):
    with engine_of(backend, folder) as engine:
        for n in range(1, 2 * CACHED_VIEWS + 2):
            engine.run(RawCall("all_reduce", [], [torch.ones(n)], reduce_op="sum"))
        return engine._memory.views.cache_info().currsize


def test_views_of_many_sizes_are_not_all_kept(gloo_pools, folder):
    assert gloo_pools(2).run(use_many_sizes, folder()) == [CACHED_VIEWS] * 2


def count_calls(backend, folder):
    with engine_of(backend, folder) as engine:
        x = torch.ones(100)
        prepared = engine.prepare("all_reduce", x, x, "max", LONG_S)
        for _ in range(RING):
            prepared()
        for _ in range(10):
            engine.run(RawCall("all_reduce", [], [x], reduce_op="max"))
        engine.run(RawCall("barrier"))

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
        assert records[-1].packed == 0
        assert all(r.started_ns <= r.ended_ns for r in records)
        assert all(a.ended_ns <= b.started_ns for a, b in itertools.pairwise(records))

        engine.reset_totals()
        assert not engine.totals()
        engine.run(RawCall("barrier"))
        assert [t.calls for t in engine.totals()] == [1]


def test_calls_are_counted_and_the_last_ones_remembered(gloo_pools, folder):
    gloo_pools(2).run(count_calls, folder())


def look_while_it_runs(backend, folder):
    with engine_of(backend, folder) as engine:
        if backend.rank == 1:
            backend.barrier()  # until rank 0 has seen its own call run
            engine.run(RawCall("barrier"))
            return
        thread = threading.Thread(target=engine.run, args=(RawCall("barrier", timeout_s=LONG_S),))
        thread.start()
        end = time.monotonic() + LONG_S
        while not engine.records():
            assert time.monotonic() < end
        (running,) = engine.records()
        assert (running.number, running.ended_ns) == (0, 0)
        assert running.started_ns > 0
        backend.barrier()
        thread.join(LONG_S)
        assert engine.records()[0].ended_ns > 0


def test_the_running_call_is_in_the_records_and_others_threads_run(gloo_pools, folder):
    gloo_pools(2).run(look_while_it_runs, folder())


def without_statistics(backend, folder):
    with engine_of(backend, folder, statistics=False) as engine:
        engine.run(RawCall("barrier"))
        return len(engine.totals()) + len(engine.records())


def test_statistics_can_be_left_out(gloo_pools, folder):
    assert gloo_pools(2).run(without_statistics, folder()) == [0, 0]


def test_the_choice_follows_size_world_and_overrides():
    slot = 1 << 18
    assert choose("all_reduce", slot, 2, slot) == "one_shot"
    assert choose("all_reduce", slot + 1, 2, slot) == "two_shot"
    assert choose("all_reduce", ONE_SHOT_BYTES, 4, slot) == "one_shot"
    assert choose("all_reduce", ONE_SHOT_BYTES + 1, 4, slot) == "two_shot"
    assert choose("all_reduce", SYMMETRIC_BYTES + 1, 2, slot, symmetric=True) == "symmetric"
    assert choose("broadcast", 1 << 30, 4, slot, symmetric=True) == "direct"
    overrides = [("all_reduce", 100, 200, "two_shot"), ("all_reduce", 0, 1000, "symmetric")]
    assert choose("all_reduce", 150, 2, slot, overrides=overrides) == "two_shot"
    assert choose("all_reduce", 200, 2, slot, overrides=overrides) == "one_shot"
    assert choose("all_reduce", 200, 2, slot, overrides=overrides, symmetric=True) == "symmetric"
