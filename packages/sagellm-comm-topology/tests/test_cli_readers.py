"""The commands that read: import, export, diff, doctor."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from printers import Drawn, print_nvidia

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology._diff import Difference, differences
from sagellm.comm.topology._doctor import examine
from sagellm.comm.topology.detector import Detection
from sagellm.comm.topology.export import from_json
from sagellm.comm.topology.importers import import_topology
from sagellm.core.protocols import Device, Link, Pair, SwitchDomain, TopologyInfo

TEXT = print_nvidia(Drawn({(0, 1): "NV4", (0, 2): "PIX", (1, 2): "SYS"}, ["0-3", "4-7"], ["0", "1"], ["mlx5_0"]))  # fmt: skip  # noqa: E501


@pytest.fixture
def topo(tmp_path):
    file = tmp_path / "topo.txt"
    file.write_text(TEXT)
    return file


def test_import_prints_a_table_a_matrix_or_json(topo, capsys):
    assert main(["import", str(topo), "--matrix"]) == 0
    out = capsys.readouterr().out
    assert "2 accelerators" in out
    assert "NV4" in out
    assert main(["import", str(topo), "--json"]) == 0
    assert from_json(capsys.readouterr().out).num_devices == 2


def test_import_reads_standard_input_and_writes_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))

    assert main(["import", "-", "-o", str(tmp_path / "out.json")]) == 0

    assert from_json((tmp_path / "out.json").read_bytes()).num_devices == 2
    assert main(["show", "--from", str(tmp_path / "out.json")]) == 0
    assert "mlx5_0" in capsys.readouterr().out


def test_of_several_files_the_first_is_believed_most(topo, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("NV4", "NV2") + "\nGPU 0: NVIDIA X (UUID: GPU-aa)\n")

    assert main(["import", str(topo), str(other), "--json"]) == 0

    info = from_json(capsys.readouterr().out)
    assert [x.count for x in info.links if x.kind == "nvlink"] == [4]


def test_live_devices_and_a_file_become_one(topo, capsys):
    assert main(["import", str(topo), "--live", "--json"]) == 0

    info = from_json(capsys.readouterr().out)
    assert {"sysfs-pci", "nvidia-smi"} <= set(info.provenance)


def test_every_command_takes_any_format(topo, capsys):
    assert main(["export", "matrix", "--from", str(topo)]) == 0
    assert "NV4" in capsys.readouterr().out
    assert main(["explain", "--from", str(topo), "GPU0", "mlx5_0"]) == 0
    assert "PIX" in capsys.readouterr().out


def test_nccl_file_goes_out_and_comes_back(hgx_root, tmp_path, capsys):
    file = tmp_path / "topo.xml"

    assert main(["export", "nccl-xml", "--from", str(hgx_root), "-o", str(file)]) == 0
    assert main(["show", "--json", "--from", str(file)]) == 0

    assert from_json(capsys.readouterr().out).num_devices == 8
    assert main(["export", "nccl-xml", "--skeleton", "--from", str(hgx_root)]) == 0
    assert "<net" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["import", "no/such"], ["import", "/dev/null"]])
def test_what_cannot_be_read_is_one_line_and_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_unknown_format_is_told(topo, capsys):
    assert main(["import", str(topo), "--format", "visio"]) == 2
    assert "lspci" in capsys.readouterr().err


def test_diff_of_equals_is_silent_and_of_others_names_the_facts(topo, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("NV4", "NV2").replace("0-3", "0-2"))

    assert main(["diff", str(topo), str(topo)]) == 0
    assert "0 differences" in capsys.readouterr().out
    assert main(["diff", str(topo), str(other)]) == 1
    out = capsys.readouterr().out
    assert "cpulist" in out
    assert "other.txt" in out
    assert main(["diff", "--json", str(topo), str(other)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {d["fact"] for d in found["differences"]} == {"cpulist", "count"}
    assert found["same_structure"] is False


def test_diff_knows_this_machine_and_recorded_ones(hgx_root, capsys):
    assert main(["diff", str(hgx_root), str(hgx_root)]) == 0
    assert main(["diff", "live", str(hgx_root)]) == 1
    assert "structure differs" in capsys.readouterr().out


def test_differences_cover_devices_links_domains_and_pairs():
    a = TopologyInfo(
        devices=(Device("g0", "gpu"), Device("g1", "gpu", numa_nodes=(0,))),
        links=(Link("g0", "g1", "nvlink", 2, 50e9),),
        domains=(SwitchDomain("s", "nvlink", ("g0",)),),
        pairs=(Pair("g0", "g1", "PHB"),),
    )
    b = TopologyInfo(
        devices=(Device("g1", "gpu", numa_nodes=(1,)), Device("g2", "gpu")),
        links=(Link("g0", "g1", "nvlink", 4, 100e9),),
        domains=(SwitchDomain("s", "nvlink", ("g0", "g1")),),
        pairs=(Pair("g0", "g1", "SYS"),),
    )

    assert differences(a, a) == []
    assert differences(a, b) == [
        Difference("device", "g0", "", "there", None),
        Difference("device", "g1", "numa_nodes", "0", "1"),
        Difference("device", "g2", "", None, "there"),
        Difference("link", "g0 - g1 nvlink", "count", "2", "4"),
        Difference("link", "g0 - g1 nvlink", "bandwidth_bytes_per_s", "5e+10", "1e+11"),
        Difference("domain", "s", "members", "g0", "g0, g1"),
        Difference("pair", "g0 - g1", "path", "PHB", "SYS"),
    ]


def test_doctor_lists_detectors_and_says_what_to_do(hgx_root, capsys):
    assert main(["doctor", "--from", str(hgx_root)]) == 0
    out = capsys.readouterr().out
    assert "sysfs-pci" in out
    assert "sagellm-comm-topology[nvidia]" in out
    assert main(["doctor", "--json", "--from", str(hgx_root)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {d["detector"] for d in document["detectors"]} >= {"sysfs-pci", "sysfs-numa"}
    assert all(d["elapsed_s"] >= 0 for d in document["detectors"])


def test_doctor_names_what_no_source_says():
    gpus = tuple(Device(f"g{i}", "gpu", index=i, visible_index=None) for i in range(2))
    nic = Device("ib:x", "nic", attrs={"ib": "x", "ib_state": "DOWN"})
    info = TopologyInfo((*gpus, nic), pairs=(Pair("g0", "g1", peer={"read": "GNS"}),))

    told = examine(info, Detection((), ()))

    assert told[0].severity == "error"
    assert "g0 - g1" in told[0].message
    words = " ".join(f.message for f in told)
    assert "NUMA node of g0, g1 is unknown" in words
    assert "no peer access (GNS)" in words
    assert "ports that are down: x" in words
    assert "hidden from this process" in words


def test_nics_are_listed_as_people_count(capsys):
    drawn = Drawn({(0, i): "PIX" for i in range(1, 12)} | {(a, b): "SYS" for a in range(1, 12)
                  for b in range(a + 1, 12)}, ["0-3"], ["0"],
                  [f"mlx5_{i}" for i in range(11)])  # fmt: skip

    info = import_topology(print_nvidia(drawn).encode())

    assert [d.attrs["ib"] for d in info.devices if d.kind == "nic"] == drawn.nics


@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["export", "svg"],
        ["export", "nccl-xml"],
        ["export", "matrix"],
        ["import", "FILE"],
        ["diff", "FILE", "live"],
        ["explain", "GPU0", "GPU1"],
        ["predict", "--op", "all_reduce", "--bytes", "1M", "--group", "2"],
        ["plan", "--nodes", "2", "--bytes", "1M"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_every_command_speaks_json(words, hgx_root, topo, capsys):
    source = {"import": [], "diff": [], "plan": [], "doctor": ["--from", str(hgx_root)]}
    place = source.get(words[0], ["--from", str(hgx_root)])

    code = main([str(topo) if w == "FILE" else w for w in words] + [*place, "--json"])

    assert code in (0, 1)
    assert isinstance(json.loads(capsys.readouterr().out), dict | list)


def test_an_export_to_a_file_tells_its_place_in_json(hgx_root, tmp_path, capsys):
    file = tmp_path / "t.svg"

    assert main(["export", "svg", "--from", str(hgx_root), "-o", str(file), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told == {"schema": "sagellm.topology.export/1", "format": "svg", "file": str(file)}
    assert file.read_text().startswith("<svg")
