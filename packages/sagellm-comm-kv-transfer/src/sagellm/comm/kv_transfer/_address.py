"""The address that peers are told: one that they can reach."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping

from sagellm.core.protocols import ConfigError

from .transports.tcp import ANY_HOST, parse_address

__all__ = ["advertised_host", "is_loopback"]

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses of nobody (RFC 5737, RFC 3849): the way to them is the way out of this host."""


def is_loopback(host: str) -> bool:
    """Whether a host leads every machine to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".").split(".")[-1] in ("localhost", "localdomain")


def advertised_host(
    host: str,
    advertise: str | None,
    peers: Iterable[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> str:
    """The host that peers are told.

    Loopback is told only to peers that share the host: by a channel that listens on nothing
    else, in a job that is known to have no other host.

    Args:
        host: Address to listen on.
        advertise: The caller's choice; None takes `host`, or for a wildcard the address of the
            interface that leads to the peers.
        peers: Known addresses of peers, `host:port`.
        environment: Where torch's variables are looked up.

    Raises:
        ConfigError: There is no such address, or the choice is one that nobody else can reach.

    """
    if advertise is None and host not in ANY_HOST:
        advertise = host
    if advertise is not None:
        if not is_loopback(advertise):
            return advertise
        if not is_loopback(host):
            raise ConfigError(
                f"advertise={advertise!r} leads every other host to itself, and host={host!r} is "
                "there for other hosts: leave advertise out, or listen on loopback"
            )
        ranks, here = (environment.get(n, "") for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if ranks.isdecimal() and here.isdecimal() and int(here) < int(ranks):
            raise ConfigError(
                f"{here} of {ranks} ranks are on this host, and the others cannot reach "
                f"host={host!r}: give host='0.0.0.0', or the address of the interface to use"
            )
        return advertise
    targets = [parse_address(p)[0] for p in peers]
    if master := environment.get("MASTER_ADDR"):
        targets.append(master)
    for target in (*targets, *_ELSEWHERE):
        found = _address_towards(target, wanted=socket.AF_INET if host == "0.0.0.0" else None)
        if found is not None and not is_loopback(found):
            return found
    raise ConfigError(
        f"host={host!r} listens everywhere, and no interface leads to another host: "
        "give advertise=, the name that peers reach this one by, or listen on loopback"
    )


def _address_towards(target: str, wanted: int | None) -> str | None:
    """Ours on the interface that leads there; nothing is sent."""
    try:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        if wanted is not None and family != wanted:
            continue
        try:
            with socket.socket(family, kind, protocol) as sock:
                sock.connect(address)
                return str(sock.getsockname()[0])
        except OSError:
            continue
    return None
