"""Calibrating live processes, keeping what was measured, and predicting from it."""

import json
import os
import sys
from pathlib import Path

import pytest

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology.cost_model import CostModel
from sagellm.comm.topology.live import calibrate_live, library_of, sweep_live
from sagellm.core.protocols import CommTimeoutError, ConfigError, DistributedRuntimeError
from sagellm.core.protocols.selection import backend_registry

pytest.importorskip("torch", reason="timing collectives needs torch")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts children in /proc")


def children():
    """Processes of this one."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found


@on_linux
def test_processes_are_timed_kept_and_predicted_from(tmp_path, capsys, hgx_root):
    source = ["--from", str(hgx_root), "--folder", str(tmp_path)]
    before, files = children(), len(os.listdir("/proc/self/fd"))

    assert main(["calibrate", *source, "--largest", "64K", "--knots", "4", "--repeats", "5",
                 "--ops", "all_reduce,broadcast", "--json"]) == 0  # fmt: skip
    measured = json.loads(capsys.readouterr().out)
    assert main(["predict", *source, "--bytes", "32K", "--group", "2", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)

    assert {r["op"] for r in measured["rows"]} == {"all_reduce", "broadcast"}
    assert all(r["time_us"] > 0 and r["algorithm"] == "native" for r in measured["rows"])
    assert Path(measured["path"]).parent == tmp_path
    assert predicted["estimates"]["native"]["basis"] == "calibrated"
    assert predicted["estimates"]["ring"]["basis"] == "prior"
    assert predicted["chosen"] == "native"
    assert predicted["notes"] == []
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_predict_says_when_nothing_was_measured(tmp_path, capsys, hgx_root):
    source = ["--from", str(hgx_root), "--folder", str(tmp_path)]

    assert main(["predict", *source, "--bytes", "64M", "--group", "GPU0,GPU1,GPU2"]) == 0
    shown = capsys.readouterr().out

    assert "all_reduce of 64.0 MiB over 3 ranks" in shown
    assert "run `calibrate`" in shown
    assert shown.count("prior") >= 5
    assert "(chosen)" in shown


def test_predict_refuses_unknown_names(tmp_path, capsys, hgx_root):
    source = ["--from", str(hgx_root), "--folder", str(tmp_path)]

    assert main(["predict", *source, "--op", "all_reduse"]) == 2
    assert "known: all_reduce" in capsys.readouterr().err
    assert main(["predict", *source, "--algorithm", "rings"]) == 2
    assert "known: direct" in capsys.readouterr().err


def test_explain_shows_links_and_the_wider_way(capsys, tmp_path):
    from sagellm.comm.topology.export import to_json
    from sagellm.core.protocols import Device, Link, TopologyInfo

    thin = Link("g0", "g1", "nvlink", 1, 5e9)
    wide = (Link("g0", "s", "pcie", 1, 60e9), Link("s", "g1", "pcie", 1, 60e9))
    devices = (Device("g0", "gpu"), Device("g1", "gpu"), Device("s", "pci_switch"))
    file = tmp_path / "t.json"
    file.write_text(to_json(TopologyInfo(devices=devices, links=(thin, *wide))))

    assert main(["explain", "--from", str(file), "g0", "g1"]) == 0
    shown = capsys.readouterr().out
    assert main(["explain", "--from", str(file), "g0", "g1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert "g0 - g1: LINK, 1 hops, 5.0 GB/s each way" in shown
    assert "widest way: g0 -> s -> g1 (PIX, 60.0 GB/s each way)" in shown
    assert told["widest"]["hops"] == 2
    assert "shortest" not in told


@pytest.mark.skipif("shm" not in backend_registry().names(), reason="no backend shm is installed")
def test_a_backend_found_by_its_entry_point_is_timed():
    rows = sweep_live("shm", 2, [4096, 65536], repeats=5)

    assert {r["nbytes"] for r in rows} == {4096, 65536}
    assert len(rows) == 10


@on_linux
def test_when_a_rank_fails_its_words_are_told_and_nothing_is_left(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    before = children()

    with pytest.raises(DistributedRuntimeError, match=r"rank \d ended with exit code 1: .*Error"):
        sweep_live("gloo", 2, [4096], repeats=5, timeout_s=60)

    assert children() == before


@on_linux
def test_a_deadline_ends_the_processes():
    before = children()

    with pytest.raises(CommTimeoutError, match=r"longer than 0\.2 s"):
        sweep_live("gloo", 2, [4096], repeats=5, timeout_s=0.2)

    assert children() == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: calibrate_live("gloo", 1), "2 to 64"),
        (lambda: calibrate_live("gloo", 2, ops=["p2p"]), "known: all_reduce"),
        (lambda: calibrate_live("gloo", 2, repeats=4), "at least 5"),
        (lambda: calibrate_live("gloo", 2, timeout_s=0), "timeout_s"),
        (lambda: sweep_live("gloo", 2, []), "at least 1 byte"),
        (lambda: sweep_live("nonesuch", 2, [8]), "nonesuch"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_starts(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_where_only_a_library_was_measured_no_formula_is_chosen():
    model = CostModel()
    model.observe([
        {"op": "all_reduce", "algorithm": "native", "group_size": 2, "nbytes": n, "time_us": 9e6}
        for n in (1 << 10, 1 << 20)
    ])  # fmt: skip

    name, estimate = model.select(model.freeze(), "all_reduce", 1 << 15, 2)

    assert (name, estimate.basis) == ("native", "calibrated")
    assert library_of("gloo").startswith("gloo torch-")
