"""The drawing: measured words that neither meet each other nor leave the picture."""

import random
import xml.etree.ElementTree as ET

import pytest

from sagellm.comm.topology._join import join_hosts
from sagellm.comm.topology._svg_text import clip, width_of
from sagellm.comm.topology.benchmarks.random_topology import random_topology
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.render import render_svg
from sagellm.core.protocols import Device, IntegrityError, Link, TopologyInfo

SVG = "{http://www.w3.org/2000/svg}"
LONG = "Very Long Accelerator Name WWWWWWWW Ti SUPER 96GB HBM3e (engineering sample 12345)"


def words_of(root):
    """Text and box of every line of words: left, top, right, bottom."""
    for text in root.iter(f"{SVG}text"):
        size, x, y = (float(text.get(k)) for k in ("font-size", "x", "y"))
        width = width_of(text.text or "", size, bold=text.get("font-weight") == "bold")
        left = x - {"start": 0, "middle": width / 2}[text.get("text-anchor")]
        yield text.text, (left, y - 0.75 * size, left + width, y + 0.2 * size)


def meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def assert_readable(info):
    root = ET.fromstring(render_svg(info))
    width, height = float(root.get("width")), float(root.get("height"))
    words = list(words_of(root))
    rects = [
        tuple(float(r.get(k)) for k in ("x", "y", "width", "height"))
        for r in root.iter(f"{SVG}rect")
        if r.get("x")
    ]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in rects if h <= 46]
    for text, box in words:
        assert 0 <= box[0], text
        assert box[2] <= width, text
        assert box[3] <= height, text
        for card in boxes:
            inside = card[0] <= box[0] and box[2] <= card[2]
            assert inside or not meet(box, card), (text, box, card)
    for i, (text, box) in enumerate(words):
        for other, place in words[i + 1 :]:
            assert not meet(box, place), (text, other)


def wired(count, kind="nvlink", seed=0):
    rng = random.Random(seed)
    devices = tuple(
        Device(f"g{i}", "gpu", vendor="nvidia", model=f"NVIDIA {LONG}", index=i)
        for i in range(count)
    )
    links = tuple(
        Link(f"g{a}", f"g{b}", kind, n, n * 25e9)
        for a in range(count)
        for b in range(a)
        if (n := rng.randint(0, 4))
    )
    return TopologyInfo(devices=devices, links=links, hostname="h" * 300)


def switched(count, name="nvlink-switch"):
    devices = tuple(Device(f"g{i}", "npu", model=LONG, index=i) for i in range(count))
    links = tuple(Link(d.id, name, "nvlink", 18, 18 * 26.5e9) for d in devices)
    return TopologyInfo((*devices, Device(name, "fabric_switch")), links)


@pytest.mark.parametrize(
    "info",
    [
        TopologyInfo(),
        TopologyInfo(devices=(Device("g0", "gpu", model=LONG),), hostname="h" * 300),
        make_cluster(ClusterShape(nodes=1, gpus=16, nics=8)),
        make_cluster(ClusterShape(nodes=1, gpus=16, nics=1, fabric_bytes_per_s=0)),
        make_cluster(ClusterShape(nodes=3, gpus=2, nics=2, pcie_bytes_per_s=0.25e9)),
        wired(4),
        wired(16, "xgmi", 1),
        switched(1),
        switched(2),
        switched(16, "a-switch-with-a-name-that-is-much-too-long-for-its-two-members"),
    ],
    ids=["nothing", "one", "sixteen", "pcie", "three-hosts", "wires", "many-wires", "alone",
         "pair", "names"],
)  # fmt: skip
def test_no_words_meet_or_are_cut(info):
    assert_readable(info)


def test_a_server_and_two_of_them_are_readable(hgx):
    assert_readable(hgx.detect())
    assert_readable(join_hosts([hgx.detect()] * 2))


@pytest.mark.parametrize("seed", range(30))
def test_random_machines_are_readable(seed):
    assert_readable(random_topology(seed))


def test_recorded_machines_are_readable(shared_samples):
    files = [f for f in (shared_samples / "samples").iterdir() if f.suffix in (".txt", ".xml")]
    assert files
    for file in files:
        try:
            info = import_topology(file.read_bytes())
        except IntegrityError:  # of a kind that is not read on its own
            continue
        assert_readable(info)


def test_wide_machines_have_narrow_cards():
    root = ET.fromstring(render_svg(make_cluster(ClusterShape(nodes=1, gpus=16, nics=8))))

    assert float(root.get("width")) < 2400


def test_wires_say_what_they_carry():
    links = (Link("g0", "g1", "nvlink", 4, 100e9), Link("g1", "g2", "nvlink", 2, 50e9),
             Link("g0", "g2", "nvlink", 4, 100e9))  # fmt: skip
    devices = tuple(Device(f"g{i}", "gpu", index=i) for i in range(3))

    texts = [text for text, _ in words_of(ET.fromstring(render_svg(TopologyInfo(devices, links))))]

    assert "nvlink x4: 2 of them, 100 GB/s each way" in texts
    assert "nvlink x2: 50 GB/s each way" in texts


def test_makers_names_leave_room_for_models():
    info = TopologyInfo(devices=(Device("g0", "gpu", vendor="nvidia", model="NVIDIA H100 80GB"),))

    assert "H100 80GB" in [text for text, _ in words_of(ET.fromstring(render_svg(info)))]


def test_words_are_cut_to_what_fits():
    for words in ("GPU", LONG, "华为昇腾九一〇", "x" * 500):
        for width in (20, 60, 200):
            assert width_of(clip(words, width, 12, bold=True), 12, bold=True) <= width
    assert clip("GPU", 60) == "GPU"
