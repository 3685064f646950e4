"""Cambricon's CNCL."""

from __future__ import annotations

from .backend import DomesticBackend

__all__ = ["CNCLBackend"]


class CNCLBackend(DomesticBackend):
    """Collectives on Cambricon MLU through torch_mlu. Unverified on hardware.

    The library would send float64 as float32 without a word: it is refused here by name. `avg`
    is a sum and a division.
    """
