"""What people and other programs see: JSON, matrix, table, drawing, command line."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology._gather import join_hosts
from sagellm.comm.topology.export import from_json, to_json, to_matrix
from sagellm.comm.topology.render import render_matrix, render_svg, render_table
from sagellm.core.protocols import Device, IntegrityError, Link, Pair, TopologyInfo


def printed(renderable, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(renderable)
        return console.export_text()


def test_json_comes_back_equal(hgx):
    info = hgx.detect()

    assert from_json(to_json(info)) == info
    assert json.loads(to_json(info))["schema"] == "sagellm.topology/1"


def test_unknown_fields_are_ignored_and_other_schemas_are_not_read():
    future = json.loads(to_json(TopologyInfo()))
    future["topology"]["colour"] = "blue"

    assert from_json(json.dumps(future)) == TopologyInfo()
    with pytest.raises(IntegrityError, match=r"sagellm\.topology/9"):
        from_json('{"schema": "sagellm.topology/9", "topology": {}}')
    with pytest.raises(IntegrityError):
        from_json("[1, 2]")


def test_matrix_reads_like_the_one_people_know(hgx):
    lines = to_matrix(hgx.detect()).splitlines()

    first = lines[1].split("\t")
    assert lines[0].split("\t")[1:3] == ["GPU0", "GPU1"]
    assert first[:4] == ["GPU0", "X", "NV18", "NV18"]
    assert first[-2:] == ["0-55", "0"]
    assert "  NIC1: mlx5_0" in lines


def test_matrix_says_so_where_nothing_is_known():
    info = TopologyInfo(devices=(Device("a", "gpu"), Device("b", "gpu")))

    assert to_matrix(info).splitlines()[1] == "GPU0\tX\t?\t?\t?"


def test_table_and_coloured_matrix_name_the_devices(hgx):
    info = hgx.detect()

    text = printed(render_table(info))

    assert "8 accelerators" in text
    assert "478.1 GB/s" in text
    assert "400 Gb/s" in text
    assert "NV18" in printed(render_matrix(info))


def test_big_matrix_is_cut_and_says_so():
    info = TopologyInfo(devices=tuple(Device(f"g{i}", "gpu") for i in range(30)))

    assert "6 more devices are not shown" in printed(render_matrix(info))


def test_drawing_is_xml_with_every_device_in_a_tooltip(hgx):
    info = hgx.detect()

    root = ET.fromstring(render_svg(info))

    titles = "\n".join(t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}title"))
    assert all(device.id in titles for device in info.devices)


def test_drawn_shapes_stay_inside_the_picture(hgx):
    root = ET.fromstring(render_svg(hgx.detect()))

    width, height = float(root.get("width")), float(root.get("height"))
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        if rect.get("x"):
            assert 0 <= float(rect.get("x")) <= width - float(rect.get("width"))
            assert 0 <= float(rect.get("y")) <= height - float(rect.get("height"))


def test_names_cannot_break_the_drawing():
    info = TopologyInfo(
        devices=(Device("<a&b>", "gpu", model="'\"<script>", visible_index=0),), hostname="<h>"
    )

    assert "<script>" not in render_svg(info)
    ET.fromstring(render_svg(info))


@pytest.mark.parametrize("hosts", [2, 6])
def test_many_hosts_are_drawn_or_counted(hgx, hosts):
    svg = render_svg(join_hosts([hgx.detect()] * hosts))

    ET.fromstring(svg)
    assert "host n1" in svg
    assert ("2 more hosts" in svg) == (hosts == 6)
    assert "infiniband" in svg


def test_directly_linked_and_homeless_devices_are_drawn():
    devices = (Device("g0", "npu"), Device("g1", "npu"), Device("numa:0", "numa", numa_nodes=(0,)))
    info = TopologyInfo(devices=devices, links=(Link("g0", "g1", "hccs", 7),))

    svg = render_svg(info)

    assert "NUMA unknown" in svg
    assert "hccs x7" in svg


def test_no_card_covers_another(hgx):
    from sagellm.comm.topology import _svg, _svg_canvas

    canvas = _svg_canvas.Canvas()
    _svg._draw_host(canvas, hgx.detect(), 0, 0.0, named=False)

    cards = [n for n in canvas.at.values() if n.device.kind in ("gpu", "nic")]
    for i, a in enumerate(cards):
        for b in cards[i + 1 :]:
            apart = abs(a.x - b.x) >= canvas.card_w or abs(a.y - b.y) >= _svg_canvas.CARD_H
            assert apart, (a.device.id, b.device.id)


def test_nothing_is_drawn_as_nothing():
    assert "no devices were found" in render_svg(TopologyInfo())


def test_command_line_shows_exports_and_explains(hgx_root, tmp_path, capsys):
    source = ["--from", str(hgx_root)]
    drawing = tmp_path / "t.svg"

    assert main(["show", *source]) == 0
    assert "accelerators" in capsys.readouterr().out
    assert main(["export", "svg", *source, "-o", str(drawing)]) == 0
    assert drawing.read_text().startswith("<svg")
    assert main(["export", "matrix", *source]) == 0
    assert "GPU7" in capsys.readouterr().out
    assert main(["explain", *source, "GPU0", "mlx5_0"]) == 0
    assert "PIX, 2 hops, 63.0 GB/s each way" in capsys.readouterr().out
    assert main(["explain", *source, "--json", "GPU0", "numa:1"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] == "SYS"


def test_exported_json_is_read_back(hgx_root, tmp_path, capsys):
    file = tmp_path / "t.json"
    main(["export", "json", "--from", str(hgx_root), "-o", str(file)])

    assert main(["show", "--json", "--from", str(file)]) == 0
    assert from_json(capsys.readouterr().out) == from_json(file.read_bytes())


def test_command_line_fails_in_words(hgx_root, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")

    assert main(["explain", "--from", str(hgx_root), "GPU0", "GPU99"]) == 2
    assert "no device 'GPU99'" in capsys.readouterr().err
    assert main(["show", "--from", str(broken)]) == 2
    assert "not a topology" in capsys.readouterr().err


def test_module_runs_on_this_host():
    done = subprocess.run(
        [sys.executable, "-m", "sagellm.comm.topology", "show", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert from_json(done.stdout).fingerprint


def test_links_to_processors_and_meshes_are_drawn():
    devices = [Device(f"g{i}", "npu", numa_nodes=(0,)) for i in range(8)]
    wires = [Link(f"g{i}", f"g{j}", "hccs") for i in range(8) for j in range(i + 1, 8)]
    node = Device("numa:0", "numa", numa_nodes=(0,), cpulist="0-3")
    info = TopologyInfo(
        devices=(*devices, node), links=(*wires, Link("g0", "numa:0", "c2c", 1, 450e9))
    )

    svg = render_svg(info)

    assert "hccs full mesh: 8 members, 28 wires" in svg
    assert "c2c, 450.0 GB/s each way" in svg


def test_a_nic_is_drawn_in_the_node_of_the_gpu_it_is_near():
    devices = (
        Device("g0", "gpu", numa_nodes=(1,)),
        Device("ib:mlx5_0", "nic", attrs={"ib": "mlx5_0"}),
        Device("numa:1", "numa", numa_nodes=(1,)),
    )

    assert "NUMA unknown" in render_svg(TopologyInfo(devices))
    near = TopologyInfo(devices, pairs=(Pair("g0", "ib:mlx5_0", "PXB"),))
    assert "NUMA unknown" not in render_svg(near)
