"""What a rank says of its host before anybody believes it, and how many cores it may use."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["address_space", "cgroup_folders", "cpu_claim", "host_claim", "machine", "polls_for", "usable_cpus"]

_CGROUP = Path("/sys/fs/cgroup")


def machine() -> str:
    """The instruction set, as the kernel names it: `x86_64`, `aarch64`."""
    return platform.machine()


def host_claim() -> dict[str, object]:
    """Boot id, network namespace and user: ranks of one host have all of them in common.

    The names of UNIX sockets are per network namespace: ranks in others cannot meet there.
    """
    namespace = os.stat("/proc/self/ns/net")
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "net": f"{namespace.st_dev}:{namespace.st_ino}",
        "uid": os.getuid(),
        "machine": machine(),
    }


def polls_for(ranks: int, cpus: int) -> int:
    """How often to look at a flag before yielding the core to whoever has to set it."""
    return 20000 if ranks <= cpus else 50


def cpu_claim() -> dict[str, object]:
    """Cores this process may run on, and how many of them at once by its cgroups' quotas."""
    folders = cgroup_folders()
    return {
        "cpus": sorted(os.sched_getaffinity(0)),
        "quota": min(_quotas(folders), default=None),
        "cgroup": str(folders[0]) if folders else "",
    }


def usable_cpus(claims: Sequence[Mapping[str, Any]]) -> int:  # Any: JSON
    """Cores that ranks with these claims may use at once, together."""
    cores = {cpu for claim in claims for cpu in claim["cpus"]}
    quotas = {claim["cgroup"]: claim["quota"] for claim in claims}
    if None in quotas.values():
        return len(cores)
    return max(1, min(len(cores), int(sum(quotas.values()))))


def address_space() -> int | None:
    """The limit of this process's address space in bytes, None without one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _quotas(folders: Sequence[Path]) -> list[float]:
    """Cores granted by this process's cgroup and those above it, v2 and v1."""
    found = []
    for folder in folders:
        text = _read(folder / "cpu.max").split()
        if len(text) == 2 and text[0] != "max":
            found.append(int(text[0]) / int(text[1]))
    quota, period = _read(_CGROUP / "cpu/cpu.cfs_quota_us"), _read(_CGROUP / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        found.append(int(quota) / int(period))
    return found


def cgroup_folders() -> list[Path]:
    """Folders of this process's cgroup (v2) and of those above it, the innermost first."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            inner = _CGROUP / line[3:].lstrip("/")
            inside = [inner, *inner.parents]
            return [p for p in inside if p == _CGROUP or _CGROUP in p.parents]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
