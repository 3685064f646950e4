"""What carries blocks between two channels that have met."""

from ._registry import (
    TRANSPORT_GROUP as TRANSPORT_GROUP,
    load_transport as load_transport,
)
from .tcp import (
    TCP as TCP,
    TcpTransport as TcpTransport,
)

__all__ = ["TCP", "TRANSPORT_GROUP", "TcpTransport", "load_transport"]
