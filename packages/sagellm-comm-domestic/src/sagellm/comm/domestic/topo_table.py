"""Read the link matrices that vendors' management tools print.

The forms differ in spacing, columns and codes, and change between releases. So header tokens
name the columns, rows are split on white space, and a code nobody knows is kept as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

__all__ = ["LinkTable", "parse_bus_table", "parse_link_table"]

_EXTRA = re.compile(r"\S+ Affinity")
_BDF = re.compile(r"^(?:[0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]$")


@dataclass(frozen=True, slots=True)
class LinkTable:
    """A matrix as printed.

    Attributes:
        names: Devices in the order of the rows.
        cells: (row, column) to the code, the diagonal left out.
        extra: Row to further columns by title (`CPU Affinity`).
        problems: What did not fit, in words.

    """

    names: tuple[str, ...] = ()
    cells: Mapping[tuple[str, str], str] = field(default_factory=dict)
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def parse_link_table(text: str, name: str) -> LinkTable:
    """The first matrix in `text` whose rows are called by the pattern `name`.

    Columns end with a digit (`NIC0`) and come before those with titles. Never raises.

    >>> lines = ["     NPU0 NPU1 CPU Affinity", "NPU0 X   HCCS 0-3"]
    >>> table = parse_link_table(chr(10).join(lines), "NPU[0-9]+")
    >>> table.cells, table.extra["NPU0"]
    ({('NPU0', 'NPU1'): 'HCCS'}, {'CPU Affinity': '0-3'})
    """
    is_name = re.compile(rf"^(?:{name})$")
    columns: list[str] = []
    titles: list[str] = []
    names: list[str] = []
    cells: dict[tuple[str, str], str] = {}
    extra: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for line in text.splitlines():
        tokens = line.split()
        if not tokens:
            continue
        if not columns:
            # Every row has an X for the device itself, and the header has none.
            if is_name.match(tokens[0]) and "X" not in tokens:
                columns = list(takewhile(lambda token: token[-1].isdigit(), tokens))
                titles = _EXTRA.findall(" ".join(tokens[len(columns) :]))
            continue
        if not is_name.match(tokens[0]):
            if names:
                break
            continue
        row, values = tokens[0], tokens[1:]
        if len(values) < len(columns):
            problems.append(f"row {row} has {len(values)} of {len(columns)} columns")
        names.append(row)
        for column, code in zip(columns, values, strict=False):
            if column != row:
                cells[row, column] = code
        rest = values[len(columns) :]
        if len(rest) == len(titles):
            extra[row] = dict(zip(titles, rest, strict=True))
        elif rest:
            problems.append(f"row {row} ends with {' '.join(rest)}, which no column explains")
    return LinkTable(tuple(names), cells, extra, tuple(problems))


def parse_bus_table(text: str) -> dict[int, tuple[str, str | None]]:
    """Index to PCI address and model, from a tool's overview in boxes of `|`.

    An address may stand in the line of the index (`| 0 C500 | 0000:08:00.0 |`) or in the next,
    after the chip's number and, where a card carries several chips, its physical id.
    """
    found: dict[int, tuple[str, str | None]] = {}
    card: tuple[int, str | None] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:]]
        if len(cells) < 2:
            continue
        head = cells[0].split()
        if not head or not head[0].isdigit():
            continue
        if not _BDF.match(cells[1]):
            card = (int(head[0]), " ".join(head[1:]) or None)
            continue
        address = cells[1].lower()
        if address.count(":") == 1:
            address = f"0000:{address}"
        if len(head) > 1 and not head[1].isdigit():
            found[int(head[0])] = (address, " ".join(head[1:]))
        elif card is not None:
            index = int(head[1]) if len(head) > 1 else card[0]
            found[index] = (address, card[1])
    return found
