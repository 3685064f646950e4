"""Recorded machines beside the checkout, read end to end; skipped where they are absent."""

import json
import re
import tarfile

import pytest

READ = re.compile(
    r"(^|/)(sys/bus/(pci|cxl|dax)|sys/class/(net|infiniband|kfd)|sys/devices/pci|sys/devices/system/node/node\d+/"
    r"(cpulist|distance|meminfo)$|proc/cpuinfo)"
)


@pytest.fixture
def recorded(shared_samples, tmp_path):
    """Root of a recorded tree."""

    def unpack(name):
        found = (shared_samples / "samples").glob(f"{name}.tar.*")
        (archive,) = (f for f in found if f.suffix in (".gz", ".bz2"))
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if READ.search(m.name)]  # thousands more are of caches
            tar.extractall(tmp_path, wanted, filter="data")
        tops = [p for p in tmp_path.iterdir() if p.is_dir()]
        return tmp_path if (tmp_path / "sys").is_dir() else tops[0]

    return unpack


TREES = (
    "hwloc_2pa-pcidomain32bits",
    "hwloc_40intel64-2g2n4c_pcilocality",
    "hwloc_40intel64-4n10c_pci-conflicts",
    "hwloc_nvidia-dgx-gb10",
    "hwloc_nvidiagpunumanodes",
)


@pytest.mark.parametrize("name", TREES)
def test_recorded_tree_is_read_without_an_exception(recorded, look, name):
    manager = look(recorded(name))
    info = manager.detect()

    assert [d for d in info.devices if d.kind == "numa"]
    for a in info.devices:
        for b in info.devices:
            assert manager.path(a.id, b.id).kind == manager.path(b.id, a.id).kind


def test_gpus_that_are_numa_nodes_too_are_read(recorded, look):
    manager = look(recorded("hwloc_nvidiagpunumanodes"))
    info = manager.detect()

    assert any(d.attrs.get("cpuless") for d in info.devices if d.kind == "numa")


def test_rdma_devices_are_those_a_person_read(recorded, look, shared_samples):
    expected = json.loads((shared_samples / "expected/gpud_ib_h100.json").read_text())

    info = look(recorded("gpud_sysfs_infiniband_h100")).detect()

    nics = {d.attrs["ib"]: d.attrs for d in info.devices if d.kind == "nic"}
    assert set(nics) == {n["name"] for n in expected["nics"]}
    for n in expected["nics"]:
        attrs = nics[n["name"]]
        assert int(attrs["port_bytes_per_s"]) * 8 == n["rate_gbps"] * 10**9
        assert attrs["link_layer"] == n["link_layer"]
        assert attrs["ib_state"] == n["state"]
        assert attrs["hca_type"] == n["hca_type"]
