"""Which algorithm runs which call: tables of (operation, size range), and where they come from.

In order: what the user wrote (`parse_algorithms`), then what was measured (`measured_table`), then
the library's own algorithm. A table is the same on all ranks, and choosing from it is pure.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sagellm.core.protocols import Choice, ConfigError, CostTable

from ._schedule_plans import PLANS
from .settings import CollectiveSettings

__all__ = [
    "PRIMITIVES",
    "AlgorithmTable",
    "Rule",
    "algorithms_known",
    "asked_algorithms",
    "choose",
    "expected_us",
    "explain_choice",
    "measured_table",
    "parse_algorithms",
]

NATIVE = "native"
"""The library's own algorithm."""

_ALIASES = {"one_shot": "direct"}
PRIMITIVES = {
    "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all",
    "reduce_scatter_tensor": "reduce_scatter",
}
"""Methods whose primitive has another name."""
_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"(\d+)([kmg]?)")
_MARGIN = 1.1
"""A measured algorithm has to win by a tenth: less is noise, and the library's is the safe one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry: calls of `op` from `low` bytes up to, not including, `high` run `algorithm`.

    `high` is None without an upper limit.
    """

    op: str
    low: int
    high: int | None
    algorithm: str

    def covers(self, op: str, nbytes: int) -> bool:
        """Whether it says anything of such a call."""
        return self.op == op and self.low <= nbytes and (self.high is None or nbytes < self.high)

    def __str__(self) -> str:
        """As `parse_algorithms` reads it."""
        return f"{self.op}:{_written(self.low)}-{_written(self.high)}:{self.algorithm}"


@dataclass(frozen=True, slots=True)
class AlgorithmTable:
    """Rules that do not overlap, and where they come from.

    Attributes:
        rules: In any order.
        source: For a person: `option algorithms`, `calibration 3f2a…`.

    """

    rules: tuple[Rule, ...] = ()
    source: str = ""

    def pick(self, op: str, nbytes: int) -> Rule | None:
        """The rule for such a call, None where there is none."""
        return next((rule for rule in self.rules if rule.covers(op, nbytes)), None)

    def always(self, op: str) -> Rule | None:
        """The rule that covers `op` at every size, for calls whose size differs among ranks."""
        return next((r for r in self.rules if r.op == op and r.low == 0 and r.high is None), None)


def algorithms_known(
    native: Mapping[str, Sequence[str]] | None = None, *, schedules: bool = True
) -> dict[str, list[str]]:
    """What `parse_algorithms` takes for each operation.

    Args:
        native: What a backend adds of its own.
        schedules: Whether it runs this package's schedules too.

    >>> algorithms_known()["all_to_all"]
    ['native', 'pairwise', 'direct']
    """
    own, ours = native or {}, PLANS if schedules else {}
    return {op: [NATIVE, *own.get(op, ()), *ours.get(op, ())] for op in sorted({*ours, *own})}


def asked_algorithms(
    options: Mapping[str, Any],  # Any: each option has its own type
    known: Mapping[str, Sequence[str]] | None = None,
) -> AlgorithmTable:
    """The table that the option `algorithms` gives, else the setting of that name.

    The setting is for all backends of a process: rules in it for algorithms that only others have
    are left out.

    Raises:
        ConfigError: It is not a string, or `parse_algorithms` does not take it.

    """
    text = options.get("algorithms")
    if text is not None:
        if not isinstance(text, str):
            raise ConfigError(f"option algorithms is {text!r}, not a string")
        return parse_algorithms(text, known)
    settings = CollectiveSettings.load()
    source = f"{settings.origin('algorithms')} (algorithms)"
    ours = algorithms_known() if known is None else known
    found = parse_algorithms(settings.algorithms, _known_to_any(ours), source)
    rules = [_renamed(r, ours.get(r.op, ())) for r in found.rules]
    return AlgorithmTable(tuple(r for r in rules if r.algorithm in ours.get(r.op, ())), source)


def _known_to_any(ours: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What one backend or another takes."""
    from ._hier.settings import KNOWN as HIER  # they need this module
    from ._shm.settings import KNOWN as SHM

    found: dict[str, list[str]] = {}
    for known in (ours, algorithms_known(), HIER, SHM):
        for op, names in known.items():
            found[op] = list(dict.fromkeys([*found.get(op, ()), *names]))
    return found


def _renamed(rule: Rule, known: Sequence[str]) -> Rule:
    """By the alias where that is what is known."""
    name = rule.algorithm
    return rule if name in known else replace(rule, algorithm=_ALIASES.get(name, name))


def parse_algorithms(
    text: str, known: Mapping[str, Sequence[str]] | None = None, source: str = "option algorithms"
) -> AlgorithmTable:
    """The table that a user wrote: `op:low-high:algorithm`, joined by commas.

    Sizes are bytes with suffix `k`, `m` or `g` (powers of 1024); `low` is included and `high` is
    not. Either may be left out, and so may the whole range. `one_shot` is `direct` where a backend
    has none of its own, and `native` the library's algorithm. Sizes are those that `explain`
    takes: bytes of one rank's input, as they go on the wire.

    Args:
        text: What was written; empty is an empty table.
        known: Algorithms by operation; None is `algorithms_known()`.
        source: Named in errors and by `explain`.

    Raises:
        ConfigError: Something else was written; the message names the token, and what is known.

    >>> table = parse_algorithms("all_reduce:0-64k:one_shot,all_gather:1m-:ring")
    >>> [str(rule) for rule in table.rules]
    ['all_reduce:0-64k:direct', 'all_gather:1m-:ring']
    """
    names = algorithms_known() if known is None else known
    rules: list[Rule] = []
    for entry in text.split(","):
        if not entry.strip():
            if text.strip():
                raise ConfigError(f"{source} {text!r} has an empty entry; write op:low-high:name")
            continue
        rule = _parse_entry(entry.strip().lower(), names, source)
        for other in rules:
            if other.op == rule.op and _overlap(other, rule):
                raise ConfigError(f"{source}: {str(other)!r} and {str(rule)!r} overlap")
        rules.append(rule)
    return AlgorithmTable(tuple(rules), source)


def _parse_entry(entry: str, known: Mapping[str, Sequence[str]], source: str) -> Rule:
    parts = [part.strip() for part in entry.split(":")]
    if len(parts) not in (2, 3):
        raise ConfigError(
            f"{source}: {entry!r} is not op:low-high:algorithm, such as all_reduce:0-64k:direct"
        )
    op = PRIMITIVES.get(parts[0], parts[0])
    if op not in known:
        raise ConfigError(
            f"{source}: operation {parts[0]!r} in {entry!r} is not one of {', '.join(known)}"
        )
    name = parts[-1]
    if name not in known[op]:
        name = _ALIASES.get(name, name)
    if name not in known[op]:
        raise ConfigError(
            f"{source}: algorithm {parts[-1]!r} in {entry!r} is not one of {', '.join(known[op])}"
        )
    low, high = _parse_range(parts[1], entry, source) if len(parts) == 3 else (0, None)
    return Rule(op, low, high, name)


def _parse_range(text: str, entry: str, source: str) -> tuple[int, int | None]:
    first, dash, last = text.partition("-")
    if not dash:
        raise ConfigError(f"{source}: size range {text!r} in {entry!r} has no '-', as in 0-64k")
    low = _parse_size(first.strip() or "0", entry, source)
    high = _parse_size(last.strip(), entry, source) if last.strip() else None
    if high is not None and high <= low:
        raise ConfigError(f"{source}: size range {text!r} in {entry!r} is empty")
    return low, high


def _parse_size(text: str, entry: str, source: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or not text.isascii() or len(text) > 20:
        raise ConfigError(
            f"{source}: size {text[:24]!r} in {entry!r} is not a number with k, m, g or nothing"
        )
    return int(match[1]) * _SUFFIXES[match[2]]


def _written(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    for suffix in ("g", "m", "k"):
        if nbytes and nbytes % _SUFFIXES[suffix] == 0:
            return f"{nbytes // _SUFFIXES[suffix]}{suffix}"
    return str(nbytes)


def _overlap(a: Rule, b: Rule) -> bool:
    return (b.high is None or a.low < b.high) and (a.high is None or b.low < a.high)


def measured_table(
    table: CostTable,
    size: int,
    source: str,
    names: Mapping[str, Collection[str]] = PLANS,
    default: str | None = NATIVE,
    planned: Sequence[int] = (),
) -> AlgorithmTable:
    """Where an algorithm was measured to beat the default by a tenth, by size range.

    An operation without a curve of the default has no rules: nothing was compared with it.
    Only sizes that all its curves have count. Ranges meet half way, in logarithms, between
    measured sizes; the last one ends half way to the next planned size, if there is one.

    Args:
        table: Curves of the algorithms, for this many ranks.
        size: Ranks.
        source: Of the rules, for a person.
        names: Algorithms by operation.
        default: What runs without a rule; None where that is no single one: the fastest then has
            a rule at every size.
        planned: Sizes to be measured, rising; a table that was cut short has not all of them.

    """
    rules: list[Rule] = []
    for op, ours in names.items():
        curves = {a: dict(p) for (o, a, n), p in table.curves.items() if o == op and n == size}
        curves = {a: p for a, p in curves.items() if a in ours or a == default}
        if (default is None and len(curves) < len(ours)) or not curves:
            continue
        if default is not None and default not in curves:
            continue
        sizes = set.intersection(*(set(p) for p in curves.values()))
        points = [(n, _winner(n, curves, default)) for n in sorted(sizes)]
        missed = {*planned, *(n for p in curves.values() for n in p)}
        beyond = min((n for n in missed if points and n > points[-1][0]), default=None)
        for i, (nbytes, name) in enumerate(points):
            if name == default:
                continue
            low = 0 if i == 0 else math.isqrt(points[i - 1][0] * nbytes)
            following = points[i + 1][0] if i + 1 < len(points) else beyond
            high = None if following is None else math.isqrt(nbytes * following)
            if rules and (rules[-1].op, rules[-1].high, rules[-1].algorithm) == (op, low, name):
                low = rules.pop().low
            rules.append(Rule(op, low, high, name))
    return AlgorithmTable(tuple(rules), source)


def _winner(nbytes: int, curves: Mapping[str, Mapping[int, float]], default: str | None) -> str:
    times = {a: points[nbytes] for a, points in curves.items()}
    best = min(times, key=lambda a: times[a])
    if default is None or times[best] * _MARGIN < times[default]:
        return best
    return default


def expected_us(table: CostTable, op: str, name: str, size: int, nbytes: int) -> float | None:
    """Time of a call by a table's curve, on straight lines between its points; None without one."""
    points = table.curves.get((op, name, size), ())
    if len(points) < 2:
        return points[0][1] if points else None
    at = min(max(bisect.bisect([n for n, _ in points], nbytes), 1), len(points) - 1)
    (low, first), (high, last) = points[at - 1 : at + 1]
    return max(0.0, first + (last - first) * (nbytes - low) / (high - low))


def choose(
    tables: Sequence[AlgorithmTable], op: str, nbytes: int | None
) -> tuple[Rule, AlgorithmTable] | None:
    """The first rule of the first table that has one; None leaves the call to the library.

    Args:
        tables: By precedence.
        op: A primitive operation.
        nbytes: None where ranks know different sizes: only rules for every size count then.

    """
    for table in tables:
        rule = table.always(op) if nbytes is None else table.pick(op, nbytes)
        if rule is not None:
            return rule, table
    return None


def explain_choice(
    tables: Sequence[AlgorithmTable],
    base: Choice,
    op: str,
    nbytes: int,
    size: int,
    names: Collection[str] | None = None,
    costs: CostTable | None = None,
) -> Choice:
    """What runs for a call, why, and what was not taken.

    Args:
        tables: By precedence.
        base: What runs where they say nothing.
        op: Method or primitive.
        nbytes: Bytes of one rank's input.
        size: Ranks.
        names: Algorithms that there are of it; None are the schedules.
        costs: What each is expected to take.

    """
    primitive = PRIMITIVES.get(op, op)
    others = PLANS.get(primitive, {}) if names is None else names
    found = choose(tables, primitive, nbytes) if size > 1 else None

    def expected(name: str) -> float | None:
        return None if costs is None else expected_us(costs, primitive, name, size, nbytes)

    def told(name: str, why: str) -> str:
        us = expected(name)
        return why if us is None else f"{why}; it is expected to take {us:.1f} us"

    if found is None or found[0].algorithm == NATIVE:
        why = "not asked for, nor measured to win here"
        reason = base.reason
        if found is not None:
            why = reason = f"{found[1].source} leaves {found[0]} to the library"
        rejected = {**base.rejected, **{a: told(a, why) for a in others if a != base.algorithm}}
        estimate = expected(base.algorithm) if base.estimate_us is None else base.estimate_us
        return Choice(base.backend, base.algorithm, reason, estimate, rejected)
    rule, table = found
    asked = f"{table.source} has {rule}"
    passed = [a for a in (*others, base.algorithm) if a != rule.algorithm]
    rejected = {a: told(a, asked) for a in passed}
    return Choice(base.backend, rule.algorithm, asked, expected(rule.algorithm), rejected)
