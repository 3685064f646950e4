"""Tables of devices against devices, as `topo -m` and its cousins print them.

Tools separate cells by tabs or spaces, glue them, leave them out and cut them off. A table is read
by what its words can mean, and by position only where a word could mean two things.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sagellm.comm.topology._words import some

__all__ = ["ACCELERATOR", "Table", "read_tables"]

ACCELERATOR = re.compile(r"^(GPU|NPU|XPU|HCU|DCU|MLU|GCU|DEV|Phy-ID)([0-9]{1,7})$", re.IGNORECASE)
"""Labels of accelerators; every other label is a NIC's."""

_LABEL = r"(?:GPU|NPU|XPU|HCU|DCU|MLU|GCU|DEV|NIC|HCA|Phy-ID)\d+"
_GLUED_LABELS = re.compile(rf"(?:{_LABEL}){{2,}}", re.IGNORECASE)
_NAME = re.compile(r"^[A-Za-z][\w.\-]*\d[\w.\-]*(?::\d+)?$")  # the last is the port
_WORD = re.compile(r"^[A-Za-z][\w.\-]*(?::\d+)?$", re.ASCII)
_BLANK_IN_LIST = re.compile(r"(?<=\d), +(?=\d)")
_TITLE = re.compile(
    r"(?P<own>GPU\s+NUMA\s+ID|NPU\s+NUMA\s+ID)"
    r"|(?P<cpu>CPU\s+Affinity)"
    r"|(?P<numa>NUMA\s+Affinity|Node\s+Affinity|NUMA\s+Node|NUMA\s+ID)",
    re.IGNORECASE,
)
_CELL = (
    r"NV\d+|MT\d+|MLK\d*|MXLK\d*|MX\d*|XGMI\d*|HCCS_SW|HCCS\d*|SIO\d*|UB\d*|XL\d*|IX\d*|C2C"
    r"|PIX|PXB|PHB|NODE|SYS|SOC|PCIE|ETH|SGL|MUL|H_B|CPU|HSW"
    r"|OK|CNS|GNS|TNS|NS|DR|UNKNOWN|UNK|U|N/A|NA|X|\?|-"
)
_CELLS = re.compile(rf"^(?:{_CELL})+$", re.IGNORECASE)
_ONE_CELL = re.compile(_CELL, re.IGNORECASE)
_WHOLE = re.compile(rf"^(?:{_CELL}|\d+)$", re.IGNORECASE)
_COLUMN_SLACK = 6


@dataclass(slots=True)
class Table:
    """One table.

    Attributes:
        title: The nearest line with words above it.
        labels: Columns that stand for devices, in order.
        titles: What the other columns hold: `cpu`, `numa`, `own`; `""` for what nobody knows.
        first: How many of the other columns come before the devices.
        rows: Label to its cells, one for each column; None where a cell is missing.
        tails: Label to what the columns after them say; only cells that are filled.
        warnings: What could not be read.

    """

    title: str
    labels: list[str]
    titles: list[str]
    first: int = 0
    rows: dict[str, list[str | None]] = field(default_factory=dict)
    tails: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _offset: int = 0
    _spans: list[tuple[str, int]] = field(default_factory=list)


def read_tables(lines: Iterable[str]) -> Iterator[Table]:
    """Every table in the lines; lines that are no rows do not end one, the next header does."""
    table: Table | None = None
    title = ""
    for text in lines:
        line = _BLANK_IN_LIST.sub(",", _without_bars(text))
        header = _header(line, title) or _tab_header(line, title)
        if header is not None:
            if table is not None:
                yield _checked(table)
            table = header
            continue
        if table is not None and _row(table, line):
            continue
        if line.strip():
            title = line.strip(" =-\t")
    if table is not None:
        yield _checked(table)


def _without_bars(line: str) -> str:
    """A row of a table drawn with bars as one with tabs."""
    plain = line.strip()
    if not (plain.startswith("|") and plain.endswith("|") and len(plain) > 1):
        return line
    return "\t".join(cell.strip() for cell in plain[1:-1].split("|"))


def _checked(table: Table) -> Table:
    absent = [label for label in table.labels if label not in table.rows]
    if absent:
        table.warnings.append(f"no row for {some(absent)}")
    return table


def _header(line: str, title: str) -> Table | None:
    """The table that a line opens, or None when it opens none."""
    if not line.strip():
        return None
    line = line.expandtabs()
    spans = [(m.lastgroup or "", m.start()) for m in _TITLE.finditer(line)]
    ends = [m.end() for m in _TITLE.finditer(line)]
    first = len(spans) if spans and not line[: spans[0][1]].strip() else 0
    names = line[ends[-1] :] if first else line[: spans[0][1]] if spans else line
    labels: list[str] = []
    for word in names.split():
        if _GLUED_LABELS.fullmatch(word):
            labels += re.findall(_LABEL, word, re.IGNORECASE)
        elif _NAME.match(word) and not _WHOLE.match(word):
            labels.append(word)
        else:
            return None
    if not _are_labels(labels):
        return None
    if len(labels) == 1 and not spans and not line[:1].isspace():
        return None  # a word at the start of a line, not the header of one device
    return Table(
        title,
        labels,
        [kind for kind, _ in spans],
        first,
        _offset=line.rfind(labels[-1], 0, spans[0][1] if spans else len(line)),
        _spans=spans,
    )


def _are_labels(labels: Sequence[str]) -> bool:
    return any(map(ACCELERATOR.match, labels)) and len(set(labels)) == len(labels)


def _tab_header(line: str, title: str) -> Table | None:
    """The table that a line with tabs opens whose words say less than their places.

    NICs may have names without a digit, and titles may be in any language.
    """
    if "\t" not in line or not line[:1].isspace():
        return None
    labels: list[str] = []
    before: list[str] = []
    after: list[str] = []
    for cell in filter(None, (c.strip() for c in line.split("\t"))):
        words = cell.split()
        match = _TITLE.fullmatch(cell)
        is_label = match is None and (
            all(map(_NAME.match, words)) or (bool(labels) and bool(_WORD.match(cell)))
        )
        if is_label and after:
            return None
        if is_label:
            labels += words
        else:
            (after if labels else before).append(match.lastgroup or "" if match else "")
    if not _are_labels(labels) or any(map(_WHOLE.match, labels)):
        return None
    return Table(title, labels, [*before, *after], len(before))


def _row(table: Table, line: str) -> bool:
    """Read one row into the table; False when the line is none."""
    label, _, rest = (
        line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
    )
    label, glued, more = label.partition(" ")
    rest = f"{more} {rest}" if glued else rest
    if label not in table.labels:
        return False
    if "\t" in line:
        fields = _filled(table, label, rest.split("\t"))
        head, fields = fields[: table.first], fields[table.first :]
        cells, tail = _cells_of_tabs(fields, len(table.labels))
        found = dict(zip(table.titles, map(str.strip, head), strict=False))
        found |= _tail_of_tabs(table, tail)
    else:
        cells, found = _words(table, line)
    if not any((c and _CELLS.match(c)) or (c and c.isdigit()) for c in cells):
        return False
    strange = [c for c in cells if c and not _WHOLE.match(c)]
    if strange:
        table.warnings.append(f"row {label}: {some(strange)} is no link class")
        cells = [c if c and _WHOLE.match(c) else None for c in cells]
    missing = len(table.labels) - len(cells)
    if missing > 0:
        table.warnings.append(f"row {label} is cut: {missing} of {len(table.labels)} cells missing")
        cells += [None] * missing
    if label in table.rows:
        if any(a and b and a != b for a, b in zip(table.rows[label], cells, strict=True)):
            table.warnings.append(f"row {label} is there twice, and the first is believed")
        return True
    table.rows[label] = cells
    table.tails[label] = {k: v for k, v in found.items() if k and v}
    return True


def _split(word: str) -> list[str]:
    """Cells that a tool printed without anything between them."""
    if _WHOLE.match(word) or not _CELLS.match(word):
        return [word]
    return _ONE_CELL.findall(word)


def _filled(table: Table, label: str, fields: list[str]) -> list[str]:
    """The fields without empty ones, where it is plain that these only part the others."""
    filled = [f for f in fields if f.strip()]
    full = len(table.labels) + len(table.titles)
    lone = len(table.labels) if not ACCELERATOR.match(label) and not table.first else full
    return filled if len(filled) in (full, lone) else fields


def _cells_of_tabs(fields: Sequence[str], wanted: int) -> tuple[list[str | None], list[str]]:
    cells: list[str | None] = []
    for used, text in enumerate(fields):
        if len(cells) >= wanted:
            return cells[:wanted], [f.strip() for f in fields[used:]]
        words = text.split()
        if not words:
            cells.append(None)
        for word in words:
            cells += _split(word)
    return cells[:wanted], []


def _tail_of_tabs(table: Table, tail: list[str]) -> dict[str, str]:
    """Affinity cells by position; tools put a second tab before the last column."""
    titles = table.titles[table.first :]
    while len(tail) > len(titles) and "" in tail:
        del tail[len(tail) - 1 - tail[::-1].index("")]
    return dict(zip(titles, tail, strict=False))


def _words(table: Table, line: str) -> tuple[list[str | None], dict[str, str]]:
    """Cells and affinities of a row without tabs."""
    words = [(m.group(), m.start()) for m in re.finditer(r"\S+", line)][1:]
    cells: list[str | None] = []
    last = 0
    ahead: dict[str, str] = {}
    if table.first and len(words) >= table.first + len(table.labels):
        ahead = {k: words.pop(0)[0] for k in table.titles[: table.first]}
    while words and len(cells) < len(table.labels):
        word, last = words.pop(0)
        cells += _split(word)
    titles = table.titles[table.first :]
    if len(words) == len(titles):
        return cells, ahead | {k: w for k, (w, _) in zip(titles, words, strict=True)}
    found = ahead
    # A cell is blank: columns decide, moved by what the header lost on its left.
    shift = last - table._offset
    for word, start in words:
        ranked = sorted(
            (abs(start - shift - at), kind) for kind, at in table._spans if kind not in found
        )
        if ranked and ranked[0][0] <= _COLUMN_SLACK:
            found[ranked[0][1]] = word
        else:
            table.warnings.append(f"{word!r} stands under no column; left out")
    return cells, found
