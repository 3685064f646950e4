"""What carries blocks between two channels that have met."""

from ._registry import (
    TRANSPORT_GROUP as TRANSPORT_GROUP,
    load_spec as load_spec,
    transport_names as transport_names,
    transport_registry as transport_registry,
)
from .shm import (
    SHM as SHM,
    ShmTransport as ShmTransport,
)
from .tcp import (
    TCP as TCP,
    TcpTransport as TcpTransport,
)

__all__ = [
    "SHM",
    "TCP",
    "TRANSPORT_GROUP",
    "ShmTransport",
    "TcpTransport",
    "load_spec",
    "transport_names",
    "transport_registry",
]
