"""The flight record of shm: calls of the short way are in it, and the segment says who is late."""

from types import SimpleNamespace

import pytest
import torch
from shm_ranks import await_mark, engines, join, mark

from sagellm.comm.collective_ops._shm.engine import CallRecord
from sagellm.comm.collective_ops._shm.flight import merge_records
from sagellm.comm.collective_ops._shm.layout import pack
from sagellm.core.protocols import CommTimeoutError
from sagellm.core.protocols.flight import read_dumps
from sagellm.core.protocols.process_group import COMPLETED, Position, Record


@pytest.fixture
def pool(rank_pools):
    return rank_pools(2)


@pytest.fixture(params=engines())
def meet(pool, request):
    return f"{pool.store_path()}.{request.param}"


OWNER = SimpleNamespace(rank=0, size=2, group_name="g")


def noted(op, start, end, algorithm="native"):
    record = Record(OWNER, op, 0, 0, 16, 16, torch.float32, "sum", None, algorithm)
    record.started_ns, record.ended_ns, record.state = start, end, COMPLETED
    return record


def ran(number, start, end):
    return CallRecord(number, pack(1, 7, 1, 0, -1), 16, start, end, 3, "one_shot")


def merged(calls, engine, entries=9, **more):
    found = merge_records(OWNER, calls, engine, entries, more.pop("now", None), **more)
    return [(r.op, r.collective, r.started_ns, r.algorithm) for r in found.records()], found


def test_a_call_that_both_ways_noted_is_there_once():
    calls = [noted("reduce", 10, 20), noted("send", 21, 22), noted("all_reduce", 50, 95)]
    rows, found = merged(calls, [ran(0, 1, 9), ran(1, 11, 19), ran(2, 30, 40), ran(3, 60, 70),
                                 ran(4, 80, 90)])  # fmt: skip
    assert rows == [
        ("all_reduce", 1, 1, "one_shot"),
        ("reduce", 2, 10, "one_shot"),
        ("send", 2, 21, "native"),
        ("all_reduce", 3, 30, "one_shot"),
        ("all_reduce", 4, 50, "one_shot"),
        ("all_reduce", 5, 80, "one_shot"),  # while the background call was not waited for
    ]
    assert found.position() == Position(5, "all_reduce", COMPLETED)


def test_calls_older_than_the_engine_remembers_are_left_out():
    rows, _ = merged([noted("reduce", 1, 2), noted("all_reduce", 10, 20)], [ran(700, 11, 19)])
    assert rows == [("all_reduce", 701, 10, "one_shot")]


def test_without_an_engines_memory_the_segment_tells_how_far_this_rank_is():
    now = Position(9, "all_reduce", "started")
    rows, found = merged([noted("reduce", 1, 2)], [], now=now)
    assert rows == [("reduce", 1, 1, "native")]
    assert (found.position(), found.collectives) == (now, 9)


def test_only_as_many_as_asked_for_are_kept():
    rows, _ = merged([], [ran(i, 2 * i + 1, 2 * i + 2) for i in range(20)], entries=4)
    assert [row[1] for row in rows] == [17, 18, 19, 20]
    assert merged([], [ran(0, 1, 2)], entries=0)[1].sequence == 1


# -- on ranks -------------------------------------------------------------------------------


def three_ways(rank, size, meet):
    with join(rank, size, meet) as b:
        x = torch.ones(4)
        b.all_reduce(x)
        with_hook = b.add_hook(before=lambda call: None)
        b.all_reduce(x)
        with_hook()
        b.all_reduce(x, async_op=True).wait()
        b.register(x)
        b.all_reduce(x)
        b.all_gather_into_tensor(torch.empty(8), x)
        b.barrier()
        dump = b.flight_record()
        b.reset_stats()
        told = [(e["op"], e["state"], e["nbytes"], e["input_dtypes"]) for e in dump["entries"]]
        numbers = [e["collective_seq_id"] for e in dump["entries"]]
        return told, numbers, b.calls_so_far, b.get_stats().details


def test_calls_of_every_way_are_in_the_record(pool, meet):
    for told, numbers, calls, details in pool.run(three_ways, meet):
        done = ("completed", 16, ["float32"])
        assert told[:5] == [("all_reduce", *done)] * 4 + [("all_gather_into_tensor", *done)]
        assert told[5][:3] == ("barrier", "completed", 0)
        assert (numbers, calls, details) == ([1, 2, 3, 4, 5, 6], 6, ())


def second_rank_stays_away(rank, size, meet, folder, statistics):
    options = {"flight_folder": folder, "statistics": statistics}
    with join(rank, size, meet, **options) as b:
        x = torch.ones(4)
        b.all_reduce(x)
        b.timeout_s = 0.5
        if rank == 1:
            await_mark(f"{folder}/m", "over")
            return None
        with pytest.raises(CommTimeoutError, match="no sign of rank 1"):
            b.all_reduce(x)
        mark(f"{folder}/m", "over")
        record = read_dumps(folder)[0]
        return record["sagellm"], [e["state"] for e in record["entries"]]


@pytest.mark.parametrize("statistics", [True, False])
def test_who_is_late_is_read_from_the_segment(pool, meet, tmp_path, statistics):
    about, states = pool.run(second_rank_stays_away, meet, str(tmp_path), statistics)[0]
    assert [late["rank"] for late in about["late"]] == [1]
    assert about["late"][0]["collective"] == 1
    assert "rank 1 is at collective #1 all_reduce" in about["summary"]
    assert states[-1] == "started"
