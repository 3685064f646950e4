"""What the Python engine keeps: views, counts, the last calls; and which algorithm it chooses."""

import itertools
import threading
import time

import numpy as np
import torch
from shm_harness import LONG_S, engine_of

from sagellm.comm.collective_ops._shm.choice import ONE_SHOT_BYTES, SYMMETRIC_BYTES, choose
from sagellm.comm.collective_ops._shm.python_memory import CACHED_VIEWS
from sagellm.comm.collective_ops._shm.python_records import RING, Records, tag_of
from sagellm.core.protocols.process_group import RawCall


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


def test_records_are_whole_for_a_thread_that_reads_while_another_writes():
    records, tag = Records(), tag_of(0, "one_shot")
    calls, wrong = 20 * RING, []
    ended = threading.Event()

    def read():
        before = 0
        while not ended.is_set():
            numbers = [r.number for r in records.last()]
            counted = sum(t.calls for t in records.totals())
            if counted < before or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                wrong.append((before, counted, numbers))
            before = counted

    records.write(tag, 8, 0, 1, 0)
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(1, calls):
        records.write(tag, 8, i, i + 1, 0)
    ended.set()
    reader.join(60)

    assert not wrong
    assert [(t.calls, t.nbytes, t.total_ns) for t in records.totals()] == [
        (calls, 8 * calls, calls)
    ]


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
