"""`doctor`: whether this host can run each backend, and what to do where it cannot."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

from sagellm.comm.collective_ops.factory import create_comm_backend
from sagellm.core.protocols import BackendUnavailableError, CommError
from sagellm.core.protocols.checkup import (
    Finding,
    check_environment,
    check_memfd,
    check_open_files,
    check_settings,
    check_shared_memory,
    check_sockets,
)
from sagellm.core.protocols.host_limits import quota_cpus, usable_cpus
from sagellm.core.protocols.selection import backend_registry

from .launch import is_launched

__all__ = ["examine"]


def examine(ranks: int | None, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Every check, in order; none changes anything that lasts.

    Args:
        ranks: How many ranks are planned on this host; None takes LOCAL_WORLD_SIZE, else 2.
        environ: Environment variables; None takes the process's.

    """
    environ = os.environ if environ is None else environ
    planned = ranks or int(environ.get("LOCAL_WORLD_SIZE", "2"))
    checks: list[Callable[[], list[Finding]]] = [
        check_environment,
        lambda: check_settings(environ),
        lambda: _cpus(planned),
        check_shared_memory,
        check_memfd,
        check_sockets,
        lambda: _interface(environ),
        lambda: _rendezvous(environ),
        check_open_files,
        _backends,
    ]
    return [finding for check in checks for finding in check()]


def _cpus(ranks: int) -> list[Finding]:
    usable = usable_cpus()
    quota = quota_cpus()
    detail = f"{usable:g} usable CPUs for {ranks} ranks"
    if quota is not None:
        detail += f" (cgroup quota {quota:g} of {os.cpu_count()})"
    if ranks > usable:
        return [
            Finding(
                "cpus",
                "warning",
                f"{detail}: ranks will take turns, and a waiting one costs the others their time",
                f"start at most {int(usable) or 1} ranks, or widen the affinity mask or the quota",
            )
        ]
    return [Finding("cpus", "ok", detail)]


def _interface(environ: Mapping[str, str]) -> list[Finding]:
    names = [name for _, name in socket.if_nameindex()]
    wanted = environ.get("GLOO_SOCKET_IFNAME", "")
    if wanted:
        missing = [name for name in wanted.split(",") if name not in names]
        if missing:
            step = f"set GLOO_SOCKET_IFNAME to one of {', '.join(names)}"
            text = f"GLOO_SOCKET_IFNAME names {', '.join(missing)}, which is not there"
            return [Finding("gloo interface", "error", text, step)]
        note = "; ranks on other hosts cannot reach it" if wanted == "lo" else ""
        return [Finding("gloo interface", "ok", f"GLOO_SOCKET_IFNAME is {wanted}{note}")]
    host = socket.gethostname()
    step = f"export GLOO_SOCKET_IFNAME= one of {', '.join(names)}; lo for one host"
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as e:
        return [Finding("gloo interface", "warning", f"host name {host!r}: {e}", step)]
    family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((str(address), 0))
    except OSError:
        text = f"host name {host!r} is {address}, which is no address of this host"
        return [Finding("gloo interface", "warning", text, step)]
    return [Finding("gloo interface", "ok", f"host name {host!r} is {address}, an address here")]


def _rendezvous(environ: Mapping[str, str]) -> list[Finding]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if environ.get(name)]
    if not present:
        return [Finding("rendezvous", "note", "no RANK: a world of one, or torchrun sets it later")]
    missing = [name for name in names if name not in present]
    if missing:
        text = f"{', '.join(present)} set but {', '.join(missing)} missing"
        return [Finding("rendezvous", "error", text, "start with torchrun, or unset all of them")]
    where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    try:
        socket.getaddrinfo(environ["MASTER_ADDR"], environ["MASTER_PORT"])
    except OSError as e:
        step = "correct MASTER_ADDR; every host must be able to resolve it"
        return [Finding("rendezvous", "error", f"{where}: {e}", step)]
    text = f"rank {environ['RANK']} of {environ['WORLD_SIZE']} at {where}"
    return [Finding("rendezvous", "ok", text)]


def _backends() -> list[Finding]:
    registry = backend_registry()
    found = []
    for name in registry.names():
        label = f"backend {name}"
        try:
            spec = registry.load(name)
        except BackendUnavailableError as e:
            found.append(Finding(label, "error", str(e), "reinstall the package that brings it"))
            continue
        probe = spec.probe()
        if not probe.available:
            found.append(Finding(label, "note", probe.reason, spec.install_hint))
            continue
        if is_launched() or "cpu" not in spec.device_types:
            found.append(Finding(label, "ok", probe.reason))
            continue
        try:
            create_comm_backend(name, timeout_s=10).close()
        except (CommError, RuntimeError, OSError) as e:
            text = f"its probe says yes ({probe.reason}), but: {type(e).__name__}: {e}"
            found.append(Finding(label, "error", text, spec.install_hint))
        else:
            found.append(Finding(label, "ok", f"{probe.reason}; a group of one was made"))
    return found
