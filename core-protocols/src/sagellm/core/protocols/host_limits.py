"""What this process may use of its host: CPUs and memory, by its control groups (v1 and v2)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["cgroup_folders", "quota_cpus", "room_bytes", "usable_cpus"]

_ROOT = Path("/sys/fs/cgroup")
_PAGE_CACHE = {"active_file", "inactive_file", "total_active_file", "total_inactive_file"}


def cgroup_folders(
    controller: str, root: Path = _ROOT, membership: str | None = None
) -> list[Path]:
    """Folders of this process's control group and of those above it, the innermost first.

    Args:
        controller: `cpu` or `memory`; version 2 has one hierarchy for both, version 1 one for each.
        root: Where the hierarchies are mounted.
        membership: The text of `/proc/self/cgroup`; read when None.

    Returns:
        Folders that need not exist: a container may not see the group it is in.

    """
    if membership is None:
        membership = _read(Path("/proc/self/cgroup"))
    found: list[Path] = []
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        inner = base / path.lstrip("/")
        found += [p for p in (inner, *inner.parents) if p == base or base in p.parents]
    return found


def quota_cpus(root: Path = _ROOT, membership: str | None = None) -> float | None:
    """CPUs at once that the tightest control group allows; None without a quota."""
    found = []
    for folder in cgroup_folders("cpu", root, membership):
        texts = (
            _read(folder / "cpu.max").split(),
            [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")],
        )
        for text in texts:
            with contextlib.suppress(ValueError, ZeroDivisionError):  # "max" and "" are no quota
                quota, period = map(int, text)
                if quota > 0:  # version 1 writes -1 for none
                    found.append(quota / period)
    return min(found, default=None)


def usable_cpus() -> float:
    """CPUs that this process may use: its affinity mask and its quota, the smaller."""
    affinity = getattr(os, "sched_getaffinity", None)
    mask = float(len(affinity(0)) if affinity is not None else os.cpu_count() or 1)
    quota = quota_cpus()
    return mask if quota is None else min(mask, quota)


def room_bytes(root: Path = _ROOT, membership: str | None = None) -> int | None:
    """Bytes of memory that this process may still get: the machine's and its groups'.

    Page cache counts as room: the kernel gives it up first. None where nothing tells.
    """
    found: list[int] = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for folder in cgroup_folders("memory", root, membership):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(ValueError):  # "max" and "" are no limit
                left = int(_read(folder / limit)) - int(_read(folder / used))
                found.append(max(0, left + _page_cache_bytes(folder)))
    return min(found, default=None)


def _page_cache_bytes(folder: Path) -> int:
    rows = (line.split() for line in _read(folder / "memory.stat").splitlines())
    entries = {name: int(value) for name, value in rows}
    total = {name: n for name, n in entries.items() if name in _PAGE_CACHE}
    # Version 1 tells a group's own pages and, with `total_`, those of the groups below it too.
    below = {name: n for name, n in total.items() if name.startswith("total_")}
    return sum((below or total).values())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
