"""`info`: which backends there are, whether they can run here, and what each can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from sagellm.core.protocols import BackendSpec, BackendUnavailableError
from sagellm.core.protocols.host_limits import quota_cpus, usable_cpus
from sagellm.core.protocols.selection import backend_registry
from sagellm.core.protocols.show import print_line, print_table

__all__ = ["collect_info", "print_info"]


def collect_info() -> dict[str, Any]:  # Any: JSON
    """Everything that `info` prints."""
    registry = backend_registry()
    backends = []
    for name in registry.names():
        try:
            backends.append(_backend(registry.load(name)))
        except BackendUnavailableError as e:
            backends.append({"name": name, "available": False, "reason": str(e)})
    backends.sort(key=lambda b: (not b["available"], -b.get("priority", -99), b["name"]))
    return {
        "host": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "usable_cpus": usable_cpus(),
            "cpu_quota": quota_cpus(),
            "cuda_devices": torch.cuda.device_count(),
        },
        "packages": _packages(),
        "backends": backends,
    }


def _packages() -> dict[str, str]:
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("sagellm-"):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _backend(spec: BackendSpec) -> dict[str, Any]:
    probe = spec.probe()
    can = spec.capabilities
    return {
        "name": spec.name,
        "available": probe.available,
        "reason": probe.reason,
        "priority": spec.priority,
        "device_types": list(spec.device_types),
        "vendor": spec.vendor,
        "install_hint": spec.install_hint,
        "verified_on_hardware": can.verified_on_hardware,
        "engines": _engines(spec) if probe.available else {},
        "capabilities": {
            "ops": sorted(can.ops),
            "reduce_ops": sorted(can.reduce_ops),
            "dtypes": sorted(can.dtypes),
            "move_dtypes": sorted(can.move_dtypes) or ["any"],
            "uneven": can.uneven,
            "async_op": can.async_op,
            "graph_capture": can.graph_capture,
            "symmetric_memory": can.symmetric_memory,
        },
        "lowering": [{"when": r.when, "rule": r.rule, "why": r.why} for r in spec.lowering],
        "options": dict(spec.options),
    }


def _engines(spec: BackendSpec) -> dict[str, str]:
    """What a backend's class says of its engines in `engines()`: name and state, if it has any."""
    try:
        tell = getattr(spec.load(), "engines", None)
        return {} if tell is None else {str(k): str(v) for k, v in tell().items()}
    except Exception as e:  # a plug-in may fail in any way it likes; `doctor` looks closer
        return {"?": f"{type(e).__name__}: {e}"}


def print_info(info: dict[str, Any], backend: str | None) -> None:
    """Print it for people; with a backend, its capability table too."""
    host = info["host"]
    quota = "none" if host["cpu_quota"] is None else f"{host['cpu_quota']:g}"
    print_line(f"{host['system']}, Python {host['python']}, torch {host['torch']}")
    print_line(
        f"{host['cpus']} CPUs, {host['usable_cpus']:g} usable (cgroup quota: {quota}), "
        f"{host['cuda_devices']} CUDA devices"
    )
    print_line(", ".join(f"{name} {version}" for name, version in info["packages"].items()))
    print_line()
    rows = [
        [
            b["name"],
            "yes" if b["available"] else "no",
            ",".join(b.get("device_types", [])),
            str(b.get("priority", "")),
            ", ".join(f"{k}: {v}" for k, v in b.get("engines", {}).items()) or "-",
            "yes" if b.get("verified_on_hardware") else "no",
            b["reason"],
        ]
        for b in info["backends"]
    ]
    columns = ["backend", "runs here", "devices", "priority", "engines", "verified", "why"]
    print_table("Backends", columns, rows, right=["priority"])
    for b in info["backends"]:
        if backend is not None and b["name"] == backend and "capabilities" in b:
            can = b["capabilities"]
            cap = [[key, _words(value)] for key, value in can.items()]
            print_table(f"What {backend} can do", ["what", "which"], cap)
            rules = [[r["when"], r["rule"], r["why"]] for r in b["lowering"]]
            print_table(f"What {backend} cannot, and what is done", ["for", "rule", "why"], rules)


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )
