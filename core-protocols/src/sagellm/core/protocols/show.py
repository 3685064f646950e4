"""Tables and JSON on standard output; rich tables on a terminal where rich is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

__all__ = ["bytes_text", "parse_bytes", "print_json", "print_line", "print_table", "rate_text"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str) -> int:
    """A size such as `64`, `64k`, `1M` or `2GiB`, in bytes.

    >>> parse_bytes("64k"), parse_bytes("1MiB")
    (65536, 1048576)
    """
    word = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = word[-1:] if word[-1:] in ("k", "m", "g") else ""
    number = word.removesuffix(unit).strip()
    if not number.isdecimal():
        raise ValueError(f"{text!r} is no size; write 4096, 64k, 1M or 1G")
    return int(number) * _UNITS[unit]


def bytes_text(nbytes: int) -> str:
    """A size for people: whole units where it has them.

    >>> bytes_text(65536), bytes_text(1000)
    ('64 KiB', '1000 B')
    """
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift} {unit}"
    return f"{nbytes} B"


def rate_text(bytes_per_s: float) -> str:
    """A bandwidth in GB/s, as nccl-tests write it."""
    return f"{bytes_per_s / 1e9:.3f}"


def print_json(value: object) -> None:
    """Write one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_line(text: str = "") -> None:
    """Write one line."""
    sys.stdout.write(text + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Write a table; `right` names the columns of numbers."""
    if sys.stdout.isatty() and _rich_table(title, columns, rows, right):
        return
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    lines = [title] if title else []
    for row in [columns, *rows]:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    sys.stdout.write("\n".join(lines) + "\n\n")


def _rich_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]
) -> bool:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=escape(title) or None, title_justify="left")
    for name in columns:
        table.add_column(escape(name), justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
    return True
