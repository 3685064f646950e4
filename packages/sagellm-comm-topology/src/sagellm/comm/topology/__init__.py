"""Devices, links and paths of this machine, read from the kernel and the drivers."""

from ._version import __version__ as __version__
from .graph import TopologyGraph as TopologyGraph
from .manager import TopologyManager as TopologyManager

__all__ = ["TopologyGraph", "TopologyManager", "__version__"]
