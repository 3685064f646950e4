"""`doctor`: whether this host can run each backend, and what to do where it cannot."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sagellm.comm.collective_ops.factory import create_comm_backend
from sagellm.core.protocols import BackendUnavailableError, CommError, ConfigError
from sagellm.core.protocols.config import load_all
from sagellm.core.protocols.doctor import diagnose
from sagellm.core.protocols.selection import backend_registry
from sagellm.core.protocols.show import bytes_text

from .host import quota_cpus, usable_cpus
from .launch import is_launched

__all__ = ["Finding", "examine"]

_SMALL_SHM = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        status: `ok`, `note` for what is absent but not needed, `warning`, or `error` when
            something cannot work.
        detail: What is so, with the values.
        next_step: What to do; empty where nothing is to be done.

    """

    name: str
    status: Literal["ok", "note", "warning", "error"]
    detail: str
    next_step: str = ""


def examine(ranks: int | None, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Every check, in order; none changes anything that lasts.

    Args:
        ranks: How many ranks are planned on this host; None takes LOCAL_WORLD_SIZE, else 2.
        environ: Environment variables; None takes the process's.

    """
    environ = os.environ if environ is None else environ
    planned = ranks or int(environ.get("LOCAL_WORLD_SIZE", "2"))
    checks: list[Callable[[], list[Finding]]] = [
        _environment,
        lambda: _settings(environ),
        lambda: _cpus(planned),
        _shared_memory,
        _memfd,
        _sockets,
        lambda: _interface(environ),
        lambda: _rendezvous(environ),
        _open_files,
        _backends,
    ]
    return [finding for check in checks for finding in check()]


def _environment() -> list[Finding]:
    found = [
        Finding(f.kind, "error" if f.severity == "error" else "warning", f.message, f.next_step)
        for f in diagnose()
    ]
    return found or [Finding("installation", "ok", "nothing hides or doubles these packages")]


def _settings(environ: Mapping[str, str]) -> list[Finding]:
    try:
        load_all(environ)
    except ConfigError as e:
        return [Finding("settings", "error", str(e), "correct or unset what it names")]
    return [Finding("settings", "ok", "every variable and file of SAGELLM_COMM_ can be read")]


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


def _shared_memory() -> list[Finding]:
    if sys.platform != "linux":
        return [Finding("/dev/shm", "note", f"not looked at on {sys.platform}")]
    try:
        facts = os.statvfs("/dev/shm")
    except OSError as e:
        return [Finding("/dev/shm", "note", f"{e.strerror}; memfd is used instead")]
    size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    detail = f"{bytes_text(free >> 20 << 20)} free of {bytes_text(size >> 20 << 20)}"
    if free < _SMALL_SHM:
        return [
            Finding(
                "/dev/shm",
                "warning",
                f"{detail}: torch's data loaders and other libraries need it",
                "docker run --shm-size=1g, or an emptyDir with medium: Memory at /dev/shm",
            )
        ]
    return [Finding("/dev/shm", "ok", detail)]


def _memfd() -> list[Finding]:
    make = getattr(os, "memfd_create", None)
    if make is None:
        return [Finding("memfd", "note", f"{sys.platform} has none; shared memory needs Linux")]
    try:
        descriptor = make("sagellm-doctor", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
            with mmap.mmap(descriptor, mmap.PAGESIZE) as page:
                page[:2] = b"ok"
        finally:
            os.close(descriptor)
    except OSError as e:
        step = (
            "raise the memory limit of the container, or allow memfd_create in its seccomp profile"
        )
        return [Finding("memfd", "error", f"cannot be made and filled: {e}", step)]
    return [Finding("memfd", "ok", "can be made, reserved and mapped")]


def _sockets() -> list[Finding]:
    found = []
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            with socket.create_connection(server.getsockname(), timeout=5):
                found.append(Finding("loopback", "ok", "127.0.0.1 takes connections"))
    except OSError as e:
        step = "ip link set lo up, inside of the network namespace or container"
        found.append(Finding("loopback", "error", f"127.0.0.1: {e}", step))
    if sys.platform == "linux":
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(f"\0sagellm-doctor-{os.getpid()}")
                found.append(Finding("unix sockets", "ok", "abstract names can be bound"))
        except OSError as e:
            step = "allow AF_UNIX sockets in the sandbox; shared memory is handed over through them"
            found.append(Finding("unix sockets", "error", str(e), step))
    return found


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


def _open_files() -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        text = f"{soft} open files are allowed; every pair of ranks needs sockets"
        return [Finding("open files", "warning", text, "ulimit -n 4096")]
    return [Finding("open files", "ok", f"{soft} allowed")]


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
