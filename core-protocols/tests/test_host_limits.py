"""What control groups of either version leave to this process."""

import pytest

from sagellm.core.protocols.host_limits import (
    cgroup_folders,
    quota_cpus,
    room_bytes,
    usable_cpus,
)

V2 = "0::/pod/box\n"
V1 = "7:cpu,cpuacct:/pod/box\n5:memory:/pod/box\n0::/other\n"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_folders_are_of_this_group_and_those_above_it(tmp_path):
    inner = tmp_path / "pod" / "box"
    assert cgroup_folders("cpu", tmp_path, V2) == [inner, tmp_path / "pod", tmp_path]
    base = tmp_path / "memory"
    found = cgroup_folders("memory", tmp_path, V1)
    assert found[:3] == [base / "pod" / "box", base / "pod", base]
    assert cgroup_folders("cpu", tmp_path, "") == []
    assert cgroup_folders("cpu", tmp_path, "nonsense\n:\n") == []


def test_cpus_are_those_of_the_tightest_quota(tmp_path):
    assert quota_cpus(tmp_path, V2) is None
    write(tmp_path / "pod", cpu__max="150000 100000")
    write(tmp_path / "pod" / "box", cpu__max="max 100000")
    assert quota_cpus(tmp_path, V2) == 1.5
    write(tmp_path / "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(tmp_path / "cpu" / "pod", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert quota_cpus(tmp_path, V1) == 0.5
    write(tmp_path / "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="0")
    assert quota_cpus(tmp_path, V1) is None
    assert usable_cpus() > 0


def test_room_is_what_the_tightest_group_leaves_with_its_page_cache(tmp_path):
    stat = "anon 900000\nactive_file 10000\ninactive_file 20000"
    write(tmp_path, memory__max="max", memory__current="950000", memory__stat=stat)
    box = tmp_path / "pod" / "box"
    write(box, memory__max="1000000", memory__current="950000", memory__stat=stat)
    assert room_bytes(tmp_path, V2) == 80_000


def test_room_counts_the_page_cache_of_version_1_once(tmp_path):
    stat = "active_file 1\ninactive_file 2\ntotal_active_file 10000\ntotal_inactive_file 90000"
    write(
        tmp_path / "memory" / "pod" / "box",
        memory__limit_in_bytes="1000000",
        memory__usage_in_bytes="900000",
        memory__stat=stat,
    )
    assert room_bytes(tmp_path, V1) == 200_000


@pytest.mark.parametrize("used", ["", "1e6", "2000000"])
def test_unreadable_figures_are_passed_over_and_none_is_negative(tmp_path, used):
    write(tmp_path / "pod" / "box", memory__max="1000000", memory__current=used)
    room = room_bytes(tmp_path, V2)
    assert room == 0 if used == "2000000" else room != 0
