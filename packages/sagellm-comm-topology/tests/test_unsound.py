"""Files that say what cannot be, and commands given what is no machine."""

import json
from itertools import pairwise

import pytest

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology._fingerprint import fingerprint
from sagellm.comm.topology.export import from_json, to_json, to_nccl_xml
from sagellm.comm.topology.importers import import_topology, read_fragment
from sagellm.comm.topology.render import render_svg
from sagellm.comm.topology.visibility import apply_visibility
from sagellm.core.protocols import (
    Device,
    IntegrityError,
    Link,
    Pair,
    SwitchDomain,
    TopologyInfo,
)

G0, G1 = (Device(f"g{i}", "gpu", vendor="nvidia", index=i) for i in range(2))


def info(*links, devices=(G0, G1), **facts):
    return TopologyInfo(tuple(devices), tuple(links), **facts)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (info(Link("g0", "g1", "nvlink", -1)), "count -1"),
        (info(Link("g0", "g1", "nvlink", 0)), "count 0"),
        (info(Link("g0", "g1", "nvlink", 1, -5.0)), "bandwidth_bytes_per_s is -5.0"),
        (info(devices=[Device("g", "gpu", numa_nodes=(-1,))]), "numa_nodes"),
        (info(devices=[Device("g", "gpu", bdf="zzz")]), "'zzz'"),
        (info(devices=[Device("g", "gpu", visible_index=-7)]), "visible_index is -7"),
        (info(devices=[Device("g", "gpu", memory_bytes=-1)]), "memory_bytes is -1"),
        (info(devices=[Device("g", "gpu", node=1)]), "node 1 of 1"),
        (info(devices=[G0, G0]), "two devices are called 'g0'"),
        (info(num_nodes=-3), "num_nodes is -3"),
        (info(num_nodes=10**9), "num_nodes is 1000000000"),
    ],
)
def test_json_that_says_what_cannot_be_is_refused(spoiled, words):
    with pytest.raises(IntegrityError, match=words):
        from_json(to_json(spoiled))


def test_json_with_loose_ends_and_a_forged_fingerprint_is_put_right_with_warnings():
    whole = info(Link("g0", "g1", "nvlink", 2, 1e9))
    loose = info(
        Link("g0", "g1", "nvlink", 2, 1e9),
        Link("g0", "nobody", "pcie"),
        domains=(SwitchDomain("d", "nvlink", ("g0", "nobody")),),
        pairs=(Pair("g0", "nobody", "SYS"),),
        fingerprint="beef",
    )

    read = from_json(to_json(loose))

    assert read.links == whole.links
    assert read.pairs == ()
    assert read.domains[0].members == ("g0",)
    assert read.fingerprint == fingerprint(read) != "beef"
    assert any("name no device" in w for w in read.warnings)
    assert any("beef" in w for w in read.warnings)


def test_json_of_a_real_detection_is_believed_as_it_is(hgx):
    found = hgx.detect()

    assert from_json(to_json(found)) == found


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_json_with_a_byte_order_mark_is_read(encoding, tmp_path, capsys):
    hidden = TopologyInfo((Device("g0", "gpu", vendor="nvidia", index=0, visible_index=None),))
    file = tmp_path / "t.json"
    file.write_bytes(to_json(hidden).encode(encoding))

    assert import_topology(file.read_bytes()) == hidden
    assert read_fragment(file.read_bytes()).devices == hidden.devices
    assert main(["show", "--json", "--from", str(file)]) == 0
    # As it was written: nothing here decides which devices are visible there.
    assert from_json(capsys.readouterr().out).devices[0].visible_index is None


def chain(length):
    switches = tuple(Device(f"s{i:04}", "pci_switch") for i in range(length))
    names = ["root", *(s.id for s in switches), "g0"]
    links = tuple(Link(a, b, "pcie", 1, 1e9) for a, b in pairwise(names))
    return info(*links, devices=(G0, Device("root", "pci_root"), *switches))


def test_a_chain_of_a_thousand_switches_is_drawn_whole():
    svg = render_svg(chain(1500))

    assert all(f"s{i:04}" in svg for i in range(0, 1500, 100))
    assert "drawn apart" in svg
    assert "drawn apart" not in render_svg(chain(20))


def test_an_error_of_ours_is_one_line(tmp_path, monkeypatch, capsys):
    def spoiled(_):
        raise RecursionError("too deep\nby far")

    monkeypatch.setattr("sagellm.comm.topology._cli.look.read_topology", spoiled)

    assert main(["show"]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "RecursionError: too deep" in told


def test_topo_file_with_a_relative_name_is_looked_for_where_nccl_does(tmp_path, monkeypatch, hgx):
    (tmp_path / "topo.xml").write_text(to_nccl_xml(hgx.detect()))
    monkeypatch.chdir(tmp_path)
    from sagellm.comm.topology._topo_file import TopoFileDetector
    from sagellm.comm.topology.detector import make_context

    for name in ("topo.xml", "./topo.xml", str(tmp_path / "topo.xml")):
        found = TopoFileDetector().detect(make_context(environ={"NCCL_TOPO_FILE": name}))
        assert sum(d.kind == "gpu" for d in found.devices) == 8, name


def test_every_rdma_name_of_a_card_names_it(tmp_path, capsys):
    card = Device("n", "nic", attrs={"ib": "mlx5_0,mlx5_1", "netdev": "eth0,eth1"})
    switch = Device("s", "pci_switch")
    links = (Link("g0", "s", "pcie", 1, 1e9), Link("n", "s", "pcie", 1, 1e9))
    file = tmp_path / "t.json"
    file.write_text(to_json(info(*links, devices=(G0, card, switch))))

    for name in ("mlx5_0", "mlx5_1", "eth1"):
        assert main(["explain", "--from", str(file), "GPU0", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["b"] == "n"


@pytest.mark.parametrize("command", [["doctor"], ["show"], ["diff", "live"]])
def test_a_folder_that_is_no_recorded_machine_is_refused(command, tmp_path, capsys):
    where = [str(tmp_path)] if command[0] == "diff" else ["--from", str(tmp_path)]

    assert main([*command, *where]) == 2
    assert "no `sys` folder" in capsys.readouterr().err


def test_doctor_takes_a_file_and_a_deadline(tmp_path, hgx_root, capsys):
    file = tmp_path / "t.json"
    file.write_text(to_json(info()))

    assert main(["doctor", "--from", str(file), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert any("g0 - g1" in f["message"] for f in told["findings"])
    assert main(["doctor", "--from", str(file)]) == 1
    assert main(["doctor", "--from", str(hgx_root), "--deadline", "5"]) == 0
    assert main(["doctor", "--from", str(tmp_path / "nope")]) == 2
    assert main(["doctor", "--deadline", "-1"]) == 2


def test_json_of_every_command_names_its_schema(tmp_path, hgx_root, capsys):
    file, out = tmp_path / "t.json", tmp_path / "out.json"
    file.write_text(to_json(info(Link("g0", "g1", "nvlink", 2, 1e9))))
    source = ["--from", str(file)]
    commands = {
        "diff": ["diff", str(file), str(file)],
        "doctor": ["doctor", *source],
        "explain": ["explain", *source, "g0", "g1"],
        "export": ["import", str(file), "-o", str(out)],
    }

    for name, words in commands.items():
        assert main([*words, "--json"]) in (0, 1)
        assert json.loads(capsys.readouterr().out)["schema"] == f"sagellm.topology.{name}/1"
    assert from_json(out.read_bytes()).num_devices == 2


@pytest.mark.parametrize(
    ("vendor", "name"),
    [
        ("intel", "ZE_AFFINITY_MASK"),
        ("habana", "HABANA_VISIBLE_DEVICES"),
        ("amd", "GPU_DEVICE_ORDINAL"),
        ("hygon", "CUDA_VISIBLE_DEVICES"),
        ("huawei", "ASCEND_VISIBLE_DEVICES"),
    ],
)
def test_a_variable_that_is_not_honoured_is_told(vendor, name):
    host = info(devices=[Device(f"g{i}", "gpu", vendor=vendor, index=i) for i in range(2)])

    told = apply_visibility(host, {name: "1"}).warnings

    assert any(name in w and vendor in w for w in told)
    assert apply_visibility(host, {}).warnings == ()


@pytest.mark.parametrize("width", [50, 80])
def test_no_cell_of_a_plan_is_cut_on_a_narrow_page(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))

    assert main(["plan", "--nodes", "16", "--bytes", "1M", "--algorithms", "ring,two_shot"]) == 0

    shown = capsys.readouterr().out
    assert "…" not in shown.partition("hosts; fastest")[0]
    assert "s of CPU)" in shown
