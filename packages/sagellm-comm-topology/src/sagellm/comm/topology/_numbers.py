"""Numbers out of text of unknown origin: what is none is None, and nothing here raises."""

from __future__ import annotations

import re

__all__ = ["number", "whole_number"]

_NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{0,18})?")
_MOST_DIGITS = 20  # of 64 bits


def whole_number(text: str | None, *, most: int = (1 << 63) - 1) -> int | None:
    r"""A whole number from 0 to `most` in plain digits; None for all else.

    >>> whole_number(" 42\n"), whole_number("-1"), whole_number("\u00b2"), whole_number(None)
    (42, None, None, None)
    """
    text = (text or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        return None
    value = int(text)
    return value if value <= most else None


def number(text: str | None) -> float | None:
    """A number from 0 in plain digits with at most one point; None for all else.

    >>> number("32.0"), number("32.0.0"), number("nan")
    (32.0, None, None)
    """
    text = (text or "").strip()
    return float(text) if _NUMBER.fullmatch(text) else None
