"""Where codes are computed: on the CPU, or by kernels on the GPU that holds the values."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEVICES", "runs_kernels"]

DEVICES = ("cpu", "cuda")
"""Kinds of devices whose tensors are coded; without kernels by way of the CPU."""


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels can work on a tensor where it is: on a CUDA GPU, with triton installed."""
    return x.device.type == "cuda" and find_spec("triton") is not None
