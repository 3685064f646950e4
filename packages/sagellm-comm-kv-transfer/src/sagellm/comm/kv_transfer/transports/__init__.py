"""What carries blocks between two channels that have met."""

from ._registry import (
    TRANSPORT_GROUP as TRANSPORT_GROUP,
    load_transport as load_transport,
)
from .shm import (
    SHM as SHM,
    ShmTransport as ShmTransport,
)
from .tcp import (
    TCP as TCP,
    TcpTransport as TcpTransport,
)

__all__ = ["SHM", "TCP", "TRANSPORT_GROUP", "ShmTransport", "TcpTransport", "load_transport"]
