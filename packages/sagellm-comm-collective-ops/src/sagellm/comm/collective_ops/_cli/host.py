"""Facts about this host that decide whether ranks run well on it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["quota_cpus", "usable_cpus"]

_ROOT = Path("/sys/fs/cgroup")


def quota_cpus(root: Path = _ROOT, cgroup: str | None = None) -> float | None:
    """CPUs that the tightest cgroup above this process allows; None without a quota."""
    if cgroup is None:
        cgroup = _own_cgroup()
    quotas = []
    folder = root / cgroup.lstrip("/")
    for level in (folder, *folder.parents):
        quotas.append(_quota_v2(level / "cpu.max"))
        if level == root:
            break
    quotas.append(_quota_v1(root / "cpu" / cgroup.lstrip("/")))
    quotas.append(_quota_v1(root / "cpu"))
    found = [q for q in quotas if q is not None]
    return min(found) if found else None


def usable_cpus() -> float:
    """CPUs that this process may use: its affinity mask and the cgroup quota, the smaller."""
    affinity = getattr(os, "sched_getaffinity", None)
    mask = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = quota_cpus()
    return float(mask) if quota is None else min(float(mask), quota)


def _own_cgroup() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            return path
    return "/"


def _quota_v2(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
