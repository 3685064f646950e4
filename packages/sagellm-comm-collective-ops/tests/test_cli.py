"""The command line: what it prints, what it measures, and its exit codes."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from sagellm.comm.collective_ops import MockWorld
from sagellm.comm.collective_ops._cli import bench, checkup
from sagellm.comm.collective_ops._cli.launch import Meeting
from sagellm.comm.collective_ops._cli.main import main
from sagellm.core.protocols import CommTimeoutError
from sagellm.core.protocols.show import bytes_text, parse_bytes


def run_json(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_info_lists_every_backend_with_its_table(capsys):
    code, info = run_json(capsys, "info")
    found = {b["name"]: b for b in info["backends"]}
    assert code == 0
    assert found["gloo"]["available"]
    assert found["nccl"]["reason"]
    assert "all_reduce" in found["gloo"]["capabilities"]["ops"]
    assert info["host"]["usable_cpus"] > 0
    assert found["shm"]["engines"].keys() == {"native", "python"}
    assert main(["info", "--backend", "gloo"]) == 0
    text = capsys.readouterr().out
    assert "What gloo can do" in text
    assert "avg_as_sum_div" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["info", "--backend", "glo"], "no backend 'glo'; installed:"),
        (["bench", "teleport", "--backends", "gloo"], "no operation 'teleport'"),
        (["bench", "--sizes", "3 apples"], "is no size"),
        (["bench", "--backends", "glo"], "did you mean 'gloo'"),
        (["bench", "--dtype", "float33", "--backends", "gloo"], "no element type"),
        (["bench", "--ranks", "0", "--backends", "gloo"], "at least 1"),
        (["explain", "all_reduce", "-"], "is no size"),
    ],
)
def test_bad_arguments_are_named_and_exit_with_2(capsys, arguments, text):
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_sizes_are_read_and_written():
    assert [parse_bytes(t) for t in ("12", "4k", "1M", "2GiB", "8 KiB")] == [
        12, 4096, 1 << 20, 2 << 30, 8192,
    ]  # fmt: skip
    assert [bytes_text(n) for n in (12, 1500, 4096, 3 << 20)] == [
        "12 B",
        "1500 B",
        "4 KiB",
        "3 MiB",
    ]


def test_doctor_finds_what_is_wrong_and_says_the_next_step(capsys, monkeypatch):
    code, findings = run_json(capsys, "doctor", "--ranks", "1")
    assert code == 0, findings
    found = {f["name"]: f for f in findings}
    assert found["backend gloo"]["detail"].endswith("a group of one was made")
    assert found["cpus"]["status"] == "ok"

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setattr(checkup, "_backends", list)
    assert main(["doctor", "--ranks", "4096"]) == 1
    text = capsys.readouterr().out
    assert "names nosuch0, which is not there" in text
    assert "set GLOO_SOCKET_IFNAME to one of" in text
    assert "for 4096 ranks: ranks will take turns" in text
    assert "1 errors, " in text


def test_doctor_sees_half_a_rendezvous():
    (finding,) = checkup._rendezvous({"RANK": "0", "WORLD_SIZE": "2"})
    assert finding.status == "error"
    assert finding.detail == "RANK, WORLD_SIZE set but MASTER_ADDR, MASTER_PORT missing"


@pytest.mark.parametrize("op", bench.OPS)
def test_bench_counts_wrong_elements(op, monkeypatch):
    import torch

    monkeypatch.setattr(bench, "_BUDGET_S", 0.001)
    store = dist.HashStore()

    def rows(world, label):
        def one(b):
            meeting = Meeting(dist.PrefixStore(label, store), b.rank, 2, 10.0)
            return bench._measure(meeting, b, "mock", op, 256, torch.float32, "cpu")

        return world.run(one)

    row = rows(MockWorld(2), "good")[0]
    assert (row.nbytes, row.wrong, row.error) == (256, 0, "")
    assert row.algbw_bytes_per_s == pytest.approx(256 / (row.time_us * 1e-6))
    bad = MockWorld(2)
    bad.corrupt(1)
    assert rows(bad, "bad")[0].wrong > 0


def test_bench_measures_over_processes_and_tells_who_could_not_start(capsys, loopback):
    code, found = run_json(
        capsys, "bench", "all_reduce", "--sizes", "1k", "--backends", "gloo,mock"
    )
    assert code == 1
    (row,) = found["rows"]
    assert (row["backend"], row["nbytes"], row["wrong"]) == ("gloo", 1024, 0)
    assert row["time_us"] > 0
    assert row["busbw_bytes_per_s"] == row["algbw_bytes_per_s"]
    assert "does not span processes" in found["failed"]["mock"]


def test_explain_under_torchrun_is_answered_once(loopback):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "sagellm.comm.collective_ops", "explain", "all_reduce", "64k", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["ranks"], answer["agree"]) == (2, True)
    assert answer["choice"]["backend"] in answer["selection"].splitlines()[0]


def test_a_rank_that_says_nothing_is_named():
    meeting = Meeting(dist.HashStore(), 0, 2, 0.05)
    with pytest.raises(CommTimeoutError, match=r"no word of ranks \[1\]"):
        meeting.gather(1)
