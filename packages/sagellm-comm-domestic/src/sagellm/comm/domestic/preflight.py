"""Settings that make a vendor's library hang or fail much later, found before it is started.

Variables are read and never written: a library that has been loaded has read its own already.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .vendor_spec import VendorSpec
from .vendors import find_vendor

__all__ = ["Finding", "local_addresses", "preflight"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One setting that will not work, or will surprise.

    Attributes:
        severity: An `error` cannot work; a `warning` may.
        variable: The environment variable.
        message: What is wrong and the next step, one sentence.

    """

    severity: Literal["error", "warning"]
    variable: str
    message: str


def preflight(
    name: str,
    environ: Mapping[str, str] | None = None,
    *,
    addresses: Callable[[], Mapping[str, tuple[str, ...]] | None] | None = None,
) -> tuple[Finding, ...]:
    """What is wrong with the environment for a vendor's library; empty when nothing was found.

    Pure but for asking the host's own interfaces. Values that differ between ranks cannot be
    seen from one.

    Args:
        name: Backend name or alias.
        environ: Environment; None is this process's.
        addresses: Gives interface names with their addresses, None when they cannot be known.

    Raises:
        ConfigError: No such backend.

    """
    row = find_vendor(name)
    env = os.environ if environ is None else environ
    found = _visible_devices(row, env)
    if row.backend == "hccl":
        interfaces = (addresses or local_addresses)()
        found += _hccl_interface(env, interfaces)
        found += _rank_table(env)
        found += _hccl_timeouts(env)
    if row.backend == "cncl" and env.get("CNCL_ASYNC_ERROR_HANDLING", "0") == "0":
        text = "is off unless set: a lost rank is noticed by our deadline alone; set it to 1"
        found.append(Finding("warning", "CNCL_ASYNC_ERROR_HANDLING", text))
    return tuple(found)


def _visible_devices(row: VendorSpec, env: Mapping[str, str]) -> list[Finding]:
    found: list[Finding] = []
    given = {name: env[name].replace(" ", "") for name in row.visible_env if name in env}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        wins = next(iter(given))
        text = f"{listed} contradict each other; {wins} wins, make them equal"
        found.append(Finding("error", wins, text))
    for name, value in given.items():
        parts = value.split(",")
        if value == "":
            found.append(Finding("warning", name, "is empty and hides every device; unset it"))
        elif len(set(parts)) != len(parts):
            found.append(Finding("error", name, f"{value} names a device twice"))
    return found


def _hccl_interface(
    env: Mapping[str, str], interfaces: Mapping[str, tuple[str, ...]] | None
) -> list[Finding]:
    found: list[Finding] = []
    wanted = env.get("HCCL_IF_IP")
    if wanted is not None:
        try:
            parsed = str(ipaddress.ip_address(wanted.strip()))
        except ValueError:
            return [Finding("error", "HCCL_IF_IP", f"{wanted!r} is not an IP address")]
        have = {a for group in (interfaces or {}).values() for a in group}
        # IPv6 addresses of interfaces are not listed everywhere.
        if interfaces is not None and ":" not in parsed and parsed not in have:
            text = f"{parsed} is on no local interface ({', '.join(sorted(have)) or 'none known'})"
            found.append(Finding("error", "HCCL_IF_IP", f"{text}; HCCL fails at its first call"))
    names = env.get("HCCL_SOCKET_IFNAME", "")
    if names and interfaces is not None and names[0] not in "=^":
        prefixes = [n.strip() for n in names.split(",") if n.strip()]
        if not any(i.startswith(p) for i in interfaces for p in prefixes):
            text = f"{names!r} matches none of the interfaces {', '.join(sorted(interfaces))}"
            found.append(Finding("error", "HCCL_SOCKET_IFNAME", text))
    return found


def _rank_table(env: Mapping[str, str]) -> list[Finding]:
    table = env.get("RANK_TABLE_FILE")
    if not table:
        return []
    if not os.path.isabs(table):
        text = f"{table!r} is relative; HCCL needs an absolute path"
        return [Finding("error", "RANK_TABLE_FILE", text)]
    if not os.path.isfile(table):
        return [Finding("error", "RANK_TABLE_FILE", f"{table!r} is no file on this host")]
    return []


def _hccl_timeouts(env: Mapping[str, str]) -> list[Finding]:
    found: list[Finding] = []
    limits: dict[str, int] = {}
    for name, default in (("HCCL_CONNECT_TIMEOUT", 120), ("HCCL_EXEC_TIMEOUT", 1800)):
        text = env.get(name, str(default)).strip()
        if not text.isdigit():
            found.append(Finding("error", name, f"{text!r} is no whole number of seconds"))
        else:
            limits[name] = int(text)
    if limits.get("HCCL_EXEC_TIMEOUT") == 0:
        text = "0 does not mean for ever in every release; give seconds"
        found.append(Finding("warning", "HCCL_EXEC_TIMEOUT", text))
    connect = limits.get("HCCL_CONNECT_TIMEOUT")
    if "HCCL_CONNECT_TIMEOUT" in env and connect is not None and connect < 120:
        text = f"{connect} s is below HCCL's own 120 s; large jobs need more, equal on every rank"
        found.append(Finding("warning", "HCCL_CONNECT_TIMEOUT", text))
    return found


def local_addresses() -> dict[str, tuple[str, ...]] | None:
    """IPv4 addresses of this host by interface; None where the kernel is not asked this way."""
    try:
        import fcntl
    except ImportError:
        return None
    found: dict[str, tuple[str, ...]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asker.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
            except OSError:
                found[name] = ()
                continue
            found[name] = (socket.inet_ntoa(answer[20:24]),)
    return found
