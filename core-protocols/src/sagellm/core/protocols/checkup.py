"""Checks of this host that the command lines of several packages make: what is so, what to do.

Each returns its findings and changes nothing that lasts.
"""

from __future__ import annotations

import mmap
import os
import resource
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from .config import load_all
from .doctor import diagnose
from .errors import ConfigError
from .show import bytes_text, print_json, print_line, print_table

__all__ = [
    "Finding",
    "check_environment",
    "check_memfd",
    "check_open_files",
    "check_settings",
    "check_shared_memory",
    "check_sockets",
    "print_findings",
]

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


def check_environment() -> list[Finding]:
    """Whether other distributions hide or double these packages."""
    found = [
        Finding(f.kind, "error" if f.severity == "error" else "warning", f.message, f.next_step)
        for f in diagnose()
    ]
    return found or [Finding("installation", "ok", "nothing hides or doubles these packages")]


def check_settings(environ: Mapping[str, str]) -> list[Finding]:
    """Whether variables and files of the configuration can be read."""
    try:
        load_all(environ)
    except ConfigError as e:
        return [Finding("settings", "error", str(e), "correct or unset what it names")]
    return [Finding("settings", "ok", "every variable and file of SAGELLM_COMM_ can be read")]


def check_shared_memory() -> list[Finding]:
    """Room in /dev/shm."""
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


def check_memfd() -> list[Finding]:
    """Whether memory files can be made and filled."""
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


def check_sockets() -> list[Finding]:
    """Whether loopback and abstract UNIX sockets work."""
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


def check_open_files() -> list[Finding]:
    """The limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        text = f"{soft} open files are allowed; every pair of ranks needs sockets"
        return [Finding("open files", "warning", text, "ulimit -n 4096")]
    return [Finding("open files", "ok", f"{soft} allowed")]


def print_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print them; the exit code, 1 when something cannot work."""
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        rows = [[f.status, f.name, f.detail, f.next_step] for f in findings]
        print_table("", ["", "what", "how it is", "next step"], rows)
        counts = {s: sum(f.status == s for f in findings) for s in ("error", "warning")}
        print_line(f"{counts['error']} errors, {counts['warning']} warnings")
    return 1 if any(f.status == "error" for f in findings) else 0
