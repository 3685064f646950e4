"""What a rank says of its host before anybody believes it, and how many cores it may use."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagellm.core.protocols.host_limits import cgroup_folders, quota_cpus

__all__ = [
    "address_space",
    "cpu_claim",
    "host_claim",
    "machine",
    "polls_for",
    "usable_cpus",
]


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
    folders = cgroup_folders("cpu")
    return {
        "cpus": sorted(os.sched_getaffinity(0)),
        "quota": quota_cpus(),
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
