"""Chinese accelerators' communication libraries as rows of facts behind one adapter."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
