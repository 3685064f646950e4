"""The benchmarks run, on cases small enough for a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.comm.kv_transfer.benchmarks import (
    _plain,
    bench_codecs,
    bench_cpu,
    bench_latency,
    bench_transfer,
)
from sagellm.comm.kv_transfer.benchmarks._pair import Pair, regions
from sagellm.comm.kv_transfer.benchmarks._turns import Turn
from sagellm.comm.kv_transfer.benchmarks._worker import Spec
from sagellm.core.protocols import DistributedRuntimeError
from sagellm.core.protocols.bench import Missing, Row

ALWAYS_HERE = {
    "memcpy, one thread", "one plain socket", "gloo, gathered", "tcp, checks off", "tcp, checks on",
}  # fmt: skip


def test_codecs_are_measured():
    rows = []
    for work in ("encode", "decode"):
        case = {"dtype": "bfloat16", "work": work, "blocks": 2}
        for name, run in bench_codecs.contenders(case).items():
            run()
            rows.append(Row(case, name, (1.0,)))

    found = {(r.name, r.case["work"]): r.value for r in bench_codecs.ratios(rows)}

    assert found["compression by zstd", "encode"] > 1
    assert found["speed of lz4 / memcpy", "decode"] == 1
    assert len(bench_codecs.cases(True)) == 4


def measured(bench, case):
    rows = []
    with bench.contenders(case) as named:
        for name, run in named.items():
            if isinstance(run, Missing):
                rows.append(Row(case, name, missing=run.reason))
            else:
                rows.append(Row(case, name, (run(),)))
    return rows


def judged(bench, rows):
    return {
        (r.case["path"], r.case["against"], r.case["over"]): r
        for r in bench.ratios(rows)
        if "at_least" in r.case
    }


@pytest.mark.timeout(120)
def test_every_contender_moves_the_blocks_and_leaves_nothing_behind():
    case = {"work": "blocks", "nbytes": 1 << 20, "block_bytes": 1 << 16}
    before = len(os.listdir("/proc/self/fd"))
    rows = measured(bench_transfer, case)

    for row in rows:
        if row.contender in ALWAYS_HERE:
            assert row.median is not None, f"{row.contender}: {row.missing}"
        if row.missing:
            assert "Error: " in row.missing, "a contender that cannot run says why"
    found = judged(bench_transfer, rows)
    assert found["tcp, checks off", "gloo, best", "median"].value > 0
    assert all(r.case["where"] == "CPU host, loopback" for r in found.values())
    assert len(os.listdir("/proc/self/fd")) - before <= 3  # the fork server's own


def test_every_figure_of_a_transfer_has_a_goal_and_stands_where_nothing_ran():
    case = {"work": "blocks", "nbytes": 1 << 20, "block_bytes": 1 << 16}
    found = judged(bench_transfer, [Row(case, "ZeroMQ", missing="not installed")])

    goals = {key: ratio.goal for key, ratio in found.items()}
    assert goals["shm, checks off", "memcpy, one thread", "median"] == 0.9
    assert goals["shm, checks off", "memcpy, one thread", "worst"] == 0.7
    assert goals["tcp, checks on", "Mooncake, tcp", "median"] == 3.0
    assert goals["tcp", "one plain socket, link of 1 Gbit/s", "median"] == 0.95
    assert len(found) == 20
    assert all(r.value is None for r in found.values())


def test_the_worst_case_and_the_median_are_told_apart():
    rows = []
    for i, speed in enumerate((1.0, 0.5, 2.0)):
        case = {"work": "blocks", "nbytes": 1 << 20, "block_bytes": 1 << (16 + i)}
        rows.append(Row(case, "memcpy, one thread", (10.0,)))
        rows.append(Row(case, "shm, checks off", (10.0 * speed,)))

    found = judged(bench_transfer, rows)

    assert found["shm, checks off", "memcpy, one thread", "worst"].value == 0.5
    assert found["shm, checks off", "memcpy, one thread", "median"].value == 1.0


def test_a_turn_whose_bytes_differ_is_no_sample():
    case = {"nbytes": 1 << 20, "block_bytes": 1 << 16}
    idle = Spec("sagellm.comm.kv_transfer.benchmarks._worker:End")
    with (
        regions(case) as shared,
        Pair(idle, shared) as pair,
        pytest.raises(DistributedRuntimeError, match="other bytes"),
    ):
        pair.run()


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def test_pairs_end_with_the_process_that_measures_even_while_they_are_stopped(tmp_path, eventually):
    program = tmp_path / "measure.py"
    program.write_text(
        """
import sys
from sagellm.comm.kv_transfer.benchmarks._pair import Pair, regions
from sagellm.comm.kv_transfer.benchmarks._turns import Turn
from sagellm.comm.kv_transfer.benchmarks._worker import Spec

if __name__ == "__main__":
    idle = Spec("sagellm.comm.kv_transfer.benchmarks._worker:End", spins=True)
    with regions({"nbytes": 1 << 20, "block_bytes": 1 << 16}) as case, Pair(idle, case) as pair:
        print(*pair.pids, flush=True)
        sys.stdin.read()
"""
    )
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as measuring:
        pids = [int(pid) for pid in measuring.stdout.readline().split()]
        eventually(lambda: [state_of(p) for p in pids] == ["T", "T"])
        measuring.kill()

    eventually(lambda: all(state_of(p) in ("gone", "Z") for p in pids), 10.0)


@pytest.mark.timeout(120)
def test_latency_counts_from_the_sender_on():
    case = {"nbytes": 1 << 16, "block_bytes": 1 << 16, "turns": 3, "percentile": 50}
    rows = measured(bench_latency, case)

    assert all(row.median > 0 for row in rows if not row.missing)
    found = judged(bench_latency, rows)
    name = "p50 of one 64 KiB block, tcp, checks on"
    assert found["time of Mooncake, tcp", name, "median"].goal == 1.429
    assert bench_latency.cases(True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "case",
    [
        {"per": "GB", "nbytes": 1 << 20, "block_bytes": 1 << 16},
        {"per": "second", "nbytes": 1 << 20, "block_bytes": 1 << 16, "seconds": 0.2},
        {"per": "byte", "nbytes": 8 << 20, "block_bytes": 1 << 16, "transfers": 8},
    ],
    ids=lambda case: case["per"],
)
def test_costs_are_measured(case):
    rows = measured(bench_cpu, case)

    assert all(0 <= row.median < 1000 for row in rows if not row.missing)
    assert {r.case["per"] for r in rows} == {case["per"]}
    assert len(judged(bench_cpu, rows)) == 6


def test_a_block_that_arrives_changed_in_a_later_turn_is_found(tmp_path, monkeypatch):
    (tmp_path / "damaging.py").write_text(
        """
from sagellm.comm.kv_transfer.benchmarks._plain import Memcpy


class Damaging(Memcpy):
    turns = 0

    def finish(self, turn):
        super().finish(turn)
        self.turns += 1
        if not self.sends and self.turns > 1:
            self.blocks[turn.target[37], 5] ^= 1
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with regions({"nbytes": 4 << 20, "block_bytes": 1 << 16}) as case:
        with Pair(Spec("sagellm.comm.kv_transfer.benchmarks._plain:Memcpy"), case) as sound:
            for _ in range(2):
                sound.run()
        with Pair(Spec("damaging:Damaging"), case) as pair:
            pair.run()
            with pytest.raises(DistributedRuntimeError, match="other bytes"):
                pair.run()


def test_nixl_is_judged_by_its_better_way():
    case = {"nbytes": 1 << 16, "block_bytes": 1 << 16, "turns": 3, "percentile": 50}
    times = {"NIXL, write": 3.0, "NIXL, read": 8.0, "shm, checks on": 2.0}

    found = judged(bench_latency, [Row(case, n, (t,)) for n, t in times.items()])

    name = "p50 of one 64 KiB block, shm, checks on"
    assert found["time of NIXL", name, "median"].value == 1.5


def test_zeromq_receives_into_the_blocks():
    pytest.importorskip("zmq")
    case = {"nbytes": 1 << 18, "block_bytes": 1 << 16}

    class OnlyInto:
        def __init__(self, real):
            self.recv_into, self.close = real.recv_into, real.close

    with regions(case) as shared:
        ends = [_plain.ZeroMQ(role, shared, "127.0.0.1") for role in "PD"]
        ends[0].meet(ends[1].hello())
        turn = Turn.make(case, 1, random=True)
        ends[0].finish(turn)
        ends[1]._socket = OnlyInto(ends[1]._socket)
        ends[1].finish(turn)

        assert (ends[1].blocks[turn.target] == ends[0].blocks[turn.source]).all()
        for end in ends:
            end.close()
