"""Text that XML can hold: what a device is called is up to others."""

from __future__ import annotations

import re

__all__ = ["xml_text"]

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def xml_text(words: str) -> str:
    """The words with a mark in place of each character that no XML may hold."""
    return _FORBIDDEN.sub("\ufffd", words)
