"""Collectives over NCCL, RCCL, Gloo and an in-process mock behind one protocol."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
