"""RCCL: what torch built for ROCm calls `nccl` on `cuda`. Unverified on hardware."""

from __future__ import annotations

from typing import ClassVar

from sagellm.core.protocols import BackendSpec

from ._specs import RCCL
from .nccl_backend import NCCLBackend

__all__ = ["RCCLBackend"]


class RCCLBackend(NCCLBackend):
    """An RCCL process group behind the protocol; RCCL reads NCCL's settings, NCCL_ALGO too."""

    default_spec: ClassVar[BackendSpec] = RCCL
