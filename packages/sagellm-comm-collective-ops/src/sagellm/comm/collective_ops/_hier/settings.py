"""The options of hier, checked on each rank and compared between ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sagellm.comm.collective_ops._schedule_plans import PLANS
from sagellm.comm.collective_ops.choice import (
    AlgorithmTable,
    Rule,
    algorithms_known,
    asked_algorithms,
    parse_algorithms,
)
from sagellm.comm.collective_ops.quantized import check_wire
from sagellm.core.protocols import ConfigError

__all__ = ["ALGORITHMS", "CANDIDATES", "FLAT", "KNOWN", "LEADERS", "TWO_D", "HierSettings"]

LEADERS, TWO_D, FLAT = "leaders", "two_d", "flat"
ALGORITHMS = ("auto", LEADERS, TWO_D, FLAT)
CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "all_reduce": (TWO_D, FLAT),
    "all_gather": (FLAT,),
    "reduce_scatter": (FLAT,),
    "broadcast": (FLAT,),
    "reduce": (FLAT,),
}
"""What may run an operation instead of `leaders`."""

KNOWN = algorithms_known({op: (LEADERS, *names) for op, names in CANDIDATES.items()})
_CHUNK_BYTES = 1 << 20
"""Over 1 Gbit/s, pieces of 1 MiB were 2 to 8 % faster than 4 MiB (2 x 2 ranks, 4-16 MiB)."""


@dataclass(frozen=True, slots=True)
class HierSettings:
    """What all ranks agree on.

    Attributes:
        algorithm: `leaders`, `two_d`, `flat`, or `auto`, which is what a cost model or a
            calibration says, else `leaders`: one speaker filled a link of 1 Gbit/s as well as two,
            and took 2/3 of the time for 4 KiB.
        asked: What the option or setting `algorithms` has.
        between: Schedules of the stage between hosts.
        wire: Format between hosts.
        allow_lossy: Whether it may round.
        link_bytes_per_s: Of a host's link, for `wire="auto"`; None measures.
        chunk_bytes: Size of a piece of a large tensor.
        calibrate: Whether algorithms are measured when the group is made.

    """

    algorithm: str = "auto"
    asked: AlgorithmTable = field(default_factory=AlgorithmTable)
    between: AlgorithmTable = field(default_factory=AlgorithmTable)
    wire: str = "none"
    allow_lossy: bool = False
    link_bytes_per_s: float | None = None
    chunk_bytes: int = _CHUNK_BYTES
    calibrate: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], *, calibrate: bool) -> HierSettings:
        """Check options by name; others than these are left alone."""
        own = {f.name: options[f.name] for f in fields(cls) if f.name in options}
        own |= {
            "asked": asked_algorithms(options, KNOWN),
            "between": _between(options.get("between", "")),
            "calibrate": calibrate,
        }
        found = cls(**own)
        if found.algorithm not in ALGORITHMS:
            raise ConfigError(
                f"algorithm {found.algorithm!r} is not one of {', '.join(ALGORITHMS)}"
            )
        if not isinstance(found.chunk_bytes, int) or found.chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes must be an integer above 0, got {found.chunk_bytes!r}")
        check_wire(found.wire, found.allow_lossy, found.link_bytes_per_s)
        return found

    @property
    def tables(self) -> tuple[AlgorithmTable, ...]:
        """What users asked, by precedence."""
        if self.algorithm == "auto":
            return (self.asked,)
        ops = [op for op in CANDIDATES if self.algorithm in (LEADERS, *CANDIDATES[op])]
        always = tuple(Rule(op, 0, None, self.algorithm) for op in ops)
        return self.asked, AlgorithmTable(always, "option algorithm")

    def may_use(self, name: str) -> bool:
        """Whether an algorithm is asked for, or will be measured."""
        asked = any(rule.algorithm == name for table in self.tables for rule in table.rules)
        return asked or (self.calibrate and self.algorithm == "auto")

    def text(self) -> str:
        """What differs from the defaults, equal on ranks that were asked the same."""
        usual = HierSettings()
        ours = {f.name: getattr(self, f.name) for f in fields(self)}
        said = {
            name: ",".join(sorted(map(str, value.rules)))
            if isinstance(value, AlgorithmTable)
            else value
            for name, value in ours.items()
            if value != getattr(usual, name)
        }
        return "; ".join(f"{name} {value}" for name, value in said.items() if value != "")


def _between(text: object) -> AlgorithmTable:
    """The rules of a schedule's name, which is for all operations that have it, or of overrides."""
    if not isinstance(text, str):
        raise ConfigError(f"option between is {text!r}, not a string")
    name = text.strip().lower()
    if not name or ":" in name:
        return parse_algorithms(text, source="option between")
    rules = tuple(Rule(op, 0, None, name) for op, plans in PLANS.items() if name in plans)
    if not rules:
        known = ", ".join(sorted({name for plans in PLANS.values() for name in plans}))
        raise ConfigError(f"option between: no schedule {text!r}; there are {known}")
    return AlgorithmTable(rules, "option between")
