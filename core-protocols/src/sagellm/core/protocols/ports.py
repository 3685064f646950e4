"""Every port of the project: configured, taken from a range, or chosen by the kernel.

No module names a port of its own. A listener has a *name* (`kv_transfer`, `store`), and its
port is, in this order: the one configured for the name, the next free one of the configured
range, or whichever the kernel gives.
"""

from __future__ import annotations

import errno
import re
import socket
import threading
from collections.abc import Iterator
from typing import Annotated

import pydantic

from .config import Settings
from .errors import ConfigError, ResourceError

__all__ = ["PortSettings", "Reservation", "SagePorts"]

_RANGE_VARIABLE = "SAGELLM_COMM_PORTS_RANGE"


def _parse_range(value: object) -> tuple[int, int] | None:
    """Inclusive bounds of `30000-30100`, or of a pair."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value)
        if match is None:
            raise ValueError("a port range is written first-last, such as 30000-30100")
        value = (int(match[1]), int(match[2]))
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise ValueError("a port range is a pair (first, last), or the text first-last")
    first, last = value
    if not (isinstance(first, int) and isinstance(last, int) and 1 <= first <= last <= 65535):
        raise ValueError(f"ports {first}-{last} are not a rising range within 1-65535")
    return first, last


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of a port: use a-z, 0-9 and _, such as kv_transfer")
    return name


class PortSettings(Settings, package="ports"):
    """Section `ports` of the configuration.

    Attributes:
        range: Ports that may be listened on, `first-last` with both ends; None lets the kernel
            choose.
        host: Address to listen on.
        fixed: Port per name, for those that a firewall or a peer must know beforehand.

    """

    range: Annotated[tuple[int, int] | None, pydantic.BeforeValidator(_parse_range)] = None
    host: str = "127.0.0.1"
    fixed: dict[
        Annotated[str, pydantic.AfterValidator(_check_name)],
        Annotated[int, pydantic.Field(ge=1, le=65535)],
    ] = pydantic.Field(default_factory=dict)


class Reservation:
    """A port number that nobody else can bind until `release`.

    For libraries that want a number and bind it themselves. Between `release` and their bind
    another process may take the port: release at the last moment, be ready to try again, and
    prefer `SagePorts.listen` wherever a library accepts a listening socket.
    """

    def __init__(self, name: str, held: socket.socket) -> None:
        self.name = name
        self.host: str = held.getsockname()[0]
        self.port: int = held.getsockname()[1]
        self._held = held

    def release(self) -> int:
        """Let go of the port and return its number. Safe more than once."""
        self._held.close()
        return self.port

    def __enter__(self) -> Reservation:
        """Return itself; the port is let go at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of the port."""
        self.release()


class SagePorts:
    """Hands out listening sockets and port numbers. Thread-safe.

    Args:
        range: Ports to use, `first-last` or a pair with both ends; None takes the configured
            range, and without one the kernel chooses.
        host: Address to listen on; None takes the configured one, loopback by default.
        settings: Configuration; None reads it now from environment and file.

    Raises:
        ConfigError: A range or the configuration cannot be used.

    >>> with SagePorts().listen("example") as listener:
    ...     listener.getsockname()[1] > 0
    True
    """

    def __init__(
        self,
        range: str | tuple[int, int] | None = None,
        host: str | None = None,
        *,
        settings: PortSettings | None = None,
    ) -> None:
        settings = PortSettings.load() if settings is None else settings
        try:
            self.range = _parse_range(range) or settings.range
        except ValueError as e:
            raise ConfigError(f"range = {range!r}: {e}") from None
        self.host = settings.host if host is None else host
        self._fixed = dict(settings.fixed)
        self._lock = threading.Lock()
        self._next = self.range[0] if self.range else 0

    def listen(self, name: str, *, host: str | None = None, backlog: int = 128) -> socket.socket:
        """A listening TCP socket for `name`; the caller closes it.

        Args:
            name: What listens, such as `kv_transfer`; configuration may fix its port.
            host: Address to listen on, IPv4 or IPv6; None is this object's.
            backlog: Connections that may wait to be accepted.

        Raises:
            ResourceError: The port is in use, or every port of the range is.
            ConfigError: The address or port cannot be bound by this process, or the name is odd.

        """
        return self._open(name, self.host if host is None else host, backlog)

    def reserve(self, name: str, *, host: str | None = None) -> Reservation:
        """A port number for `name`, held by a bound socket until `release`.

        Raises:
            ResourceError: As `listen`.
            ConfigError: As `listen`.

        """
        return Reservation(name, self._open(name, self.host if host is None else host, None))

    def _open(self, name: str, host: str, backlog: int | None) -> socket.socket:
        try:
            _check_name(name)
        except ValueError as e:
            raise ConfigError(str(e)) from None
        variable = f"SAGELLM_COMM_PORTS_FIXED__{name.upper()}"
        if name in self._fixed:
            port = self._fixed[name]
            opened = _bind(host, port, backlog, name, variable)
            if opened is None:
                raise ResourceError(
                    f"port {port} on {host}, configured for {name}, is in use: stop what "
                    f"listens there, or change {variable} (ports > fixed > {name})"
                )
            return opened
        for port in self._candidates():
            opened = _bind(host, port, backlog, name, _RANGE_VARIABLE)
            if opened is not None:
                return opened
        which = f"{self.range[0]}-{self.range[1]}" if self.range else "that the kernel gives"
        raise ResourceError(
            f"no port for {name} on {host}: every port {which} is in use; widen "
            f"{_RANGE_VARIABLE} (ports > range), or set {variable}"
        )

    def _candidates(self) -> Iterator[int]:
        if self.range is None:
            yield 0
            return
        first, last = self.range
        count = last - first + 1
        with self._lock:
            start = self._next - first
            self._next = first + (start + 1) % count
        for offset in range(count):
            yield first + (start + offset) % count


def _bind(
    host: str, port: int, backlog: int | None, name: str, setting: str
) -> socket.socket | None:
    """A bound socket, listening unless `backlog` is None; None when the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        if backlog is not None:
            # A listener may follow one whose connections are still in TIME_WAIT. A reservation
            # must not: with this option others could bind beside it.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        if backlog is not None:
            opened.listen(backlog)
    except OSError as e:
        opened.close()
        if e.errno == errno.EADDRINUSE:
            return None
        raise ConfigError(
            f"cannot listen on {host} port {port} for {name}: {e.strerror or e}; correct "
            f"SAGELLM_COMM_PORTS_HOST or {setting}"
        ) from e
    return opened
