"""The interfaces, types and errors that every sagellm.comm package shares."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
