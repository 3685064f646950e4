"""Calibrating live processes, keeping what was measured, and predicting from it."""

import json
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology.cost_model import CostModel
from sagellm.comm.topology.live import OPS, calibrate_live, library_of, sweep_live
from sagellm.comm.topology.manager import TopologyManager
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
)
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
    assert measured["switches"].keys() == {"all_reduce", "broadcast"}
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


def test_predict_marks_what_is_fastest_in_its_own_table(tmp_path, capsys, hgx_root):
    source = ["--from", str(hgx_root), "--folder", str(tmp_path)]
    model = CostModel(TopologyManager(root=hgx_root, environ={}).detect())
    gpus = [d.id for d in model._topology.accelerators]
    model.observe([
        {"op": "all_reduce", "algorithm": "ring", "group_size": 4, "nbytes": n,
         "time_us": 500 + n * 1e-3, "members": gpus[:4]}
        for n in (1 << 12, 1 << 20, 1 << 26) for _ in range(5)
    ])  # fmt: skip
    model.save(library_of("gloo"), tmp_path)

    for group in ("GPU0,GPU1,GPU2,GPU3", "GPU1,GPU4,GPU6", "5", "24"):
        assert main(["predict", *source, "--bytes", "1M", "--group", group, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        fastest = min(said["estimates"].items(), key=lambda x: (x[1]["time_us"], x[0]))
        assert (said["chosen"], fastest[1]["basis"]) == (fastest[0], "scaled")


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


def test_measurements_are_kept_under_the_version_of_what_moves_the_bytes(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    shipped = {e.name: e.dist for e in entry_points(group="sagellm.comm.backends")}

    assert library_of("gloo") == f"gloo torch-{version('torch')}"
    assert library_of("nccl") == "nccl 2.27.3"
    for name in shipped.keys() - {"gloo", "nccl"}:
        assert library_of(name) == f"{name} {shipped[name].name}-{shipped[name].version}"
    with pytest.raises(ConfigError, match="has no 'nonesuch'"):
        library_of("nonesuch")


def test_without_nccl_or_with_too_few_devices_nothing_starts(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="has no NCCL"):
        calibrate_live("nccl", 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    assert main(["calibrate", "--backend", "nccl", "--ranks", "2"]) != 0

    assert "a GPU for each of 2 ranks" in capsys.readouterr().err


# Stands in each rank's process for torch's devices: device memory is the host's, NCCL is gloo.
FAKE_DEVICES = """
import importlib.abc, importlib.machinery, os, sys

def fake(torch):
    import torch.distributed as dist
    said = open(os.environ["FAKE_DEVICES_SAID"] + "." + sys.argv[-1], "a", buffering=1)
    def on_host(make):
        def made(*args, device=None, **more):
            if device is not None:
                said.write(f"{make.__name__} {device}\\n")
            return make(*args, **more)
        return made
    torch.zeros, torch.tensor = on_host(torch.zeros), on_host(torch.tensor)
    torch.cuda.set_device = lambda device: said.write(f"set_device {device}\\n")
    torch.cuda.synchronize = lambda device=None: said.write(f"synchronize {device}\\n")
    torch.cuda.device_count = lambda: 2
    torch.cuda.nccl.version = lambda: (2, 27, 3)
    dist.is_nccl_available = lambda: True
    begin = dist.init_process_group
    def init_process_group(library, **more):
        said.write(f"init {library}\\n")
        return begin("gloo", **more)
    dist.init_process_group = init_process_group

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            fake(module)
        spec.loader.exec_module = exec_module
        return spec

if "sagellm.comm.topology._live_rank" in " ".join(sys.orig_argv):
    sys.meta_path.insert(0, Finder())
"""


@on_linux
def test_nccl_is_timed_on_a_device_of_each_rank_and_kept_for_them(
    tmp_path, capsys, monkeypatch, hgx_root
):
    import torch

    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FAKE_DEVICES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_DEVICES_SAID", str(tmp_path / "said"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    source = ["--from", str(hgx_root), "--folder", str(tmp_path / "kept"), "--backend", "nccl"]

    assert main(["calibrate", *source, "--largest", "64K", "--knots", "4", "--repeats", "5",
                 "--ops", ",".join(OPS), "--json"]) == 0  # fmt: skip
    measured = json.loads(capsys.readouterr().out)
    assert main(["predict", *source, "--bytes", "32K", "--group", "GPU0,GPU1", "--json"]) == 0
    near = json.loads(capsys.readouterr().out)["estimates"]["native"]
    assert main(["predict", *source, "--bytes", "32K", "--group", "GPU0,GPU7", "--json"]) == 0
    far = json.loads(capsys.readouterr().out)["estimates"]["native"]

    assert measured["library"] == "nccl 2.27.3"
    assert {r["op"] for r in measured["rows"]} == set(OPS)
    assert {len(r["members"]) for r in measured["rows"]} == {2}
    assert (near["basis"], far["basis"]) == ("calibrated", "scaled")
    for rank in range(2):
        said = (tmp_path / f"said.{rank}").read_text().splitlines()
        assert said[:2] == [f"set_device cuda:{rank}", "init nccl"]
        assert {f"zeros cuda:{rank}", f"tensor cuda:{rank}"} < set(said)
        assert said.count(f"synchronize cuda:{rank}") >= 2 * 5 * 4 * len(OPS)
        assert not any(f"cuda:{1 - rank}" in line for line in said)


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
        (lambda: calibrate_live("gloo", 2, knots=0), "by 0 sizes"),
        (
            lambda: calibrate_live("gloo", 2, smallest=1 << 20, largest=1 << 10),
            "smallest < largest",
        ),
        (lambda: calibrate_live("gloo", 2, smallest=0), "from 0 "),
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
