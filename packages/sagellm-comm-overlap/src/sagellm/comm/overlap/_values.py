"""One name for types that belong to the caller's functions or to torch, and not to us."""

from __future__ import annotations

from typing import Any, TypeAlias

__all__ = ["Foreign"]

Foreign: TypeAlias = Any
"""What a task takes or returns, a library's handle, a stream or event of a device module."""
