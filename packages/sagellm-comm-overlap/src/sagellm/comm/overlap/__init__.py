"""Runs compute and communication side by side and measures how much was hidden."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
