"""Devices, links and paths of this machine, read from the kernel and the drivers."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
