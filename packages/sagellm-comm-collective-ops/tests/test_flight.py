"""The flight recorder: what it keeps, who it says is late, and that torch's analyzer reads it."""

import gc
import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from sagellm.comm.collective_ops import GlooBackend, MockWorld
from sagellm.comm.collective_ops.mock_backend import MockBackend
from sagellm.core.protocols import CommTimeoutError, ConfigError, IntegrityError
from sagellm.core.protocols.flight import (
    dump_on_signal,
    main,
    read_dumps,
    summarize,
    write_torch_traces,
)


def until(condition, timeout_s=20.0):
    """Poll `condition`, which another process brings about."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# -- functions run in the pool ------------------------------------------------------------


def third_rank_hangs(b, folder):
    """Ranks 0 and 1 time out in their third call; rank 2 blocks in another group's call."""
    inner = b.split(range(b.size))
    group = GlooBackend(
        process_group=inner.process_group, timeout_s=20, options={"flight_folder": folder}
    )
    pids = b.all_gather(torch.tensor(os.getpid()))
    for _ in range(2):
        group.all_reduce(torch.ones(4))
    group.timeout_s = 1.0
    if b.rank == 2:
        undo = dump_on_signal(signal.SIGUSR2, folder)
        b.barrier()  # until the others have their dumps, and this rank's
        undo()
        group.close()
        inner.close()
        return signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    with pytest.raises(CommTimeoutError, match=r"all_reduce sum #2 .* no sign of rank 2") as caught:
        group.all_reduce(torch.ones(4))
    if b.rank == 0:
        os.kill(int(pids[2]), signal.SIGUSR2)
        until(lambda: any(Path(folder).glob("flight-*_*-rank2.json")))
    b.barrier()
    group.close()
    inner.close()
    return str(caught.value)


def test_a_hanging_rank_is_named_and_torchs_analyzer_agrees(gloo_pools, tmp_path, caplog):
    folder = tmp_path / "dumps"
    *_, undone = gloo_pools(3).run(third_rank_hangs, str(folder))

    assert undone
    found = read_dumps(folder)  # of rank 2 there is one for each group of its process
    (group,) = {d["sagellm"]["group"] for d in found if d["rank"] == 0}
    dumps = [d for d in found if d["sagellm"]["group"] == group]
    assert [d["rank"] for d in dumps] == [0, 1, 2]
    assert [[e["state"] for e in d["entries"]] for d in dumps] == [
        ["completed", "completed", "started"],
        ["completed", "completed", "started"],
        ["completed", "completed"],
    ]
    about = dumps[0]["sagellm"]
    assert [late["rank"] for late in about["late"]] == [2]
    assert "waits in all_reduce sum #2" in about["summary"]
    assert "no sign of rank 2" in about["summary"]
    assert "rank 2 is at collective #2 all_reduce (completed), ranks 0, 1 at #3" in summarize(dumps)

    fr_trace = pytest.importorskip("torch.distributed.flight_recorder.fr_trace")
    traces = tmp_path / "torch"
    assert len(write_torch_traces(dumps, traces)) == 3
    caplog.set_level(logging.INFO, logger="Flight Recorder")
    try:
        fr_trace.main([str(traces), "--prefix", "rank_"])
    finally:
        gc.enable()
    text = caplog.text
    assert "Not all ranks joining collective, sequence number: 3" in text
    assert "missing ranks: {2}" in text
    assert text.count("Not all ranks") == 1


# -- in this process ----------------------------------------------------------------------


def recorder(**options):
    return MockBackend(options=options, transport=MockWorld(1).transport(0))


def test_the_ring_keeps_the_last_calls_and_numbers_go_on():
    backend = recorder(flight_entries=4)
    for _ in range(10):
        backend.all_reduce(torch.ones(2))
    dump = backend.flight_record()
    assert [e["record_id"] for e in dump["entries"]] == [6, 7, 8, 9]
    assert [e["collective_seq_id"] for e in dump["entries"]] == [7, 8, 9, 10]
    assert dump["pg_status"]["mock"]["last_completed_collective"] == 10
    json.dumps(dump)
    assert recorder(flight_entries=0).flight_record()["entries"] == []


def test_entries_have_what_torchs_have():
    def body(b):
        b.all_gather_into_tensor(torch.empty(6), torch.ones(3))
        b.reduce_scatter_tensor(torch.empty(2), torch.ones(4))
        b.send(torch.ones(1), 1) if b.rank == 0 else b.recv(torch.ones(1), 0)
        b.barrier()
        return b.flight_record()

    dump = MockWorld(2).run(body)[1]
    names = [e["profiling_name"] for e in dump["entries"]]
    assert names == [
        "gloo:_all_gather_base",
        "gloo:_reduce_scatter_base",
        "gloo:recv 1<-0",
        "gloo:barrier",
    ]
    assert [e["collective_seq_id"] for e in dump["entries"]] == [1, 2, 2, 3]
    assert [(e["input_sizes"], e["output_sizes"]) for e in dump["entries"][:2]] == [
        ([[3]], [[6]]),
        ([[4]], [[2]]),
    ]
    first = dump["entries"][0]
    assert first["input_dtypes"] == ["float32"]
    assert first["time_created_ns"] <= first["time_discovered_completed_ns"]
    assert abs(first["time_created_ns"] - time.time_ns()) < 60e9
    assert dump["pg_config"]["mock"] == {"name": "mock", "desc": "mock", "ranks": "[0, 1]"}


def test_an_abort_writes_the_dump_and_a_bad_folder_is_no_new_failure(tmp_path, caplog):
    backend = recorder(flight_folder=str(tmp_path / "deep" / "down"))
    backend.all_reduce(torch.ones(2))
    backend.abort("enough")
    (dump,) = read_dumps(tmp_path / "deep" / "down")
    assert "aborted: enough" in dump["sagellm"]["reason"]

    (tmp_path / "file").write_text("")
    recorder(flight_folder=str(tmp_path / "file")).abort("enough")
    assert "no flight record of group mock was written" in caplog.text


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder().abort("enough")
    assert list(tmp_path.iterdir()) == []


def test_signals_are_left_alone_unless_asked_for_and_given_back():
    recorder()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    undo = dump_on_signal(signal.SIGUSR2, "unused")
    with pytest.raises(ConfigError, match="has a handler already"):
        dump_on_signal(signal.SIGUSR2, "unused")
    undo()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    with pytest.raises(ConfigError, match="signal 999"):
        dump_on_signal(999, "unused")


def test_the_command_says_who_is_late_and_refuses_rubbish(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no flight-" in capsys.readouterr().err
    recorder(flight_folder=str(tmp_path)).abort("enough")
    assert main([str(tmp_path), "--torch", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert "group mock: all ranks are at the same call (1)" in out
    assert (tmp_path / "t" / "rank_0").exists()
    for rubbish in ("", "[]", '{"sagellm": {}}', '{"version": 1}'):
        (tmp_path / "flight-x-rank9.json").write_text(rubbish)
        with pytest.raises(IntegrityError, match="is no flight record"):
            read_dumps(tmp_path)
