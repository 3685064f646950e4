"""A chart of a few curves in characters, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.text import Text

__all__ = ["chart"]

_MARKS = "●▲■◆✚○△□"
_COLOURS = ("cyan", "yellow", "green", "magenta", "red", "blue", "white", "bright_black")


def chart(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xs: Sequence[float],
    unit: str,
    width: int = 60,
    height: int = 12,
) -> Text:
    """Curves by name with a scale on the left, `xs` below, and a legend; empty without points.

    Args:
        curves: Points of each curve, above 0.
        xs: What is written below the chart.
        unit: Written above the scale on the left.
        width: Columns of the chart itself.
        height: Its rows.

    """
    values = [y for points in curves.values() for _, y in points]
    if not values:
        return Text()
    low, high = min(values), max(values)
    right = max(xs)

    def column(x: float) -> int:
        span = math.log(right / min(xs)) or 1.0
        return round(math.log(x / min(xs)) / span * (width - 1))

    def row(y: float) -> int:
        span = math.log(high / low) or 1.0
        return height - 1 - round(math.log(y / low) / span * (height - 1))

    cells: dict[tuple[int, int], tuple[str, str]] = {}
    for k, points in enumerate(curves.values()):
        colour = _COLOURS[k % len(_COLOURS)]
        places = [(column(x), row(y)) for x, y in points]
        for (c0, r0), (c1, r1) in pairwise(places):
            for c in range(c0 + 1, c1):
                cells.setdefault((c, round(r0 + (r1 - r0) * (c - c0) / (c1 - c0))), ("·", colour))
        for place in places:
            cells[place] = (_MARKS[k % len(_MARKS)], colour)
    text = Text(f"{unit:>9}\n")
    for r in range(height):
        y = high * (low / high) ** (r / (height - 1)) if height > 1 else high
        text.append(f"{y:9.4g} " if r % 3 == 0 or r == height - 1 else " " * 10, "dim")
        text.append("│", "dim")
        for c in range(width):
            mark, colour = cells.get((c, r), (" ", ""))
            text.append(mark, colour)
        text.append("\n")
    text.append(" " * 10 + "└" + "─" * width + "\n", "dim")
    labels = [" "] * (width + 12)
    for x in xs:
        for i, character in enumerate(f"{x:g}"):
            labels[column(x) + i] = character
    text.append(" " * 11 + "".join(labels).rstrip() + "\n", "dim")
    used = width
    for k, name in enumerate(curves):
        entry = f"{_MARKS[k % len(_MARKS)]} {name}  "
        if used + len(entry) > width:
            text.append("\n" * (k > 0) + " " * 11)
            used = 0
        used += len(entry)
        text.append(entry, _COLOURS[k % len(_COLOURS)])
    return text
