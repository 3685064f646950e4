"""The variable by which a maker's runtime hides devices holds for what its tool names."""

import pytest

from sagellm.comm.domestic import topo_detectors
from sagellm.comm.topology.visibility import apply_visibility
from sagellm.core.protocols import CommandResult, DetectionContext, TopologyInfo


@pytest.mark.parametrize(
    ("spec", "variable", "command", "name", "link"),
    [
        ("ASCEND", "ASCEND_RT_VISIBLE_DEVICES", "npu-smi info -t topo", "NPU", "HCCS"),
        ("METAX", "MACA_VISIBLE_DEVICES", "mx-smi topo -m", "GPU", "MX"),
        ("MOORE_THREADS", "MUSA_VISIBLE_DEVICES", "mthreads-gmi topo -m", "GPU", "MT2"),
        ("KUNLUN", "XPU_VISIBLE_DEVICES", "xpu-smi topo -m", "XPU", "XL"),
    ],
)
def test_the_makers_variable_chooses_among_what_its_tool_names(
    tmp_path, spec, variable, command, name, link
):
    matrix = f"     {name}0 {name}1\n{name}0 X {link}\n{name}1 {link} X\n"

    def run(arguments, timeout_s):
        if " ".join(arguments) != command:
            raise FileNotFoundError(arguments[0])
        return CommandResult(0, matrix)

    context = DetectionContext(tmp_path, {}, run, lambda: 0.0, 5.0, True)
    found = getattr(topo_detectors, spec).load().detect(context)

    seen = apply_visibility(TopologyInfo(devices=found.devices), {variable: "1"})

    assert [d.visible_index for d in seen.devices[:2]] == [None, 0]
