"""What every engine keeps of its calls, and which algorithm it chooses."""

import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from shm_harness import BARRIER, ENGINES, LONG_S, engine_of, until

from sagellm.comm.collective_ops._shm import python_records
from sagellm.comm.collective_ops._shm.choice import ONE_SHOT_BYTES, SYMMETRIC_BYTES, choose
from sagellm.comm.collective_ops._shm.python_records import RING as PYTHON_RING, Records, tag_of
from sagellm.core.protocols.process_group import RawCall

RING = {"native": 512, "python": PYTHON_RING}
engines = pytest.mark.parametrize("name", ENGINES)


def count_calls(backend, folder, name):
    with engine_of(backend, folder, name) as engine:
        x = torch.ones(100)
        prepared = engine.prepare("all_reduce", x, x, "max", LONG_S)
        ring = RING[name]
        for _ in range(ring):
            prepared()
        for _ in range(10):
            engine.run(RawCall("all_reduce", [], [x], reduce_op="max"))
        engine.run(BARRIER)

        reduced, waited = sorted(engine.totals(), key=lambda t: t.bucket, reverse=True)
        assert (reduced.op, reduced.algorithm, reduced.bucket) == ("all_reduce", "one_shot", 8)
        assert (reduced.calls, reduced.nbytes) == (ring + 10, 400 * (ring + 10))
        assert sum(reduced.histogram) == reduced.calls
        assert 0 <= reduced.wait_ns <= reduced.total_ns
        buckets = np.repeat(np.arange(len(reduced.histogram)), reduced.histogram)
        shortest, longest = (10 * 2 ** ((buckets + i) / 8) for i in (0, 1))
        assert shortest.sum() <= 1.001 * reduced.total_ns
        assert reduced.total_ns <= 1.001 * longest.sum() + 10 * reduced.calls
        assert (waited.op, waited.bucket, waited.calls) == ("barrier", -1, 1)

        records = engine.records()
        assert [r.number for r in records] == list(range(11, ring + 11))
        assert (records[-1].packed, records[-2].nbytes) == (0, 400)
        assert all(r.started_ns <= r.ended_ns for r in records)
        assert all(a.ended_ns <= b.started_ns for a, b in itertools.pairwise(records))

        engine.reset_totals()
        assert not engine.totals()
        engine.run(BARRIER)
        assert [t.calls for t in engine.totals()] == [1]


@engines
def test_calls_are_counted_and_the_last_ones_remembered(gloo_pools, folder, name):
    gloo_pools(2).run(count_calls, folder(), name)


def look_while_it_runs(backend, folder, name, prepared):
    with engine_of(backend, folder, name) as engine:
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
            until(engine.records)
            (running,) = engine.records()
            assert (running.number, running.ended_ns) == (0, 0)
            assert running.started_ns > 0
            backend.barrier()
            thread.join(LONG_S)
        assert x.tolist() == [3.0] * 3
        assert engine.records()[0].ended_ns > 0


@pytest.mark.parametrize("prepared", [False, True])
@engines
def test_other_threads_run_and_see_it_while_a_call_waits(gloo_pools, folder, name, prepared):
    gloo_pools(2).run(look_while_it_runs, folder(), name, prepared)


def without_statistics(backend, folder, name):
    with engine_of(backend, folder, name, statistics=False) as engine:
        engine.run(BARRIER)
        return len(engine.totals()) + len(engine.records())


def test_records_are_whole_for_a_thread_that_reads_while_another_writes():
    records, tag = Records(), tag_of(0, "one_shot")
    calls, wrong = 20 * PYTHON_RING, []
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


def interrupted(look, step, handler):
    """Run `look`, with `handler` before its instruction number `step`; whether it has so many."""
    steps, before = itertools.count(), sys.gettrace()

    def trace(frame, event, arg):
        if frame.f_code.co_filename != python_records.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(steps) == step:
            handler()
        return trace

    sys.settrace(trace)
    try:
        look()
    finally:
        sys.settrace(before)
    return next(steps) > step


@pytest.mark.parametrize("look", [Records.count, Records.last])
def test_records_are_whole_for_a_signal_at_any_step_of_looking_at_them(look):
    for step in itertools.count():
        records, seen = Records(), []

        def write(number, records=records):
            records.write(tag_of(number % 2, "one_shot"), 8, number, number + 1, 0)

        def numbers(records=records):
            return [(r.number, r.started_ns) for r in records.last()]

        def handler(records=records, seen=seen, numbers=numbers):
            seen.append((numbers(), sum(t.calls for t in records.totals()), numbers()))

        write(0)
        records.count()
        write(1)
        write(2)
        if not interrupted(lambda records=records: look(records), step, handler):
            break
        whole = [(i, i) for i in range(3)]
        assert [(before, after) for before, _, after in seen] == [(whole, whole)], step
        assert seen[0][1] <= 3, step
        assert (numbers(), [t.calls for t in records.totals()]) == (whole, [2, 1]), step
    assert step > 50


@engines
def test_statistics_can_be_left_out(gloo_pools, folder, name):
    assert gloo_pools(2).run(without_statistics, folder(), name) == [0, 0]


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
