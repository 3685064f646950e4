"""`doctor`: whether channels can work on this host, and what a running node waits for."""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from sagellm.core.protocols import BackendUnavailableError, CommError
from sagellm.core.protocols.checkup import (
    Finding,
    check_environment,
    check_memfd,
    check_open_files,
    check_settings,
    check_shared_memory,
    check_sockets,
    print_findings,
)
from sagellm.core.protocols.ports import SagePorts
from sagellm.core.protocols.show import bytes_text, print_json, print_line, print_table

from .node import add_node_arguments, open_channel

__all__ = ["add_doctor", "doctor", "examine"]

_BUFFER_BYTES = 1 << 20


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("--address", help="host:port of a running node to ask what it waits for")
    parser.add_argument("--peer", type=int, default=0, help="that node's id, default 0")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="how long to wait for it")
    add_node_arguments(parser, None)


def doctor(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    if arguments.address is None:
        return print_findings(examine(), as_json=arguments.json)
    with open_channel(arguments) as channel:
        report = channel.inspect(arguments.peer, arguments.timeout_s)
    if arguments.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def examine() -> list[Finding]:
    """Every check, in order; none changes anything that lasts."""
    return [
        *check_environment(),
        *check_settings(os.environ),
        *check_sockets(),
        *_ports(),
        *_socket_buffers(),
        *check_memfd(),
        *check_shared_memory(),
        *_locked_memory(),
        *_reading_processes(),
        *check_open_files(),
        *_transports(),
    ]


def _ports() -> list[Finding]:
    try:
        with SagePorts().listen("kv_transfer") as listener:
            host, port = listener.getsockname()[:2]
            return [Finding("ports", "ok", f"could listen on {host}:{port}")]
    except CommError as e:
        step = "free the port, or configure another host or range for the section `ports`"
        return [Finding("ports", "error", str(e), step)]


def _socket_buffers() -> list[Finding]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        # Linux answers with twice what it gave
        sizes = [
            sock.getsockopt(socket.SOL_SOCKET, option) // (2 if sys.platform == "linux" else 1)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF)
        ]
    text = f"{bytes_text(sizes[0])} to send, {bytes_text(sizes[1])} to receive"
    if min(sizes) < _BUFFER_BYTES:
        step = f"sysctl -w net.core.wmem_max={_BUFFER_BYTES} net.core.rmem_max={_BUFFER_BYTES}"
        return [Finding("socket buffers", "warning", f"the kernel allows {text}", step)]
    return [Finding("socket buffers", "ok", text)]


def _locked_memory() -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Finding("locked memory", "ok", "no limit")]
    text = f"{bytes_text(soft)} may be locked; enough here, RDMA and pinned pools want more"
    return [Finding("locked memory", "note", text, "ulimit -l unlimited, where such are used")]


def _reading_processes() -> list[Finding]:
    """Whether another process of this user may be read, as shm does with pools not its own."""
    name = "process_vm_readv"
    if sys.platform != "linux":
        return [Finding(name, "note", f"not on {sys.platform}")]
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    yama = scope.read_text().strip() if scope.exists() else None
    detail = "no yama" if yama is None else f"yama's ptrace_scope is {yama}"
    if error := _read_of_child():
        step = (
            "shm then serves only pools of `allocate`, and other pools go by tcp; or sysctl -w "
            "kernel.yama.ptrace_scope=0, docker run --cap-add=SYS_PTRACE"
        )
        return [Finding(name, "note", f"{error} ({detail})", step)]
    if yama is not None and yama != "0":
        step = "a child could be read, but a process that is none of ours cannot without it at 0"
        return [Finding(name, "note", detail, step)]
    return [Finding(name, "ok", f"another process of this user was read ({detail})")]


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _read_of_child() -> str:
    """Read a byte of a child's memory; why it could not be read, empty when it could."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return "this C library has no process_vm_readv"
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None, "it is a pipe"
        child.stdout.readline()  # now it is this program and no longer ours
        try:
            first = Path(f"/proc/{child.pid}/maps").read_text().partition("-")[0]
        except OSError as e:
            return str(e.strerror)
        into = ctypes.create_string_buffer(1)
        local, remote = _Iovec(ctypes.addressof(into), 1), _Iovec(int(first, 16), 1)
        got = libc.process_vm_readv(
            child.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, ctypes.c_ulong(0)
        )
        return "" if got == 1 else os.strerror(ctypes.get_errno())


def _transports() -> list[Finding]:
    from sagellm.comm.kv_transfer.transports import load_spec, transport_names

    found = []
    for name in transport_names():
        label = f"transport {name}"
        try:
            spec = load_spec(name)
        except BackendUnavailableError as e:
            found.append(Finding(label, "error", str(e), "reinstall the package that brings it"))
            continue
        probe = spec.probe()
        found.append(Finding(label, "ok" if probe.available else "note", probe.reason))
    return found


def _print_report(report: dict[str, Any]) -> None:  # Any: JSON of a peer
    stats = report["stats"]
    print_line(f"node {report['node_id']} at {report['address']}")
    leases = f", leased by {', '.join(report['pool_leases'])}" if report["pool_leases"] else ""
    print_line(f"pool: {report['pool']}{leases}" if report["pool"] else "no pool")
    print_line(
        f"buffers for transfers without destination: {bytes_text(report['bounce_bytes'])} of "
        f"{bytes_text(report['bounce_limit_bytes'])}"
    )
    print_line(
        f"ended: {stats['transfers']}; failures: {stats['failures']}; "
        f"refused connections: {stats['rejected_connections']}"
    )
    _print_rows(
        ["peer", "address", "path", "direction", "unread bytes"],
        [
            [k["peer"], k["address"], k["path"], k["direction"], k["unread_bytes"]]
            for k in report["links"]
        ],
        "no peer is connected",
    )
    _print_rows(
        ["transfer", "kind", "phase", "waits for", "blocks", "bytes", "deadline s"],
        [
            [
                f"{t['id']}/{t['attempt']}", t["kind"], t["phase"], t["why"], _held(t),
                f"{t['bytes_done']} of {t['bytes_total']}", f"{t['left_s']:.1f}",
            ]
            for t in report["transfers"]
        ],
        "nothing is in flight",
    )  # fmt: skip
    for w in report["waiting"]:
        print_line(f"node {w['peer']} waits: its {w['what']} of {w['id']}/{w['attempt']}")
    for name, count in report["left_out"].items():
        print_line(f"and {count} {name} more")


def _print_rows(columns: list[str], rows: list[list[Any]], none: str) -> None:
    if rows:
        print_table("", columns, [[str(cell) for cell in row] for row in rows])
    else:
        print_line(none)


def _held(transfer: dict[str, Any]) -> str:
    parts = []
    for group, count in transfer["counts"].items():
        ids = ", ".join(map(str, transfer["block_ids"][group][:8]))
        parts.append(f"{count} of {group}: {ids}{', …' if count > 8 else ''}")
    return f"{transfer['blocks']}, {'; '.join(parts)}" if parts else "none of a pool"
