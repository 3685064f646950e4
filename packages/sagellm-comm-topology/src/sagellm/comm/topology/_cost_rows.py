"""Rows of measurements and the arguments of questions, checked where they come in."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

from sagellm.core.protocols import ConfigError

from ._cost_prior import check_op

__all__ = [
    "MOST_BYTES",
    "MOST_NAME",
    "MOST_RANKS",
    "MOST_US",
    "CurveKey",
    "Sample",
    "group_of",
    "library_name",
    "payload",
    "sample_of",
]

MOST_BYTES = 1 << 50
MOST_RANKS = 1 << 20
MOST_US = 1e12
MOST_NAME = 256
"""Longest name of an algorithm and of a shape, in characters."""


class CurveKey(NamedTuple):
    """What a curve was measured of; shape is empty where nobody said who the ranks were."""

    op: str
    algorithm: str
    group_size: int
    shape: str = ""


class Sample(NamedTuple):
    """One measurement; members are empty where the row does not name them."""

    key: CurveKey
    nbytes: int
    time_us: float
    members: tuple[str, ...] = ()


def sample_of(index: int, row: Mapping[str, Any]) -> Sample:  # Any: JSON-like
    """The measurement that a row holds; its shape is still empty.

    Raises:
        ConfigError: A field is missing, or its value cannot be; the message names both.

    """
    try:
        op, algorithm = row["op"], row["algorithm"]
        nbytes, size, time = row["nbytes"], row["group_size"], row["time_us"]
        members = row.get("members")
    except (KeyError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"sample {index} needs op, nbytes, group_size, algorithm and time_us: {e!r}"
        ) from None
    what = f"sample {index}: "
    for name, value in (("op", op), ("algorithm", algorithm)):
        if not isinstance(value, str) or not 0 < len(value) <= MOST_NAME:
            raise ConfigError(
                f"{what}{name} {_short(value)} is no name of up to {MOST_NAME} letters"
            )
    check_op(op)
    count = _whole(f"{what}nbytes", nbytes, 1, MOST_BYTES)
    ranks = _whole(f"{what}group_size", size, 2, MOST_RANKS)
    names = _members(what, members)
    if names and len(names) != ranks:
        raise ConfigError(f"{what}{len(names)} members, but group_size {ranks}")
    return Sample(CurveKey(op, algorithm, ranks), count, _microseconds(what, time), names)


def _members(what: str, members: object) -> tuple[str, ...]:
    if members is None or (isinstance(members, (list, tuple)) and not members):
        return ()
    if not isinstance(members, Sequence):
        raise ConfigError(f"{what}members are a list of device ids, not {_short(members)}")
    return group_of(members)[1]


def library_name(library: object) -> str:
    """What measurements are kept under.

    Raises:
        ConfigError: It is no text that says anything.

    """
    if not isinstance(library, str) or not library.strip() or not library.isprintable():
        raise ConfigError(
            f"library must be a name and version such as 'nccl 2.27.3', not {_short(library)}"
        )
    return library


def payload(nbytes: object) -> int:
    """A payload that can be asked for, from 0.

    Raises:
        ConfigError: It is negative, no whole number, or beyond `MOST_BYTES`.

    """
    return _whole("nbytes", nbytes, 0, MOST_BYTES)


def group_of(group: object) -> tuple[int, tuple[str, ...]]:
    """How many members, and their names; no names where only the number was told.

    Raises:
        ConfigError: No number from 1, an empty or doubled list, or a text in place of a list.

    """
    if isinstance(group, Sequence) and not isinstance(group, (str, bytes)):
        names = tuple(group)
        if not names:
            raise ConfigError("a group has at least 1 member, not 0")
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"members of a group are device ids, not {_short(names)}")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"a device is in a group once; {', '.join(twice[:4])} are not")
        return _whole("members of a group", len(names), 1, MOST_RANKS), names
    if isinstance(group, (str, bytes)):
        raise ConfigError(f"a group is a list of device ids or a number, not {_short(group)}")
    return _whole("a group's size", group, 1, MOST_RANKS), ()


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        found = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # refused below
    except TypeError:
        found = -1
    if not least <= found <= most:
        raise ConfigError(
            f"{name} must be a whole number from {least} to {most}, not {_short(value)}"
        )
    return found


def _microseconds(what: str, value: SupportsFloat) -> float:
    try:
        found = 0.0 if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = 0.0
    if not 0 < found <= MOST_US:
        raise ConfigError(
            f"{what}time_us {_short(value)} must be above 0 and at most {MOST_US:g} microseconds"
        )
    return found


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
