"""Text of tools made plain: decoded, bounded, without colours, one kind of line end."""

from __future__ import annotations

import re

from sagellm.comm.topology._input import MAX_BYTES
from sagellm.core.protocols import IntegrityError

__all__ = ["MAX_LINE", "cpu_mask_list", "numa_numbers", "plain_lines"]

MAX_LINE = 128 << 10
"""Characters of a line that are read; a row of a thousand devices takes a tenth of it."""

_MOST_NUMBERS = 1024  # the kernel has no more NUMA nodes
_MAX_LINES = 200_000
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_NUMBERS = re.compile(r"^\d{1,5}(?:-\d{1,5})?(?:,\d{1,5}(?:-\d{1,5})?)*$")


def plain_lines(data: bytes, warnings: list[str]) -> list[str]:
    """The lines of a tool's output; what is cut off is told in `warnings`.

    Raises:
        IntegrityError: More than 64 MiB.

    """
    if len(data) > MAX_BYTES:
        raise IntegrityError(f"{len(data)} bytes, more than the {MAX_BYTES} that are read")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = data.decode(encoding, "replace").replace("\x00", "").splitlines()
    if len(lines) > _MAX_LINES:
        warnings.append(f"{len(lines)} lines, only the first {_MAX_LINES} are read")
        del lines[_MAX_LINES:]
    long = sum(len(line) > MAX_LINE for line in lines)
    if long:
        warnings.append(f"{long} lines are cut after {MAX_LINE} characters")
    return [_ESCAPES.sub("", line[:MAX_LINE]).rstrip() for line in lines]


def numa_numbers(text: str) -> tuple[int, ...]:
    """NUMA nodes of a cell such as `0`, `0-1` or `0,3-9`; empty for `N/A`, `-1` or rubbish.

    >>> numa_numbers("0,3-5"), numa_numbers("N/A"), numa_numbers("-1")
    ((0, 3, 4, 5), (), ())
    """
    if not _NUMBERS.match(text):
        return ()
    found: dict[int, None] = {}
    total = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        total += len(span)
        if total > _MOST_NUMBERS:
            return ()
        found.update(dict.fromkeys(span))
    return tuple(found)


def cpu_mask_list(mask: str | None) -> str | None:
    """A Linux list out of a mask of 32-bit words, highest first; None when it is no mask.

    >>> cpu_mask_list("000000ff,ffff0000,00ffffff"), cpu_mask_list("0x3,,0x1"), cpu_mask_list("0")
    ('0-23,48-71', '0,64-65', '')
    """
    words = (mask or "").strip().split(",")
    if not mask or len(words) > 1024:
        return None
    try:
        values = [int(w, 16) if w.strip() else 0 for w in words]
    except ValueError:
        return None
    number = 0
    for value in values:
        if not 0 <= value < 1 << 64:
            return None
        number = number << 32 | value
    spans: list[list[int]] = []
    for cpu in range(number.bit_length()):
        if not number >> cpu & 1:
            continue
        if spans and spans[-1][1] == cpu - 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
