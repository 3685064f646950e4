"""Moves KV-cache blocks between processes: checked, bounded and authenticated."""

from ._coded_request import CodecRequest as CodecRequest
from ._version import __version__ as __version__
from .channel import KVTransferChannel as KVTransferChannel
from .compression import (
    Lz4Codec as Lz4Codec,
    NoneCodec as NoneCodec,
    ZstdCodec as ZstdCodec,
    create_codec as create_codec,
)
from .settings import KVTransferSettings as KVTransferSettings
from .staging import HostStaging as HostStaging
from .state import TRANSITIONS as TRANSITIONS
from .transports import TcpTransport as TcpTransport

__all__ = [
    "TRANSITIONS",
    "CodecRequest",
    "HostStaging",
    "KVTransferChannel",
    "KVTransferSettings",
    "Lz4Codec",
    "NoneCodec",
    "TcpTransport",
    "ZstdCodec",
    "__version__",
    "create_codec",
]
