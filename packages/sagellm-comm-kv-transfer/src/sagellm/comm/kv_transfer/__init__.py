"""Moves KV-cache blocks between processes: checked, bounded and authenticated."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
