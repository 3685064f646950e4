"""Vendors' link matrices: forms drawn for these tests, and recorded ones where they are at hand."""

import os
from pathlib import Path

import pytest

from sagellm.comm.domestic import topo_detectors
from sagellm.comm.domestic.topo_table import parse_bus_table, parse_link_table
from sagellm.core.protocols import CommandResult, DetectionContext

ASCEND = """\
           NPU0       NPU1       NPU2       CPU Affinity
NPU0       X          HCCS       PHB        0-23
NPU1       HCCS       X          SIO        24-47
NPU2       PHB        SIO        X          NA

Legend:

  X    = Self
  HCCS = Connection traversing HCCS.
"""
OVERVIEW = """\
+---------------------------+---------------+--------------------+
| NPU   Name                | Health        | Power(W)           |
| Chip                      | Bus-Id        | AICore(%)          |
+===========================+===============+====================+
| 0     910B3               | OK            | 91.5               |
| 0                         | 0000:C1:00.0  | 0                  |
| 1     910B3               | OK            | 91.5               |
| 0                         | 0000:C2:00.0  | 0                  |
| 2     910B3               | OK            | 91.5               |
| 0                         | C3:00.0       | 0                  |
| NPU     Chip              | Process id    | Process name       |
| 0       0                 | 1712733       | python             |
"""
METAX = """\
=== MetaX System Management Interface Log ===
Attached GPUs       : 2
        GPU0    GPU1    Node Affinity  CPU Affinity
GPU0    X       MX      0              0-31,64-95
GPU1    MX      X       1              32-63
Legend:
  MX   = Connection traversing MetaXLink
"""
BOXES = """\
| GPU         NAME          | Bus-id              | GPU-Util |
| 0           MetaX C500    | 0000:08:00.0        | 0%       |
| 1           MetaX C500    | 0000:09:00.0        | 0%       |
"""


@pytest.fixture
def context(tmp_path):
    """A context whose commands print what they are told to."""

    def make(outputs, *, allow=True, deadline_s=5.0, fails=None):
        calls = []

        def run(command, timeout_s):
            calls.append(list(command))
            if fails is not None:
                raise fails
            text = outputs.get(" ".join(command))
            if text is None:
                raise FileNotFoundError(command[0])
            return text if isinstance(text, CommandResult) else CommandResult(0, text)

        ctx = DetectionContext(tmp_path, {}, run, lambda: 0.0, deadline_s, allow)
        return ctx, calls

    return make


def detect(spec, ctx):
    return spec.load().detect(ctx)


def test_ascend_links_join_pci_addresses(context):
    ctx, _ = context({"npu-smi info -t topo": ASCEND, "npu-smi info": OVERVIEW})
    found = detect(topo_detectors.ASCEND, ctx)

    assert [d.id for d in found.devices] == ["0000:c1:00.0", "0000:c2:00.0", "0000:c3:00.0"]
    assert [(x.a[5:7], x.b[5:7], x.kind, x.count) for x in found.links] == [
        ("c1", "c2", "hccs", 1),
        ("c2", "c3", "sio", 1),
    ]
    first, _, last = found.devices
    assert (first.kind, first.vendor, first.model, first.index) == ("npu", "huawei", "910B3", 0)
    assert first.cpulist == "0-23"
    assert first.attrs == {"path.NPU2": "PHB"}
    assert last.cpulist is None
    assert found.warnings == ()


def test_devices_without_an_address_say_so(context):
    ctx, _ = context({"npu-smi info -t topo": ASCEND})
    found = detect(topo_detectors.ASCEND, ctx)

    assert found.devices[0].id == "npu-smi:NPU0"
    assert found.devices[0].bdf is None
    assert "no PCI address for NPU0, NPU1, NPU2" in found.warnings[0]


def test_physical_ids_of_chips_are_matched(context):
    matrix = ASCEND.replace("NPU", "Phy-ID")
    boxes = (
        "| 0 Ascend910 | OK |\n| 0 0 | 0000:9D:00.0 |\n| 0 Ascend910 | OK |\n| 1 1 | 0000:9F:00.0 |"
    )
    ctx, _ = context({"npu-smi info -t topo": matrix, "npu-smi info": boxes})
    found = detect(topo_detectors.ASCEND, ctx)

    assert [d.bdf for d in found.devices] == ["0000:9d:00.0", "0000:9f:00.0", None]


def test_metax_links_and_nodes(context):
    ctx, _ = context({"mx-smi topo -m": METAX, "mx-smi": BOXES})
    found = detect(topo_detectors.METAX, ctx)

    assert [(x.a, x.b, x.kind) for x in found.links] == [
        ("0000:08:00.0", "0000:09:00.0", "metaxlink")
    ]
    assert [d.numa_nodes for d in found.devices] == [(0,), (1,)]
    assert found.devices[0].cpulist == "0-31,64-95"


def test_a_tool_off_path_is_found_in_its_place(context):
    ctx, calls = context({"/opt/maca/bin/mx-smi topo -m": METAX})
    place = ctx.root / "opt/maca/bin/mx-smi"
    place.parent.mkdir(parents=True)
    place.write_text("")

    assert len(detect(topo_detectors.METAX, ctx).links) == 1
    assert calls[0] == ["mx-smi", "topo", "-m"]


def test_experimental_forms_say_so_and_count_links(context):
    matrix = "     GPU0 GPU1 NIC0\nGPU0 X MT2 PIX\nGPU1 MT2 X SYS\n"
    ctx, _ = context({"mthreads-gmi topo -m": matrix})
    found = detect(topo_detectors.MOORE_THREADS, ctx)

    assert [(x.kind, x.count) for x in found.links] == [("mtlink", 2)]
    assert "experimental" in found.warnings[0]
    assert found.devices[0].attrs["path.NIC0"] == "PIX"

    ctx, _ = context({"xpu-smi topo -m": " XPU0 NIC0\nXPU0 X PIX\nNIC Legend:\nNIC0: mlx5_7\n"})
    assert detect(topo_detectors.KUNLUN, ctx).devices[0].attrs == {"path.NIC0": "PIX"}


def test_unknown_codes_are_kept_and_named(context):
    matrix = ASCEND.replace("PHB", "WARP")
    ctx, _ = context({"npu-smi info -t topo": matrix, "npu-smi info": OVERVIEW})
    found = detect(topo_detectors.ASCEND, ctx)

    assert found.devices[0].attrs == {"path.NPU2": "WARP"}
    assert "codes WARP are not known" in found.warnings[0]
    assert len(found.links) == 2


def test_no_command_runs_without_permission(context):
    ctx, calls = context({"npu-smi info -t topo": ASCEND}, allow=False)

    assert detect(topo_detectors.ASCEND, ctx).devices == ()
    assert calls == []


def test_a_host_without_the_tool_has_nothing_to_report(context):
    ctx, _ = context({})
    found = detect(topo_detectors.ASCEND, ctx)

    assert (found.devices, found.warnings) == ((), ())


@pytest.mark.parametrize(
    ("fails", "deadline_s", "words"),
    [
        (TimeoutError(), 5.0, "did not answer within 5.0 s"),
        (PermissionError("no"), 5.0, "could not be run: no"),
        (None, 0.0, "no time left"),
    ],
)
def test_a_tool_that_fails_is_a_warning(context, fails, deadline_s, words):
    ctx, _ = context({}, fails=fails, deadline_s=deadline_s)

    assert words in detect(topo_detectors.ASCEND, ctx).warnings[0]


def test_an_error_on_stdout_is_a_warning(context):
    said = CommandResult(1, "Failed to initialize MTML\n")
    ctx, _ = context({"mthreads-gmi topo -m": said})
    found = detect(topo_detectors.MOORE_THREADS, ctx)

    assert "ended with 1" in found.warnings[0]
    assert "Failed to initialize MTML" in found.warnings[0]


def test_damaged_matrices_are_read_as_far_as_they_go(context):
    cut = "   NPU0 NPU1\nNPU0 X HCCS odd\nNPU1 SIO\n"
    table = parse_link_table(cut, "NPU[0-9]+")

    assert table.cells == {("NPU0", "NPU1"): "HCCS", ("NPU1", "NPU0"): "SIO"}
    assert len(table.problems) == 2
    assert parse_link_table("nothing\nhere", "NPU[0-9]+").names == ()
    assert parse_link_table("NPU0 X HCCS\n", "NPU[0-9]+").names == ()
    assert parse_bus_table("| x | y |\n||\n") == {}

    ctx, _ = context({"npu-smi info -t topo": cut})
    warnings = " ".join(detect(topo_detectors.ASCEND, ctx).warnings)
    assert "HCCS one way and SIO back" in warnings


@pytest.mark.parametrize(
    ("sample", "name", "code", "pairs"),
    [
        ("npu_910B3_8x_topo.txt", r"NPU\d+", "HCCS", 56),
        ("metax_8x_topo_m.txt", r"GPU\d+", "MX", 24),
    ],
)
def test_recorded_machines(sample, name, code, pairs):
    folder = os.environ.get("SAGELLM_TOPOLOGY_SAMPLES", "")
    if not folder:
        pytest.skip("SAGELLM_TOPOLOGY_SAMPLES names no folder of recorded machines")
    table = parse_link_table((Path(folder) / sample).read_text(), name)

    assert len(table.names) == 8
    assert sum(found == code for found in table.cells.values()) == pairs
    assert table.problems == ()
