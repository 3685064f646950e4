"""Running detectors: failures, hangs, deadlines, conflicts, and what is imported."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sagellm.comm.topology import TopologyManager
from sagellm.comm.topology._vendors import VISIBLE_VARIABLES
from sagellm.comm.topology.detector import installed_detectors, make_context, run_detectors
from sagellm.comm.topology.merge import merge
from sagellm.comm.topology.visibility import apply_visibility
from sagellm.core.protocols import (
    ConfigError,
    DetectorSpec,
    Device,
    Link,
    SwitchDomain,
    TopologyFragment,
    TopologyInfo,
)


class Fixed:
    """A detector that says one thing, after doing something first."""

    def __init__(self, fragment=None, first=lambda: None):
        self.fragment = fragment or TopologyFragment("fixed")
        self.first = first

    def detect(self, ctx):
        self.first()
        return self.fragment


def spec(name, detector, vendors=()):
    return DetectorSpec(name, 50, lambda: detector, vendors)


def fail():
    raise RuntimeError("no luck")


def test_our_detectors_are_installed():
    assert {"sysfs-pci", "sysfs-numa", "sysfs-net", "nvml"} <= {
        s.name for s in installed_detectors()
    }


def test_a_detector_that_raises_is_a_warning_and_the_others_go_on(tmp_path):
    good = Fixed(TopologyFragment("good", devices=(Device("x", "gpu"),)))

    info = TopologyManager(
        root=tmp_path, environ={}, detectors=[spec("bad", Fixed(first=fail)), spec("good", good)]
    ).detect()

    assert info.num_devices == 1
    assert "bad failed: RuntimeError: no luck" in info.warnings
    assert set(info.provenance) == {"bad", "good"}


def test_a_detector_that_hangs_is_left_behind_at_the_deadline(tmp_path):
    release = threading.Event()
    good = Fixed(TopologyFragment("good", devices=(Device("x", "gpu"),)))
    hanging = Fixed(first=lambda: release.wait(30))
    manager = TopologyManager(
        root=tmp_path, environ={}, detectors=[spec("a-hang", hanging), spec("good", good)]
    )
    start_s = time.monotonic()

    info = manager.detect(deadline_s=0.3)

    assert time.monotonic() - start_s < 5
    assert info.num_devices == 1
    assert any("a-hang did not answer" in w for w in info.warnings)
    assert info.provenance["a-hang"] > 0
    release.set()


def test_vendor_detectors_run_only_beside_their_devices(machine):
    ran = []
    specs = [
        spec("theirs", Fixed(first=lambda: ran.append("theirs")), ("0x10de",)),
        spec("others", Fixed(first=lambda: ran.append("others")), ("0x19e5",)),
        *[s for s in installed_detectors() if s.name == "sysfs-pci"],
    ]
    machine.pci("0000:01:00.0", "pci0000:00", 0x030200, vendor=0x10DE)

    run_detectors(specs, make_context(root=machine.root, environ={}))

    assert ran == ["theirs"]


def test_a_device_file_calls_its_vendor_where_pci_is_hidden(tmp_path):
    ran = []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    vendor = spec("theirs", Fixed(first=lambda: ran.append("theirs")), ("0x10de",))

    run_detectors([vendor], make_context(root=tmp_path, environ={}))

    assert ran == ["theirs"]


def test_answers_come_from_memory_until_refreshed(tmp_path):
    calls = []
    manager = TopologyManager(
        root=tmp_path, environ={}, detectors=[spec("n", Fixed(first=lambda: calls.append(1)))]
    )

    assert manager.detect() is manager.detect()
    manager.detect(refresh=True)

    assert len(calls) == 2


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan")])
def test_a_deadline_must_lie_ahead(tmp_path, deadline_s):
    with pytest.raises(ConfigError, match="above 0"):
        TopologyManager(root=tmp_path).detect(deadline_s=deadline_s)


def test_higher_precedence_wins_and_the_conflict_is_told():
    low = TopologyFragment(
        "sysfs", devices=(Device("0000:01:00.0", "gpu", bdf="0000:01:00.0", numa_nodes=(0,)),)
    )
    high = TopologyFragment(
        "nvml",
        devices=(Device("GPU-1", "gpu", bdf="00000000:01:00.0", uuid="GPU-1", numa_nodes=(1,)),),
    )

    info = merge([(60, low), (80, high)])

    (device,) = info.devices
    assert (device.id, device.uuid, device.numa_nodes) == ("0000:01:00.0", "GPU-1", (1,))
    assert any("numa_nodes is (1,) by nvml but (0,) by sysfs" in w for w in info.warnings)


def test_sources_without_address_meet_by_uuid_and_links_follow():
    first = TopologyFragment(
        "a",
        devices=(
            Device("0000:01:00.0", "gpu", bdf="0000:01:00.0", uuid="GPU-1"),
            Device("y", "gpu"),
        ),
    )
    second = TopologyFragment(
        "b",
        devices=(Device("dev0", "gpu", uuid="GPU-1", model="M"),),
        links=(Link("dev0", "y", "nvlink", 4),),
    )

    info = merge([(60, first), (40, second)])

    assert [d.id for d in info.devices] == ["0000:01:00.0", "y"]
    assert info.devices[0].model == "M"
    assert (info.links[0].a, info.links[0].b) == ("0000:01:00.0", "y")


def test_lane_counts_that_differ_and_ends_that_are_missing_are_told():
    devices = (Device("a", "gpu"), Device("b", "gpu"))
    first = TopologyFragment("one", devices, (Link("a", "b", "nvlink", 4, source="one"),))
    second = TopologyFragment(
        "two", (), (Link("b", "a", "nvlink", 2, 5e9, source="two"), Link("a", "ghost", "pcie"))
    )

    info = merge([(80, first), (60, second)])

    assert (info.links[0].count, info.links[0].bandwidth_bytes_per_s) == (4, 5e9)
    assert any("4 nvlink by one but 2 by two" in w for w in info.warnings)
    assert any("ghost" in w for w in info.warnings)


def test_a_domain_without_links_still_joins_its_members():
    devices = tuple(Device(f"npu{i}", "npu") for i in range(3))
    domain = SwitchDomain("ub:0", "ub", ("npu0", "npu1", "npu2"), None, 392e9)

    from sagellm.comm.topology import TopologyGraph

    info = merge([(80, TopologyFragment("x", devices, domains=(domain,)))])
    path = TopologyGraph(info).path("npu0", "npu2")

    assert (path.kind, path.bottleneck_bytes_per_s) == ("LINK", 392e9)
    assert path.links[0].confidence == "inferred"


def test_fingerprint_forgets_names_and_orders_but_not_links(look, tmp_path):
    def fingerprint(prefix, kind="nvlink", order=1):
        devices = [Device(f"{prefix}{i}", "gpu", uuid=f"{prefix}-{i}") for i in range(4)]
        links = [Link(f"{prefix}{i}", f"{prefix}{(i + 1) % 4}", kind, 2) for i in range(4)]
        return merge(
            [(80, TopologyFragment("x", tuple(devices[::order]), tuple(links)))]
        ).fingerprint

    assert fingerprint("a") == fingerprint("b", order=-1)
    assert fingerprint("a") != fingerprint("a", kind="xgmi")


def test_import_brings_neither_torch_nor_pydantic_nor_rich():
    code = (
        "import sys, sagellm.comm.topology as t; from sagellm.comm.topology.detector import "
        "BUILT_IN; t.TopologyManager(detectors=BUILT_IN).detect(); "
        "print([m for m in ('torch', 'networkx', 'rich', 'subprocess') if m in sys.modules])"
    )

    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert out.stdout.strip() == "[]"


def test_this_host_is_read_in_earnest():
    manager = TopologyManager()

    info = manager.detect(deadline_s=10)

    assert set(info.provenance) >= {"sysfs-pci", "sysfs-numa", "sysfs-net"}
    assert info.fingerprint
    for device in info.devices:
        assert manager.path(device.id, device.id).kind == "LOC"


def test_commands_run_with_a_timeout_and_a_plain_locale():
    run = make_context(environ={}).run

    done = run([sys.executable, "-c", "import os; print(os.environ['LC_ALL'])"], 30.0)

    assert (done.returncode, done.stdout.strip()) == (0, "C")
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        run([sys.executable, "-c", "import time; time.sleep(30)"], 0.2)
    with pytest.raises(FileNotFoundError):
        run(["no-such-tool-of-any-vendor"], 1.0)


def test_what_a_hanging_tool_started_ends_with_it(tmp_path):
    here = tmp_path / "grandchild"
    script = f"sleep 60 & echo $! > {here}; sleep 60"
    with pytest.raises(TimeoutError):
        make_context(environ={}).run(["sh", "-c", script], 0.5)

    pid = int(here.read_text())
    until_s = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_tool_that_prints_without_end_is_ended():
    with pytest.raises(OSError, match="prints more than"):
        make_context(environ={}).run(["cat", "/dev/zero"], 30.0)


def test_both_outputs_of_a_tool_are_read_whole():
    code = "import sys; sys.stdout.write('o' * 300_000); sys.stderr.write('e' * 300_000); exit(3)"
    before = set(os.listdir("/proc/self/fd"))

    done = make_context(environ={}).run([sys.executable, "-c", code], 30.0)

    assert (done.returncode, len(done.stdout), len(done.stderr)) == (3, 300_000, 300_000)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_detectors_share_a_thread_until_one_is_slow(tmp_path):
    release = threading.Event()
    threads = {}

    def spec(name, act):
        class Recorder:
            def detect(self, ctx):
                threads[name] = threading.get_ident()
                act()
                return TopologyFragment(name)

        return DetectorSpec(name, 60, Recorder)

    specs = [
        spec("a", lambda: None),
        spec("b", lambda: None),
        spec("c", lambda: release.wait(30)),
        spec("d", release.set),
        spec("e", lambda: None),
    ]

    found = run_detectors(specs, make_context(root=tmp_path, environ={}, deadline_s=20))

    assert [f.source for _, f in found.fragments] == ["a", "b", "c", "d", "e"]
    assert threads["a"] == threads["b"] == threads["c"] != threads["d"]


@pytest.mark.parametrize(
    ("vendor", "variable"),
    [(vendor, name) for vendor, names in VISIBLE_VARIABLES.items() for name in names],
)
def test_every_makers_variable_chooses_and_orders_its_devices(vendor, variable):
    devices = tuple(Device(f"{vendor}:{i}", "npu", vendor=vendor, index=i) for i in range(4))
    others = (Device("other:0", "gpu", vendor="intel", index=0),)
    info = TopologyInfo(devices=(*devices, *others))

    seen = apply_visibility(info, {variable: "2,0"})

    numbers = {d.id: d.visible_index for d in seen.devices}
    assert numbers == {
        f"{vendor}:0": 1, f"{vendor}:1": None, f"{vendor}:2": 0, f"{vendor}:3": None, "other:0": 0,
    }  # fmt: skip
