"""Topologies out of what other programs write, told apart by their content."""

from .reader import (
    FORMATS as FORMATS,
    import_topology as import_topology,
    read_fragment as read_fragment,
)

__all__ = ["FORMATS", "import_topology", "read_fragment"]
