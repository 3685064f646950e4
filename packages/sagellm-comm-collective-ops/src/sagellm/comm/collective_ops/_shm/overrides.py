"""Reading the option `algorithms`: which algorithm for which sizes, as a string."""

from __future__ import annotations

import re

from sagellm.core.protocols import ConfigError

from .choice import ALGORITHMS, Override
from .layout import OPS

__all__ = ["parse_overrides"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"(\d+)([kmg]?)")
_EVER = 1 << 62


def parse_overrides(text: str | None) -> tuple[Override, ...]:
    """The overrides in a string such as `all_reduce:0-64k:one_shot,all_reduce:64k-:two_shot`.

    Sizes are bytes, with `k`, `m` or `g` for powers of 1024; the upper one is excluded, and may be
    left out.

    Raises:
        ConfigError: It cannot be read; the message has the part and the form.

    >>> parse_overrides("all_reduce:0-64k:one_shot")
    (('all_reduce', 0, 65536, 'one_shot'),)
    """
    found = []
    for part in (text or "").split(","):
        if not part.strip():
            continue
        words = part.strip().lower().split(":")
        low, dash, high = words[1].partition("-") if len(words) == 3 else ("", "", "")
        if not dash or words[0] not in OPS or words[2] not in ALGORITHMS:
            raise ConfigError(
                f"{part.strip()!r} is not op:low-high:algorithm, such as all_reduce:0-64k:one_shot; "
                f"algorithms are {', '.join(ALGORITHMS)}"
            )
        found.append((words[0], _bytes(low, part), _bytes(high, part) if high else _EVER, words[2]))
    return tuple(found)


def _bytes(text: str, part: str) -> int:
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        raise ConfigError(f"{text!r} in {part.strip()!r} is not a size such as 65536 or 64k")
    return int(size[1]) * _UNITS[size[2]]
