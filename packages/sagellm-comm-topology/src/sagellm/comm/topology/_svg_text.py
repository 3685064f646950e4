"""How wide words are drawn, so that they can be placed and cut before anybody draws them."""

from __future__ import annotations

__all__ = ["FONT", "clip", "width_of"]

FONT = "font-family='Arial,Helvetica,Liberation Sans,DejaVu Sans,sans-serif'"
"""Fonts that any machine has one of. Words are measured in the widest, DejaVu Sans."""

# Advance of each printable ASCII character in DejaVu Sans, in hundredths of the font's size.
_PLAIN = (
    "32 40 46 84 64 95 78 27 39 39 50 84 32 36 32 34 64 64 64 64 64 64 64 64 64 64 34 34 84 "
    "84 84 53 100 68 69 70 77 63 58 77 75 29 29 66 56 86 75 79 60 79 69 63 61 73 68 99 69 61 "
    "69 39 34 39 84 50 50 61 63 55 63 62 35 63 63 28 28 58 28 97 63 61 63 63 41 52 39 63 59 "
    "82 59 59 52 64 34 64 84 "
)
_BOLD = (
    "35 46 52 84 70 100 87 31 46 46 52 84 38 42 38 37 70 70 70 70 70 70 70 70 70 70 40 40 84 "
    "84 84 58 100 77 76 73 83 68 68 82 84 37 37 77 64 100 84 85 73 85 77 72 68 81 77 110 77 "
    "72 73 46 37 46 84 50 50 67 72 59 72 68 44 72 71 34 34 67 34 104 71 69 72 72 49 60 48 71 "
    "65 92 65 65 58 71 37 71 84 "
)
_WIDTHS = {
    heavy: {chr(32 + i): int(width) for i, width in enumerate(table.split())}
    for heavy, table in ((False, _PLAIN), (True, _BOLD))
}
_OTHER = 100  # as wide as a Chinese character


def width_of(words: str, size: float, *, bold: bool = False) -> float:
    """Width of one line in pixels.

    >>> width_of("GPU 12", 10), width_of("GPU 12", 10, bold=True)
    (37.0, 41.1)
    """
    table = _WIDTHS[bold]
    return round(sum(table.get(c, _OTHER) for c in words) * size / 100, 1)


def clip(words: str, width: float, size: float = 11, *, bold: bool = False) -> str:
    """As much of the words as fits into a width, with an ellipsis where some is missing.

    >>> clip("NVIDIA H100", 40, 10)
    'NVIDI…'
    """
    if width_of(words, size, bold=bold) <= width:
        return words
    room, kept = width - width_of("…", size), 0
    while kept < len(words) and width_of(words[: kept + 1], size, bold=bold) <= room:
        kept += 1
    return words[:kept].rstrip() + "…"
