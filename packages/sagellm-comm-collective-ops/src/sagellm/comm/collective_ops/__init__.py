"""Collectives over NCCL, RCCL, Gloo and an in-process mock behind one protocol."""

from ._mock_group import Transfer as Transfer
from ._version import __version__ as __version__
from .factory import (
    create_comm_backend as create_comm_backend,
    explain_selection as explain_selection,
)
from .fusion import FusedAllReduce as FusedAllReduce, fused_all_reduce as fused_all_reduce
from .gloo_backend import GlooBackend as GlooBackend
from .mock_backend import MockBackend as MockBackend, MockWorld as MockWorld
from .nccl_backend import NCCLBackend as NCCLBackend
from .rccl_backend import RCCLBackend as RCCLBackend

__all__ = [
    "FusedAllReduce",
    "GlooBackend",
    "MockBackend",
    "MockWorld",
    "NCCLBackend",
    "RCCLBackend",
    "Transfer",
    "__version__",
    "create_comm_backend",
    "explain_selection",
    "fused_all_reduce",
]
